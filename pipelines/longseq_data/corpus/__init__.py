"""Prepared corpora as they lie on a disk: shards of tokens, their manifest, and reading them."""
