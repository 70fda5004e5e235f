"""Experiments of several runs: what they are, how they are run, and the table that comes of them. No torch here."""
