"""Labelled sequences as samples: whole, each with its label in the place of targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count

import numpy as np

from longseq_data.readers.label_table import OF_CLASSES, PER_RESIDUE, Labelled, LabelSpec
from longseq_data.vocabulary import IGNORE, Vocabulary

from .order import endless_order, samples_of_rank
from .rank_share import MakeBatch, Share
from .rows import Arrays, Integers


@dataclass(frozen=True)
class LabelledSamples:
    """One split of a table. Batches are as those of TrainingBatches, but for

        tokens   (B, L): the mark ``begins``, the sequence, EOS
        targets  (B, L), each at its residue, or (B, 1): ids of classes; or the bits of a float32, (number − center) /
                 scale. IGNORE, which as a float32 is NaN, where there is no label.

    split: train, valid or test; None: every row.
    """

    spec: LabelSpec
    split: str | None
    vocabulary: Vocabulary
    begins: int  # the token before a sequence
    seed: int  # of the order
    center: float = 0.0
    scale: float = 1.0

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.spec.source,)

    @cached_property
    def rows(self) -> Labelled:
        return self.spec.read()

    def __len__(self) -> int:
        return len(self.rows.of(self.split))

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over the split after so many samples."""
        return {"": samples / len(self)}

    def begin(self) -> None:
        """Tables are read at once."""

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """The micro-batches of a rank without end: an epoch is a permutation of the rows, drawn anew."""
        chosen = np.array(self.rows.of(self.split))
        size = share.batch_sequences
        for first in count(start, share.step_samples):
            numbers = samples_of_rank(first, share.step_samples, share.rank, share.world)
            rows = chosen[endless_order(numbers, len(chosen), self.seed)]
            facts = {"step_targets": sum(self._scored(row) for row in rows), "samples": first + share.step_samples}
            for micro in range(share.accumulate):
                yield partial(self.batch, rows[micro * size : (micro + 1) * size], size, facts)

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        """The batches of a rank in one pass; equally many on every rank."""
        chosen = np.array(self.rows.of(self.split)[:max_samples])
        together = share.batch_sequences * share.world
        for first in range(0, len(chosen), together):
            yield partial(
                self.batch, chosen[first : first + together][share.rank :: share.world], share.batch_sequences
            )

    def batch(self, rows: Integers, size: int, facts: dict[str, int] | None = None) -> Arrays:
        """Rows by their numbers; what is missing of ``size`` is padding."""
        found = self.rows
        sequences = [found.sequences[row] for row in rows]
        length = max((len(sequence) + 2 for sequence in sequences), default=2)
        residues = self.spec.task in PER_RESIDUE
        tokens = np.full((size, length), self.vocabulary.pad, dtype=self.vocabulary.target_dtype)
        targets = np.full((size, length if residues else 1), IGNORE, dtype=np.int32)
        for number, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            end = 1 + len(sequence)
            tokens[number, : end + 1] = [self.begins, *sequence, self.vocabulary.eos]
            targets[number, slice(1, end) if residues else slice(None)] = self._targets(row)
        return {"tokens": tokens, "targets": targets} | {k: np.array(v, np.int64) for k, v in (facts or {}).items()}

    def _targets(self, row: int) -> Integers:
        labels = self.rows.labels[row]
        if self.spec.task in OF_CLASSES:
            return labels
        bits = ((labels - self.center) / self.scale).astype(np.float32).view(np.int32)
        return np.where(np.isnan(labels), IGNORE, bits)

    def _scored(self, row: int) -> int:
        return int((self._targets(row) != IGNORE).sum())
