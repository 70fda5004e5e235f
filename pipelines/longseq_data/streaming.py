"""One endless order of samples, straight from FASTA: the same for every rank, worker and resume.

The order is a pure function of a StreamSpec, so the only state of a run is how many samples it has consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .fasta import Encoder, Record, read_records
from .masking import mask_tokens, masked_count
from .packing import Piece, Window, crop, cut, document
from .randomness import generator
from .splits import split_of
from .vocabulary import EOS, VOCABULARY_SIZE

OPEN_SOURCES = 16  # read in turn while shuffling
SAMPLE_BUFFER = 2048  # records of a split among which the sample of an evaluation is drawn
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
    shuffle_buffer: int = 10_000  # records, and never more than BUFFER_RESIDUES (2^26) residues
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


def training_samples(spec: StreamSpec, start: int = 0) -> Iterator[Sample]:
    """The endless stream of training samples, from sample number ``start`` on: the plain-Python way to iterate.

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
    """The samples of one evaluation pass, at most ``max_samples`` of them: the plain-Python way to iterate.

    Which ones, and in which order, is said at evaluation_windows.
    """
    encoder = Encoder(spec.strict)
    for index, window in enumerate(evaluation_windows(spec, max_samples)):
        yield spec.sample(window, index, encoder)


def evaluation_windows(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Window]:
    """The windows of one evaluation pass, not yet tokenised.

    Without ``max_samples``: the whole split in file order. Causal: every residue and every EOS is a target exactly
    once. Masked: every residue is in exactly one window.

    With it: the first ``max_samples`` windows of a shuffled pass, in which up to OPEN_SOURCES sources take turns and
    records are drawn at random from SAMPLE_BUFFER of the split. So of a split that fits the buffer it is a uniform
    sample of the records, and of a larger one it comes in equal parts from the beginnings of several sources, chosen
    at random. It depends on the sources, the split and the way of cutting, but neither on the seed nor on the shuffle
    buffer of training, so that runs with other seeds are scored on the same records.
    """
    size, overlap = spec.length + spec.overlap, spec.overlap
    records = _in_file_order(spec) if max_samples is None else _fair_order(spec)
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

    Causal: residues and EOS. Masked: residues, masked or not. With ``max_targets``, counts the records of a sampled
    evaluation_windows, in its order, up to the one that reaches ``max_targets``.
    """
    counts = np.zeros(VOCABULARY_SIZE, dtype=np.int64)
    encoder = Encoder(spec.strict)
    seen = 0
    for record in _in_file_order(spec) if max_targets is None else _fair_order(spec):
        counts += np.bincount(encoder.encode(record), minlength=VOCABULARY_SIZE)
        counts[EOS] += spec.objective == "causal"
        seen += len(record.sequence) + (spec.objective == "causal")
        if max_targets is not None and seen >= max_targets:
            break
    return counts


def _of_split(spec: StreamSpec, records: Iterable[Record]) -> Iterator[Record]:
    seen = kept = 0
    for record in records:
        seen += 1
        if spec.split is None or split_of(record.identifier, spec.valid_fraction, spec.test_fraction) == spec.split:
            kept += 1
            yield record
    if not kept:
        raise DataError(_empty_split(spec, seen))


def _empty_split(spec: StreamSpec, seen: int) -> str:
    named = ", ".join(spec.sources[:3]) or "no file at all"
    if len(spec.sources) > 3:
        named += f" and {len(spec.sources) - 3} more ({len(spec.sources)} in all)"
    change = {
        "train": "lower data.valid_fraction or data.test_fraction",
        "valid": "raise data.valid_fraction, switch validation off (trainer.valid_every=0)",
        "test": "raise data.test_fraction",
        None: "name files",
    }[spec.split]
    return (
        f"The {spec.split or 'whole'} split of {named} is empty: none of {seen} records falls into it with "
        f"data.valid_fraction={spec.valid_fraction} and data.test_fraction={spec.test_fraction}; {change}, or give "
        f"more records."
    )


def _in_file_order(spec: StreamSpec) -> Iterator[Record]:
    return _of_split(spec, chain.from_iterable(map(read_records, spec.sources)))


def _fair_order(spec: StreamSpec) -> Iterator[Record]:
    return _shuffled_epoch(replace(spec, seed=0, shuffle_buffer=SAMPLE_BUFFER), 0)


def _shuffled_epoch(spec: StreamSpec, epoch: int) -> Iterator[Record]:
    """The records of one epoch: sources in a random order, several of them in turn, through a shuffle buffer."""
    priorities = generator(spec.seed, "sources", epoch).random(len(spec.sources))
    with closing(_in_turn([spec.sources[i] for i in np.argsort(priorities, kind="stable")])) as records:
        yield from _through_buffer(spec, epoch, _of_split(spec, records))


def _in_turn(sources: Sequence[str]) -> Generator[Record, None, None]:
    """One record of each of OPEN_SOURCES sources in turn; where one ends, the next in line takes its turns.

    So large files mix from the start, whatever the size of the shuffle buffer; small ones end before they do.
    """
    waiting = map(read_records, sources)
    turns = deque(islice(waiting, OPEN_SOURCES))
    try:
        while turns:
            records = turns.popleft()
            record = next(records, None)
            if record is None:
                turns.extend(islice(waiting, 1))
            else:
                turns.append(records)
                yield record
    finally:
        for records in turns:
            records.close()  # and with it the file


def _through_buffer(spec: StreamSpec, epoch: int, records: Iterable[Record]) -> Iterator[Record]:
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
