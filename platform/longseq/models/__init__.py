"""Performer language models. ``spec`` and ``presets`` import no torch; ``performer`` does."""
