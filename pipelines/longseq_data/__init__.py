"""Data pipelines for long sequences. Stands alone: nothing here imports ``longseq``."""
