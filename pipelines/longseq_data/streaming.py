"""One endless order of samples, straight from FASTA: the same for every rank, worker and resume.

The order is a pure function of a StreamSpec, so the only state of a run is how many samples it has consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .fasta import Encoder, Record, read_records
from .masking import mask_tokens, masked_count
from .packing import Piece, Window, crop, cut, document
from .randomness import generator
from .vocabulary import EOS, VOCABULARY_SIZE

Split = Literal["train", "valid", "test"]

BUFFER_RESIDUES = 1 << 26  # a shuffle buffer of whole proteomes must still fit in a worker's memory


class Sample(NamedTuple):
    """``tokens`` and ``targets`` have the same length; a target is IGNORE where nothing is scored."""

    tokens: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int16]


@dataclass(frozen=True)
class StreamSpec:
    """Everything that the samples and their order depend on."""

    sources: tuple[str, ...]  # as expand_sources gives them
    split: str | None  # "train", "valid" or "test"; None: every record
    valid_fraction: float  # of the records, by a hash of their identifiers
    test_fraction: float
    length: int  # tokens that the model sees at once
    packing: str  # "crop": one record one sample; "concat": records joined by EOS, cut into full windows
    objective: str  # "causal" or "masked"
    seed: int
    shuffle_buffer: int = 10_000  # records
    strict: bool = False  # refuse letters outside the alphabet instead of mapping them to X

    def __post_init__(self) -> None:
        if self.packing not in ("crop", "concat"):
            raise ValueError(f"packing must be 'crop' or 'concat', not {self.packing!r}")
        if self.objective not in ("causal", "masked"):
            raise ValueError(f"objective must be 'causal' or 'masked', not {self.objective!r}")
        if self.split not in ("train", "valid", "test", None):
            raise ValueError(f"split must be 'train', 'valid', 'test' or None, not {self.split!r}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, not {self.length}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 record, not {self.shuffle_buffer}")
        if min(self.valid_fraction, self.test_fraction) < 0 or self.valid_fraction + self.test_fraction > 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} must not be negative, "
                f"nor more than 1 together"
            )

    @property
    def overlap(self) -> int:
        """Tokens that a window has beyond ``length``: a causal one needs the target of its last position."""
        return 1 if self.objective == "causal" else 0

    def scored(self, window: Window) -> int:
        """How many targets the window has, known without tokenising it."""
        return window.size() - 1 if self.objective == "causal" else masked_count(window.residues())

    def sample(self, window: Window, index: int, encoder: Encoder) -> Sample:
        """Tokenise a window; ``index`` is its number in the stream, which decides its mask."""
        tokens = window.tokens(encoder)
        if self.objective == "causal":
            return Sample(tokens[:-1], tokens[1:].astype(np.int16))
        return Sample(*mask_tokens(tokens, self.seed, index))


def split_of(identifier: str, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a record, by a hash of its identifier: it stays where it is, whatever file it comes in."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    u = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
    if u < valid_fraction:
        return "valid"
    return "test" if u < valid_fraction + test_fraction else "train"


def training_samples(spec: StreamSpec, start: int = 0) -> Iterator[Sample]:
    """The endless stream of training samples, from sample number ``start`` on.

    Raises DataError for bad data, and for a split without records.
    """
    encoder = Encoder(spec.strict)
    for index, window in enumerate(training_windows(spec, start), start):
        yield spec.sample(window, index, encoder)


def training_windows(spec: StreamSpec, start: int = 0) -> Iterator[Window]:
    """The windows of training_samples, not yet tokenised; number ``start`` comes first.

    Windows before ``start`` cost parsing and hashing only, and whole epochs nothing beyond the first one.
    """
    if spec.packing == "concat":
        yield from cut(_joined(spec, start * spec.length), spec.length + spec.overlap, spec.overlap)
        return
    size = spec.length + spec.overlap
    for index, (record, _) in enumerate(_endless(spec, start, lambda record: 1), start):
        whole = document(record)
        where = generator(spec.seed, "crop", index).random() if whole.stop > size else 0.0
        yield crop(whole, size, where)


def evaluation_samples(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Sample]:
    """One pass in file order, without shuffling; at most ``max_samples`` samples.

    Causal: every residue and every EOS is a target exactly once. Masked: every residue is in exactly one sample.
    """
    encoder = Encoder(spec.strict)
    for index, window in enumerate(evaluation_windows(spec, max_samples)):
        yield spec.sample(window, index, encoder)


def evaluation_windows(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Window]:
    """The windows of evaluation_samples, not yet tokenised."""
    size, overlap = spec.length + spec.overlap, spec.overlap
    records = _of_split(spec, spec.sources)
    windows: Iterable[Window]
    if spec.packing == "concat":
        pieces = (Piece(record, min(number, 1), len(record.sequence) + 2) for number, record in enumerate(records))
        windows = cut(pieces, size, overlap)
    else:
        windows = (window for record in records for window in cut([document(record)], size, overlap))
    # a masked window without residues (a lone EOS at the end) has nothing to score
    return islice((window for window in windows if spec.scored(window)), max_samples)


def target_counts(spec: StreamSpec, max_targets: int | None = None) -> npt.NDArray[np.int64]:
    """How often each token is a target in an evaluation pass, shape (VOCABULARY_SIZE,): the empirical baseline.

    Causal: residues and EOS. Masked: residues, masked or not. Stops after the record that reaches ``max_targets``.
    """
    counts = np.zeros(VOCABULARY_SIZE, dtype=np.int64)
    encoder = Encoder(spec.strict)
    seen = 0
    for record in _of_split(spec, spec.sources):
        counts += np.bincount(encoder.encode(record), minlength=VOCABULARY_SIZE)
        counts[EOS] += spec.objective == "causal"
        seen += len(record.sequence) + (spec.objective == "causal")
        if max_targets is not None and seen >= max_targets:
            break
    return counts


def _of_split(spec: StreamSpec, sources: Sequence[str]) -> Iterator[Record]:
    seen = kept = 0
    for source in sources:
        for record in read_records(source):
            seen += 1
            if spec.split is None or split_of(record.identifier, spec.valid_fraction, spec.test_fraction) == spec.split:
                kept += 1
                yield record
    if not kept:
        change = "lower" if spec.split == "train" else "raise"
        key = "data.test_fraction" if spec.split == "test" else "data.valid_fraction"
        keys = "data.valid_fraction or data.test_fraction" if spec.split == "train" else key
        raise DataError(
            f"The {spec.split or 'whole'} split of {', '.join(sources) or 'no file at all'} is empty: none of {seen} "
            f"records falls into it with data.valid_fraction={spec.valid_fraction} and "
            f"data.test_fraction={spec.test_fraction}; {change} {keys}, or give more records."
        )


def _shuffled_epoch(spec: StreamSpec, epoch: int) -> Iterator[Record]:
    """The records of one epoch: files in a random order, records through a shuffle buffer."""
    priorities = generator(spec.seed, "sources", epoch).random(len(spec.sources))
    records = _of_split(spec, [spec.sources[i] for i in np.argsort(priorities, kind="stable")])
    random = generator(spec.seed, "shuffle", epoch).random
    buffer: list[Record] = []
    residues = 0
    for record in records:
        buffer.append(record)
        residues += len(record.sequence)
        while len(buffer) > spec.shuffle_buffer or (residues > BUFFER_RESIDUES and len(buffer) > 1):
            chosen = _take(buffer, random())
            residues -= len(chosen.sequence)
            yield chosen
    while buffer:
        yield _take(buffer, random())


def _take(buffer: list[Record], u: float) -> Record:
    i = int(u * len(buffer))
    buffer[i], buffer[-1] = buffer[-1], buffer[i]
    return buffer.pop()


def _endless(spec: StreamSpec, skip: int, size: Callable[[Record], int]) -> Iterator[tuple[Record, int]]:
    """Shuffled epochs without end, from position ``skip`` on, where a record takes ``size(record)`` positions.

    Yields (record, positions of it that are still to be skipped): the second is 0 but for the first record.
    """
    epoch, epoch_size = 0, 0
    while True:
        if epoch_size:  # every epoch has the same size, so whole ones are skipped by arithmetic
            epoch += skip // epoch_size
            skip %= epoch_size
        epoch_size = 0
        for record in _shuffled_epoch(spec, epoch):
            here = size(record)
            epoch_size += here
            if skip >= here:
                skip -= here
                continue
            yield record, skip
            skip = 0
        epoch += 1


def _joined(spec: StreamSpec, skip: int) -> Iterator[Piece]:
    """The stream BOS, residues EOS, residues EOS, ... from token ``skip`` on."""
    first = 0 if skip == 0 else 1
    for record, rest in _endless(spec, max(skip - 1, 0), lambda record: len(record.sequence) + 1):
        yield Piece(record, first + rest, len(record.sequence) + 2)
        first = 1
