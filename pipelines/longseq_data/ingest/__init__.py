"""From sources to token blocks: each source is parsed once, and trained on while that goes on."""
