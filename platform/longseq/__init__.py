"""longseq: distributed pretraining of Performers (FAVOR+ linear attention) on very long sequences."""

__version__ = "0.2.0"
