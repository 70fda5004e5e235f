"""Synthetic proteins with a known entropy."""
