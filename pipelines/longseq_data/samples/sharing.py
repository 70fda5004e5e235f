"""How a step's samples are shared out, and what gives them: the same for files that stream in and prepared corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from longseq_data.vocabulary import IGNORE, PROTEIN, Vocabulary

if TYPE_CHECKING:
    from .streaming import Sample

Arrays = dict[str, npt.NDArray]  # a batch in types as small as the tokens allow; torch wants int64
MakeBatch = Callable[[], Arrays]  # a batch is planned by every worker, and made by one


@dataclass(frozen=True)
class Share:
    """The part of one rank in every step. Raises ValueError for impossible sizes."""

    batch_sequences: int  # rows of a micro-batch
    accumulate: int  # micro-batches a step
    rank: int
    world: int

    def __post_init__(self) -> None:
        if min(self.batch_sequences, self.accumulate, self.world) < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"need batch_sequences, accumulate, world >= 1 and 0 <= rank < world, "
                f"not {self.batch_sequences}, {self.accumulate}, {self.world} and rank {self.rank}"
            )

    @property
    def rank_samples(self) -> int:
        """Samples of this rank in a step."""
        return self.accumulate * self.batch_sequences

    @property
    def step_samples(self) -> int:
        """Samples of a step, over all ranks and micro-batches."""
        return self.world * self.rank_samples


@dataclass(frozen=True)
class Training:
    """The micro-batches of a rank without end, to be shared out among workers; see batches.TrainingBatches."""

    spec: Samples
    share: Share
    start: int = 0

    def arrays(self, worker: int, workers: int) -> Iterator[Arrays]:
        one_voice = self.share.rank == 0 and worker == 0  # of many is enough to warn
        return _every(self.spec.training(self.start, self.share, one_voice), worker, workers)


@dataclass(frozen=True)
class Evaluation:
    """The batches of a rank in one pass, to be shared out among workers; see batches.EvaluationBatches."""

    spec: Samples
    share: Share
    max_samples: int | None = None

    def arrays(self, worker: int, workers: int) -> Iterator[Arrays]:
        return _every(self.spec.evaluation(self.share, self.max_samples), worker, workers)


def _every(batches: Iterator[MakeBatch], worker: int, workers: int) -> Iterator[Arrays]:
    for number, make in enumerate(batches):
        if number % workers == worker:
            yield make()


class Samples(Protocol):
    """One split of some data, as samples in an order that is a function of the settings alone."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def objective(self) -> str: ...

    @property
    def split(self) -> str | None: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def epoch_samples(self) -> int | None:
        """Training samples of one pass over the split; None where only a whole pass would tell."""
        ...

    def begin(self) -> None:
        """Begin now with what takes a while and is done once for all processes: reading files."""
        ...

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """The micro-batches of a rank without end, from the step that begins with sample ``start`` on."""
        ...

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        """The batches of a rank in one pass over the split; equally many on every rank."""
        ...

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        """How often each token is a target in an evaluation pass, (vocabulary size,): the empirical baseline."""
        ...

    def measuring(self) -> Samples:
        """The same, whose evaluation batches say what their targets stand for, where these samples can."""
        ...


def collate(samples: Sequence[Sample], rows: int, vocabulary: Vocabulary = PROTEIN) -> Arrays:
    """ "tokens" and "targets", and "segments" where samples have them, (rows, longest sample).

    Padded with the vocabulary's pad, IGNORE and -1. Rows beyond the samples are filler; without any sample they are one
    token long.
    """
    length = max((len(sample.tokens) for sample in samples), default=1)
    batch = filler(rows, length, vocabulary, segments=any(sample.segments is not None for sample in samples))
    for row, sample in enumerate(samples):
        for name, into in batch.items():
            values = getattr(sample, name)
            into[row, : len(values)] = values
    return batch


def filler(rows: int, length: int, vocabulary: Vocabulary, segments: bool) -> Arrays:
    """A batch without samples."""
    fill = {"tokens": vocabulary.pad, "targets": IGNORE, **({"segments": -1} if segments else {})}
    dtypes = {"segments": np.dtype(np.int32)}
    return {
        name: np.full((rows, length), value, dtype=dtypes.get(name, vocabulary.target_dtype))
        for name, value in fill.items()
    }
