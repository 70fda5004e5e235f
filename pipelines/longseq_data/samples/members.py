"""One record of each cluster: which one, a function of (seed, epoch, cluster)."""

from __future__ import annotations

import numpy as np

from longseq_data.randomness import stream_words, words

from .order import endless_order
from .rows import Integers


class Members:
    """The clusters of a corpus, from a file of prepare.members: their number n, where each begins, the end, and the
    records cluster by cluster."""

    def __init__(self, path: str) -> None:
        values = np.load(path, mmap_mode="r")
        self.count = int(values[0])
        self._begins, self._records = values[1 : self.count + 2], values[self.count + 2 :]

    def sizes(self, clusters: Integers) -> Integers:
        """How many records each cluster has, at least 1."""
        return self._begins[clusters + 1] - self._begins[clusters]

    def of(self, clusters: Integers) -> Integers:
        """The records of some clusters, one cluster after the other."""
        sizes = self.sizes(clusters)
        places = np.arange(sizes.sum()) + np.repeat(self._begins[clusters] - (np.cumsum(sizes) - sizes), sizes)
        return np.asarray(self._records[places])

    def records(self, samples: Integers, seed: int) -> Integers:
        """The record of each sample of the endless order: an epoch has each cluster once."""
        clusters = endless_order(samples, self.count, seed)
        epochs = samples // self.count
        drawn = (stream_words(words(seed, "member", epochs), clusters) >> np.uint64(11)) * 2.0**-53
        begins = self._begins[clusters]
        return self._records[begins + (drawn * (self._begins[clusters + 1] - begins)).astype(np.int64)]
