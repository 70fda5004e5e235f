"""From the tokens of some samples to a batch: the one place where rows get inputs, targets and padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import uniforms
from longseq_data.vocabulary import IGNORE, Vocabulary, backwards, reverse_complement

from .infilling import Infilling, Pieces
from .masking import mask_rows, masked_counts

Integers = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]  # a batch in types as small as the tokens allow; torch wants int64
P = TypeVar("P", bound="Planned")
Rows = tuple[npt.NDArray[np.integer], "npt.NDArray[np.int32] | None"]


def check_choices(spec: object, **choices: Sequence[object]) -> None:
    """Raise ValueError for a field with another value than the choices that it has."""
    for name, known in choices.items():
        if getattr(spec, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {getattr(spec, name)!r}")


class Chosen(Protocol):
    """Some samples, as a plan: which tokens they have, but not yet the tokens."""

    @property
    def numbers(self) -> Integers: ...  # in the order: they decide masks

    def __len__(self) -> int: ...

    def rows(self) -> Rows:
        """Tokens, (B, longest sample), with the one beyond the last position that a causal sample needs as a target,
        and IGNORE after the end of a sample. The document of each token from 0 on, and -1 after the end; or None.
        """
        ...


class Taken(Chosen, Protocol):
    """Samples of a training: it is known how many targets they have."""

    @property
    def scored(self) -> Integers: ...

    def pieces(self) -> Pieces:
        """What each sample has of documents."""
        ...

    def __getitem__(self, which: slice | Integers) -> Taken: ...


class Turning(Protocol):
    """What of a spec says which samples are turned."""

    @property
    def seed(self) -> int: ...
    @property
    def packing(self) -> str: ...
    @property
    def reset(self) -> bool: ...
    @property
    def reverse(self) -> float: ...
    @property
    def reverse_complement(self) -> bool: ...
    @property
    def vocabulary(self) -> Vocabulary: ...


class Planned:
    """What dataclasses that are Taken share. ``PER_SAMPLE``: their arrays that have an entry for each sample."""

    PER_SAMPLE: ClassVar[tuple[str, ...]] = ("numbers",)
    numbers: Integers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self: P, which: slice | Integers | np.ndarray) -> P:
        return replace(self, **{name: getattr(self, name)[which] for name in self.PER_SAMPLE})  # type: ignore[type-var]


@dataclass(frozen=True)
class Finish:
    """What makes inputs and targets of tokens."""

    objective: str  # "causal" or "masked"
    seed: int  # of masks
    vocabulary: Vocabulary
    segments: bool  # whether rows have them
    infilling: Infilling | None = None  # of causal samples

    def scored(self, taken: Taken) -> Integers:
        """Targets of training samples."""
        if self.infilling is None:
            return taken.scored
        return self.infilling.scored(taken.pieces(), taken.numbers, self.segments)

    def batch(self, taken: Chosen, rows: int, facts: Mapping[str, int]) -> Arrays:
        """ "tokens" and "targets", and "segments" where there are any, (rows, longest sample), and the facts.

        Padded with the vocabulary's pad, IGNORE and -1. Rows beyond the samples are all padding.
        """
        batch = self._filled(taken) if len(taken) else self._filler(rows, 1)
        if 0 < len(taken) < rows:
            rest = self._filler(rows - len(taken), batch["tokens"].shape[1])
            batch = {name: np.concatenate([array, rest[name]]) for name, array in batch.items()}
        return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}

    def _filled(self, taken: Chosen) -> Arrays:
        tokens, segments = taken.rows()
        middles = None
        if self.infilling is not None:
            tokens, segments, middles = self.infilling.rows(tokens, segments, taken.numbers)
        padded = tokens.dtype.kind == "i" and bool((tokens[:, -1] < 0).any())
        batch: Arrays
        if self.objective == "masked":
            if padded:
                tokens = np.where(tokens < 0, tokens.dtype.type(self.vocabulary.pad), tokens)
            inputs, targets = mask_rows(tokens, self.seed, taken.numbers, self.vocabulary)
            batch = {"tokens": inputs, "targets": targets}
        else:
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}  # views of one array: half as much to hand on
            if padded:
                pad = tokens.dtype.type(self.vocabulary.pad)
                batch["tokens"] = np.where(batch["targets"] < 0, pad, batch["tokens"])
            if segments is not None:  # no document tells how the next one begins
                begins = segments[:, 1:] != segments[:, :-1]
                targets = batch["targets"].astype(self.vocabulary.target_dtype, copy=False)
                batch["targets"] = np.where(begins, targets.dtype.type(IGNORE), targets)
                segments = np.where(segments[:, 1:] < 0, np.int32(-1), segments[:, :-1])
            if self.infilling is not None and middles is not None:  # marks of the layout are given, and not predicted
                targets = batch["targets"]
                given = ~middles[:, 1:] if self.infilling.middles else targets >= self.infilling.vocabulary.prefix
                batch["targets"] = np.where(given, targets.dtype.type(IGNORE), targets)
        return batch if segments is None else {**batch, "segments": segments}

    def _filler(self, rows: int, length: int) -> Arrays:
        """A batch without samples."""
        fill = {"tokens": self.vocabulary.pad, "targets": IGNORE, **({"segments": -1} if self.segments else {})}
        return {
            name: np.full((rows, length), value, np.int32 if name == "segments" else self.vocabulary.target_dtype)
            for name, value in fill.items()
        }


@dataclass(frozen=True)
class Crop:
    """How rows [BOS] residues [EOS] are cut down to ``length`` positions."""

    length: int
    causal: bool
    ends: int = 2  # marks of a row: BOS, and EOS where documents are closed

    @property
    def size(self) -> int:
        """Tokens at most: a causal sample needs the target of its last position."""
        return self.length + self.causal

    def starts(self, lengths: Integers, where: npt.NDArray[np.float64] | None) -> Integers:
        """The first token of each; where: in [0, 1), None: at the beginning."""
        slack = np.maximum(lengths + self.ends - self.size, 0)
        return np.zeros_like(slack) if where is None else (where * (slack + 1)).astype(np.int64)

    def sizes(self, starts: Integers, lengths: Integers) -> Integers:
        return np.minimum(lengths + self.ends - starts, self.size)

    def scored(self, starts: Integers, sizes: Integers, lengths: Integers) -> Integers:
        first, last = residues_of(starts, sizes, lengths)
        return sizes - 1 if self.causal else masked_counts(last - first)


def residues_of(starts: Integers, sizes: Integers, lengths: Integers) -> tuple[Integers, Integers]:
    """The residues [first, last) among the tokens [start, start + size) of a row [BOS] residues [EOS]."""
    first = np.maximum(starts, 1) - 1
    return first, np.maximum(first, np.minimum(starts + sizes - 1, lengths))


def mark_ends(
    rows: npt.NDArray[Any], starts: Integers, sizes: Integers, lengths: Integers, vocabulary: Vocabulary
) -> None:
    """Write the BOS and EOS of crops whose residues are in ``rows``."""
    rows[starts == 0, 0] = vocabulary.bos
    ended = np.flatnonzero(starts + sizes == lengths + 2)
    rows[ended, sizes[ended] - 1] = vocabulary.eos


class Turn(NamedTuple):
    """Which training samples come the other way round, a function of seed and number, and what they are then."""

    seed: int
    what: str
    share: float
    way: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]  # of the tokens of a sample
    moves: bool = False  # whether its documents come in the other order

    def of(self, found: Rows, numbers: Integers) -> Rows:
        """Rows, some of which are turned in place; what is behind an end stays."""
        rows, segments = found
        for row in np.flatnonzero(uniforms(self.seed, self.what, numbers) < self.share).tolist():
            real = rows[row] >= 0
            rows[row, real] = self.way(rows[row, real])
            if self.moves and segments is not None:
                own = segments[row, real]
                segments[row, real] = own[-1] - own[::-1]
        return rows, segments


def turn_of(spec: Turning) -> Turn | None:
    """How some of a spec's training samples are turned; None: none is."""
    if spec.reverse_complement:
        return Turn(spec.seed, "strand", 0.5, reverse_complement)
    if spec.reverse:
        marks = "documents" if spec.reset else "joined" if spec.packing == "concat" else "ends"
        return Turn(spec.seed, "reverse", spec.reverse, partial(backwards, spec.vocabulary, marks), moves=True)
    return None
