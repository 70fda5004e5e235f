"""A run as a folder: its checkpoints, its starts, who owns it."""
