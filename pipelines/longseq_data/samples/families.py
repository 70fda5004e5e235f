"""Samples of whole families: the members of a cluster in one context, so that each is read after its relatives.

Sequential models of families learn from the members before (ProGen3's and PoET's contexts: Truong and Bepler,
arXiv 2306.06156). The order of members is random, or their place in a table would tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.randomness import stream_words, words
from longseq_data.vocabulary import IGNORE

from .corpus_cuts import CHUNK, Plan, numbered
from .infilling import Pieces
from .masking import masked_counts
from .members import Members
from .order import endless_order, permutation
from .rows import Integers, Rows


class Families:
    """One cluster a sample: BOS member EOS member EOS ..., or ``length`` positions of it. A Cut; a plan's records are
    clusters.

    A training sample is the beginning of such a row; the order of the members is a function of (seed, epoch, cluster),
    so that a family larger than the window shows other members each time. An evaluation takes all of every family, in
    one order whatever the seed, cut into windows.
    """

    def __init__(
        self, corpus: Corpus, length: int, objective: str, seed: int, members: Members, *, fixed: bool = False
    ) -> None:
        self.corpus, self.length, self.seed, self.members, self.fixed = corpus, length, seed, members, fixed
        self.causal = objective == "causal"
        self.size = length + self.causal
        self.epoch = members.count
        self._held: tuple[tuple[int, int], tuple[Integers, Integers]] | None = None

    def plan(self, samples: Integers) -> Plan:
        clusters = endless_order(samples, self.epoch, self.seed)
        return self._at(samples, clusters, np.zeros_like(clusters), self.whole(clusters))

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        objective = "causal" if self.causal else "masked"
        cut = Families(self.corpus, self.length, objective, 0, self.members, fixed=True)
        every = np.arange(self.epoch)
        windows = np.concatenate([self._windows(some) for some in np.split(every, range(CHUNK, self.epoch, CHUNK))])
        ends, number = np.cumsum(windows), 0
        total, at_once = int(ends[-1]), 64 if sampled else CHUNK  # which members are in a window takes a sort
        for first in range(0, total, at_once):
            chosen = np.arange(first, min(first + at_once, total))
            if sampled:  # windows, or one large family could be all of them
                chosen = permutation(total, 0, 0)(chosen)
            clusters = np.searchsorted(ends, chosen, "right")
            starts = (chosen - ends[clusters] + windows[clusters]) * self.length
            plan = cut._at(np.zeros_like(clusters), clusters, starts, self.whole(clusters))
            plan = numbered(plan[plan.scored > 0], number)
            number += len(plan)
            yield plan

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        for sample in range(len(plan)):
            start, stop = int(plan.starts[sample]) + 1, int(plan.starts[sample] + plan.sizes[sample])
            records, begins = self._row(plan, sample)
            for record, begin, length in zip(*self._within(records, begins, start, stop), strict=True):
                yield record, min(max(start - begin, 0), length), min(stop - begin, length)

    def pieces(self, plan: Plan) -> Pieces:
        """Of training samples, which are the beginnings of rows."""
        found = []
        for sample, size in enumerate(plan.sizes.tolist()):
            _, begins = self._row(plan, sample)
            inside = begins[: int(np.searchsorted(begins, size))]
            ends = np.minimum(begins[1 : len(inside) + 1], size)
            tails = (ends == begins[1 : len(ends) + 1]).astype(np.int64)
            found.append((inside == 1, ends - inside - tails, tails))
        return Pieces.listed(found)

    def rows(self, plan: Plan) -> Rows:
        vocabulary = self.corpus.vocabulary
        out = np.full((len(plan), int(plan.sizes.max())), IGNORE, dtype=vocabulary.target_dtype)
        for sample in range(len(plan)):
            start, stop = int(plan.starts[sample]), int(plan.starts[sample] + plan.sizes[sample])
            records, begins = self._row(plan, sample)
            row = out[sample, : stop - start]
            row[:] = vocabulary.eos  # where no residue comes
            if start == 0:
                row[0] = vocabulary.bos
            for record, begin, length in zip(*self._within(records, begins, start, stop), strict=True):
                first, last = max(start - begin, 0), min(stop - begin, length)
                if first < last:
                    offset = int(self.corpus.offsets[record])
                    row[begin + first - start : begin + last - start] = self.corpus.read(offset + first, offset + last)
        return out, None

    def whole(self, clusters: Integers) -> Integers:
        """Tokens of the rows of whole families."""
        sizes = self.members.sizes(clusters)
        borders = np.cumsum(sizes) - sizes
        lengths = self.corpus.lengths(self.members.of(clusters)) + 1
        return 1 + np.add.reduceat(lengths, borders) if len(clusters) else sizes

    def _windows(self, clusters: Integers) -> Integers:
        """How many windows whole families are cut into."""
        return -(-(self.whole(clusters) - self.causal) // self.length)

    def _at(self, numbers: Integers, clusters: Integers, starts: Integers, whole: Integers) -> Plan:
        sizes = np.minimum(whole - starts, self.size)
        plan = Plan(self, numbers, clusters, starts, sizes, sizes - 1)
        if self.causal:
            return plan
        marks = 1 + self.members.sizes(clusters)
        for sample in np.flatnonzero(sizes < whole).tolist():  # which members are in the window decides
            start, stop = int(starts[sample]), int(starts[sample] + sizes[sample])
            _, begins = self._row(plan, sample)
            marks[sample] = (start == 0) + np.count_nonzero((begins[1:] > start) & (begins[1:] <= stop))
        return replace(plan, scored=masked_counts(sizes - marks))

    def _row(self, plan: Plan, sample: int) -> tuple[Integers, Integers]:
        """The members of a sample's family in their order; where each begins in the row, and where its end is.

        The last one is held: windows of a large family follow each other.
        """
        cluster = plan.records[sample : sample + 1]
        epoch = 0 if self.fixed else int(plan.numbers[sample]) // self.epoch
        key = (int(cluster[0]), epoch)
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        records = self.members.of(cluster)
        state = stream_words(words(self.seed, "family", np.array([epoch])), cluster)
        records = records[np.argsort(stream_words(state, np.arange(len(records))), kind="stable")]
        row = records, np.cumsum(np.concatenate([[1], self.corpus.lengths(records) + 1]))
        self._held = key, row
        return row

    def _within(
        self, records: Integers, begins: Integers, start: int, stop: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Members, the beginnings and lengths of those that reach into the places [start, stop) of a row."""
        first = max(int(np.searchsorted(begins, start, "right")) - 1, 0)
        last = min(int(np.searchsorted(begins, stop)), len(records))
        here = slice(first, last)
        return records[here].tolist(), begins[here].tolist(), (np.diff(begins)[here] - 1).tolist()
