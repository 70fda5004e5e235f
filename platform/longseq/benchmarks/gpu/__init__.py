"""`longseq bench gpu`: whether all of it works on this machine's GPU, and how fast; each part in its own process."""
