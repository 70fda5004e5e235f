"""From sources to a corpus: filters, duplicates, splits, one shuffle, and what is asked of a corpus afterwards."""
