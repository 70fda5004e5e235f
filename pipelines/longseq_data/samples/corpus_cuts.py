"""Samples cut from a prepared corpus: for any sample number which tokens it has, computed for thousands at once.

A Plan says where samples lie and how many targets they have; reading their tokens is a second step, for those of one
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.randomness import generator, uniforms
from longseq_data.vocabulary import IGNORE

from .corpus_stream import CorpusStream
from .infilling import Pieces
from .masking import masked_counts
from .members import Members
from .order import endless_order, permutation
from .rows import Crop, Integers, Planned, Rows, Turn, mark_ends, residues_of

CHUNK = 1024  # records, or windows, planned at once in an evaluation


@dataclass(frozen=True)
class Plan(Planned):
    """Where samples lie: arrays of int64, one entry a sample."""

    PER_SAMPLE = ("numbers", "records", "starts", "sizes", "scored")
    cut: Cut
    numbers: Integers  # in the order: they decide masks
    records: Integers  # of crops
    starts: Integers  # first token: of a record's row [BOS] residues [EOS], or of the stream
    sizes: Integers  # tokens, with the one beyond the last position that a causal sample needs as a target
    scored: Integers  # targets
    turn: Turn | None = None  # which samples come the other way round; None: none does

    @staticmethod
    def joined(plans: Iterable[Plan]) -> Plan:
        parts = list(plans)
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Plan.PER_SAMPLE}
        return replace(parts[0], **joined)  # type: ignore[arg-type]

    def pieces(self) -> Pieces:
        return self.cut.pieces(self)

    def rows(self) -> Rows:
        found = self.cut.rows(self)
        return self.turn.of(found, self.numbers) if self.turn else found


class Cut(Protocol):
    """A way to cut a corpus into samples of at most ``length`` positions."""

    epoch: int  # samples

    def plan(self, samples: Integers) -> Plan:
        """Where samples of the endless order lie, by their numbers."""
        ...

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        """The samples of one pass, those with targets, numbered from 0; ``sampled``: in a random order."""
        ...

    def whole(self, samples: Integers) -> Integers:
        """Tokens of some samples before they are cut, by their numbers in an epoch that is not shuffled."""
        ...

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        """(record, first, last): the ordinary tokens of records that causal samples have as targets."""
        ...

    def pieces(self, plan: Plan) -> Pieces:
        """What the training samples of a plan have of documents."""
        ...

    def rows(self, plan: Plan) -> Rows:
        """The samples of a plan: see rows.Taken."""
        ...


class Crops:
    """One record a sample: its row [BOS] residues [EOS], or ``length`` positions of it. Pictures have no EOS.

    members: of which each epoch takes one of a cluster; None: all records. An evaluation takes all in any case.
    """

    def __init__(
        self, corpus: Corpus, length: int, objective: str, seed: int, crop: str, members: Members | None = None
    ) -> None:
        self.corpus, self.length, self.seed, self.crop = corpus, length, seed, crop
        self.form = Crop(length, objective == "causal", 1 + corpus.vocabulary.closed)
        self.members = members
        self.epoch = members.count if members else len(corpus)

    def plan(self, samples: Integers) -> Plan:
        if self.members:
            records = self.members.records(samples, self.seed)
        else:
            records = endless_order(samples, self.epoch, self.seed)
        where = uniforms(self.seed, "crop", samples) if self.crop == "random" else None
        return self._at(samples, records, self.form.starts(self.corpus.lengths(records), where))

    def whole(self, samples: Integers) -> Integers:
        return self.corpus.lengths(samples) + self.form.ends

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        number = 0
        total = len(self.corpus)
        for first in range(0, total, CHUNK):
            records = np.arange(first, min(first + CHUNK, total))
            if sampled:
                records = permutation(total, 0, 0)(records)
            starts = np.zeros_like(records)
            if self.crop == "random":  # all of it
                windows = -(-(self.corpus.lengths(records) + self.form.ends - self.form.causal) // self.length)
                starts = (np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)) * self.length
                records = np.repeat(records, windows)
            plan = self._at(np.zeros_like(records), records, starts)
            plan = numbered(plan[plan.scored > 0], number)
            number += len(plan)
            yield plan

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        first, last = residues_of(plan.starts + 1, plan.sizes - 1, self.corpus.lengths(plan.records))
        yield from zip(plan.records.tolist(), first.tolist(), last.tolist(), strict=True)

    def pieces(self, plan: Plan) -> Pieces:
        lengths = self.corpus.lengths(plan.records)
        first, last = residues_of(plan.starts, plan.sizes, lengths)
        return Pieces.one_each(plan.starts == 0, last - first, plan.starts + plan.sizes == lengths + 2)

    def rows(self, plan: Plan) -> Rows:
        out = np.empty((len(plan), int(plan.sizes.max())), dtype=self.corpus.vocabulary.target_dtype)
        length = self.corpus.lengths(plan.records)
        first, last = residues_of(plan.starts, plan.sizes, length)
        begun = plan.starts == 0
        # Residues begin at column 1 after a BOS, and at 0 elsewhere. So that all rows can be gathered alike, those with
        # a BOS take the token before the record along, which BOS then covers; before the first record there is none.
        begins = self.corpus.offsets[plan.records] + first - begun
        edge = np.flatnonzero(begins < 0)
        sizes = last - first + begun
        begins[edge] += 1
        sizes[edge] -= 1
        self.corpus.gather(begins, sizes, out, IGNORE)
        for row in edge.tolist():
            out[row, 1 : last[row] + 1] = self.corpus.read(0, int(last[row]))
        mark_ends(out, plan.starts, plan.sizes, length, self.corpus.vocabulary)
        return out, None

    def _at(self, numbers: Integers, records: Integers, starts: Integers) -> Plan:
        lengths = self.corpus.lengths(records)
        sizes = self.form.sizes(starts, lengths)
        return Plan(self, numbers, records, starts, sizes, self.form.scored(starts, sizes, lengths))


class Joined:
    """All records joined and cut: every window full, an epoch is once round the stream from an offset of its own.

    The last window of an epoch reaches into what its first one has had: less than ``length`` tokens come twice.
    """

    def __init__(self, corpus: Corpus, length: int, objective: str, seed: int, reset: bool) -> None:
        self.corpus, self.length, self.seed, self.reset = corpus, length, seed, reset
        self.causal = objective == "causal"
        self.size = length + self.causal
        self.stream = CorpusStream(corpus, reset)
        self.epoch = -(-self.stream.total // length)
        self._offset = lru_cache(maxsize=16)(self._drawn_offset)

    def __reduce__(self) -> tuple[Any, ...]:
        objective = "causal" if self.causal else "masked"
        return Joined, (self.corpus, self.length, objective, self.seed, self.reset)

    def plan(self, samples: Integers) -> Plan:
        epochs = samples // self.epoch
        offsets = np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            offsets[epochs == epoch] = self._offset(epoch)
        windows = endless_order(samples, self.epoch, self.seed)
        starts = (offsets + windows * self.length) % self.stream.total
        return self._at(samples, starts, np.full_like(starts, self.size))

    def whole(self, samples: Integers) -> Integers:
        return np.full_like(samples, self.size)

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        # A pass begins with EOS, which stands before all other records too; see streaming.evaluation_windows. With
        # reset each document has its BOS.
        first = 0 if self.reset else -1
        tokens = self.stream.total - first
        windows = -(-(tokens - self.causal) // self.length)
        number = 0
        for begin in range(0, windows, CHUNK):
            chosen = np.arange(begin, min(begin + CHUNK, windows))
            if sampled:
                chosen = permutation(windows, 0, 0)(chosen)
            starts = chosen * self.length
            plan = self._at(np.zeros_like(starts), starts + first, np.minimum(tokens - starts, self.size))
            plan = numbered(plan[plan.scored > 0], number)  # a lone EOS at the end has nothing to predict it from
            number += len(plan)
            yield plan

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        begins = np.maximum(plan.starts + 1, 0)
        ends = plan.starts + plan.sizes
        firsts, lasts = self.stream.record_at(begins), self.stream.record_at(ends - 1)
        for begin, end, first, last in zip(*(each.tolist() for each in (begins, ends, firsts, lasts)), strict=True):
            for record in range(first, last + 1):
                base = int(self.corpus.offsets[record]) + self.stream.marks * record + self.stream.bos
                length = int(self.corpus.lengths(record))
                yield record, min(max(begin - base, 0), length), min(max(end - base, 0), length)

    def pieces(self, plan: Plan) -> Pieces:
        return Pieces.listed(map(self.stream.pieces, plan.starts.tolist(), plan.sizes.tolist()))

    def rows(self, plan: Plan) -> Rows:
        shape = (len(plan), int(plan.sizes.max()))
        whole = plan.sizes.min() == shape[1] and plan.starts.min() >= 0
        out = np.full(shape, IGNORE, dtype=self.corpus.vocabulary.target_dtype)
        segments = np.full(shape, -1, dtype=np.int32) if self.reset else None
        if whole:
            self.stream.fill(plan.starts, out, segments)
            return out, segments
        for i, (start, size) in enumerate(zip(plan.starts.tolist(), plan.sizes.tolist(), strict=True)):
            begun = int(start < 0)
            if begun:
                out[i, 0] = self.corpus.vocabulary.eos
            here = np.s_[i : i + 1, begun:size]
            self.stream.fill(np.array([start + begun]), out[here], None if segments is None else segments[here])
        return out, segments

    def _drawn_offset(self, epoch: int) -> int:
        return int(generator(self.seed, "offset", epoch).random() * self.stream.total)

    def _at(self, numbers: Integers, starts: Integers, sizes: Integers) -> Plan:
        ends = starts + sizes
        if not self.causal:
            residues = self.stream.residues_before(ends) - self.stream.residues_before(np.maximum(starts, 0))
            scored = masked_counts(residues)
        elif self.reset:  # no document tells how the next one begins
            documents = self.stream.documents_before(ends) - self.stream.documents_before(starts + 1) + 1
            scored = sizes - documents
        else:
            scored = sizes - 1
        return Plan(self, numbers, np.zeros_like(starts), starts, sizes, scored)


def rounds(plans: Iterable[Plan], size: int, most: int | None) -> Iterator[Plan]:
    """The same samples, ``size`` at a time, and ``most`` of them in all."""
    held: list[Plan] = []
    count = 0  # in ``held``
    left = most
    for plan in plans:
        part = plan if left is None else plan[:left]
        left = None if left is None else left - len(part)
        held.append(part)
        count += len(part)
        if count >= size or left == 0:
            whole = Plan.joined(held)
            for first in range(0, count - count % size, size):
                yield whole[first : first + size]
            held, count = [whole[count - count % size :]], count % size
        if left == 0:
            break
    if count:
        yield Plan.joined(held)


def numbered(plan: Plan, first: int) -> Plan:
    """With numbers from ``first`` on."""
    return replace(plan, numbers=np.arange(first, first + len(plan)))
