"""One file a verb; each reads top to bottom."""
