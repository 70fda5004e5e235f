"""How a step's samples are shared out, and what gives them: the same for files that stream in and prepared corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import numpy as np
import numpy.typing as npt

from longseq_data.vocabulary import Vocabulary

from .order import samples_of_rank
from .rows import Arrays, Finish, Integers, Taken

MakeBatch = Callable[[], Arrays]  # a batch is planned by every worker, and made by one


@dataclass(frozen=True)
class Share:
    """The part of one rank in every step. Raises ValueError for impossible sizes."""

    batch_sequences: int  # rows of a micro-batch
    accumulate: int  # micro-batches per step
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

    spec: Batches
    share: Share
    start: int = 0

    def arrays(self, worker: int, workers: int) -> Iterator[Arrays]:
        one_voice = self.share.rank == 0 and worker == 0  # of many is enough to warn
        return _every(self.spec.training(self.start, self.share, one_voice), worker, workers)


@dataclass(frozen=True)
class Evaluation:
    """The batches of a rank in one pass, to be shared out among workers; see batches.EvaluationBatches."""

    spec: Batches
    share: Share
    max_samples: int | None = None

    def arrays(self, worker: int, workers: int) -> Iterator[Arrays]:
        return _every(self.spec.evaluation(self.share, self.max_samples), worker, workers)


def _every(batches: Iterator[MakeBatch], worker: int, workers: int) -> Iterator[Arrays]:
    for number, make in enumerate(batches):
        if number % workers == worker:
            yield make()


class Batches(Protocol):
    """One split of some data, as batches in an order that is a function of the settings alone."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def split(self) -> str | None: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over each source after so many samples, where that is known; over a single one by the name ""."""
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


class Samples(Batches, Protocol):
    """One split of some data, whose samples have tokens for targets."""

    @property
    def objective(self) -> str: ...

    @property
    def epoch_samples(self) -> float | None:
        """Training samples of one pass over the split; None as long as nothing tells but a whole pass."""
        ...

    def taker(self, start: int, warn: bool = False) -> Taker:
        """Its training samples from number ``start`` on."""
        ...

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        """How often each token is a target in an evaluation pass, (vocabulary size,): the empirical baseline."""
        ...

    @property
    def length(self) -> int: ...

    @property
    def fim_rate(self) -> float | None:
        """Probability that a document is laid out for infilling; None: the vocabulary has no marks for it."""
        ...

    def infilling(self) -> Samples:
        """The same, whose evaluations have all documents laid out, and score what is filled in."""
        ...

    def measuring(self) -> Samples:
        """The same, whose evaluation batches say what their targets stand for, where these samples can."""
        ...


class Taker(Protocol):
    """The endless order of training samples from some number on."""

    ahead: int  # samples of a rank that may be planned at once, whatever they are

    def take(self, numbers: Integers, until: int) -> Taken:
        """Samples by their numbers, ascending. Those below ``until`` are gone through: the next call begins there."""
        ...


def even(taker: Taker, finish: Finish, start: int, share: Share) -> Iterator[MakeBatch]:
    """Samples.training in steps of equally many samples."""
    steps = max(1, taker.ahead // share.rank_samples)
    rows, samples = share.batch_sequences, steps * share.step_samples
    for first in count(start, samples):
        mine = taker.take(samples_of_rank(first, samples, share.rank, share.world), first + samples)
        scored = finish.scored(mine).reshape(steps, -1).sum(1).tolist()
        for number in range(steps * share.accumulate):
            step = number // share.accumulate
            facts = {"step_targets": scored[step], "samples": first + (step + 1) * share.step_samples}
            yield partial(finish.batch, mine[number * rows : (number + 1) * rows], rows, facts)
