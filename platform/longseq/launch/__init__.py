"""Starting training processes, here or on a cluster. No torch here."""
