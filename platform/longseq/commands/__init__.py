"""One file per verb; each reads top to bottom."""
