"""One endless order of samples, straight from the files: the same for every rank, worker and resume.

The order is a pure function of a StreamSpec, so the only state of a run is how many samples it has consumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longseq_data.ingest.follow import Tell
from longseq_data.randomness import uniforms
from longseq_data.readers.documents import Document, DocumentEncoder, Extent
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.splits import SplitRule
from longseq_data.vocabulary import IGNORE, Tokens, Vocabulary, reverse_complement

from . import cropped_tokens, joined_tokens
from .chunks import Chunk
from .masking import mask_tokens, masked_count
from .packing import Piece, Window, crop, cut, document
from .sharing import Arrays, MakeBatch, Share, collate, filler
from .shuffling import documents_in_file_order, endless, leaves_of, road, shuffled_chunks, shuffled_documents

SAMPLE_BUFFER = 2048  # records of a split among which the sample of an evaluation is drawn


class Sample(NamedTuple):
    """``tokens`` and ``targets`` have the same length; a target is IGNORE where nothing is scored."""

    tokens: Tokens
    targets: npt.NDArray[np.signedinteger]
    segments: npt.NDArray[np.int32] | None = None  # of a spec with reset: the document of each token, from 0
    extent: Extent | None = None  # of a measured spec: what the scored tokens stand for


@dataclass(frozen=True)
class StreamSpec:
    """Everything that the samples and their order depend on."""

    sources: tuple[str, ...]  # as expand_sources gives them; see ``reading``
    split: str | None  # "train", "valid" or "test"; None: every record
    valid_fraction: float  # of the records, by a hash: see ``split_by``
    test_fraction: float
    length: int  # tokens that the model sees at once
    packing: str  # "crop": one record one sample; "concat": records joined by EOS, cut into full windows
    objective: str  # "causal" or "masked"
    seed: int
    shuffle_buffer: int = 10_000  # records, and never more than BUFFER_RESIDUES (2^26) residues
    strict: bool = False  # refuse letters outside the alphabet instead of mapping them to X, and text that is not UTF-8
    reading: Reading = FASTA  # the sources' format, and what their tokens are
    reset: bool = False  # "concat": documents [BOS] ... [EOS] that do not see each other, with segment numbers
    crop: str = "random"  # "crop": where a record longer than the window is cropped, "random" or its "first" tokens
    split_by: str = "id"  # or "sequence", of records that have residues: see splits.SplitRule
    reverse_complement: bool = False  # of DNA: half of the training samples come as the other strand
    measured: bool = False  # samples know how many bytes and words their targets stand for; slower, for evaluation
    later_epochs: str = "buffer"  # the order after the first: through the buffer as well, or a "permutation" of all
    # records, which needs a cache
    cache: str | None = None  # the folder of the sources' blocks; None: every reader parses for itself
    tell: Tell | None = field(default=None, compare=False)  # gets what is worth a warning

    def __post_init__(self) -> None:
        if self.later_epochs not in ("buffer", "permutation"):
            raise ValueError(f"later_epochs must be 'buffer' or 'permutation', not {self.later_epochs!r}")
        if self.crop not in ("random", "first"):
            raise ValueError(f"crop must be 'random' or 'first', not {self.crop!r}")
        if self.reset and self.packing != "concat":
            raise ValueError("reset is about concatenated documents: packing must be 'concat'")
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
    def rule(self) -> SplitRule:
        by = self.split_by if self.reading.has_residues else "id"
        return SplitRule(self.valid_fraction, self.test_fraction, by)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.reading.vocabulary

    @property
    def whole(self) -> bool:
        """Whether all records are of the split."""
        return self.split is None or (self.split == "train" and not self.valid_fraction and not self.test_fraction)

    @property
    def encoder(self) -> DocumentEncoder:
        """What turns this stream's windows into tokens."""
        return DocumentEncoder(self.vocabulary)

    @property
    def keeps_all(self) -> bool:
        """Whether all sources have a place in the cache."""
        return road(self, leaves_of(self, 0)).keeps_all

    def begin(self) -> None:
        """See sharing.Samples."""
        road(self, leaves_of(self, 0)).begin()

    @property
    def overlap(self) -> int:
        """Tokens that a window has beyond ``length``: a causal one needs the target of its last position."""
        return 1 if self.objective == "causal" else 0

    def scored(self, window: Window) -> int:
        """How many targets the window has, known without tokenising it."""
        if self.objective == "masked":
            return masked_count(window.residues())
        return window.size() - (len(window.pieces) if self.reset else 1)

    def sample(self, window: Window, index: int, encoder: DocumentEncoder, training: bool = False) -> Sample:
        """Tokenise a window; ``index`` is its number in the stream, which decides its mask and, in training, strand."""
        tokens = window.tokens(encoder)
        if training and self.reverse_complement and float(uniforms(self.seed, "strand", index)) < 0.5:
            tokens = reverse_complement(tokens)
        segments = window.segments() if self.reset else None
        extent = window.measure(encoder, self.overlap) if self.measured else None
        if self.objective == "masked":
            return Sample(*mask_tokens(tokens, self.seed, index, self.vocabulary), segments, extent)
        targets = tokens[1:].astype(self.vocabulary.target_dtype)
        if segments is not None:
            targets[segments[1:] != segments[:-1]] = IGNORE  # no document tells how the next one begins
            segments = segments[:-1]
        return Sample(tokens[:-1], targets, segments, extent)

    @property
    def epoch_samples(self) -> None:
        """See sharing.Samples: how many there are shows when all files have been read."""
        return None

    def measuring(self) -> StreamSpec:
        """The same with ``measured`` where the losses add up to the probability of text or images."""
        return replace(self, measured=not self.reading.has_residues and self.objective == "causal")

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        return target_counts(self, max_targets)

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """See sharing.Samples. Raises DataError for bad data, and for a split without records."""
        spec = replace(self, tell=_once()) if warn else self
        if self.reading.tokens == "protein" and not self.reset and not self.measured:
            bulk = joined_tokens if self.packing == "concat" else cropped_tokens
            yield from bulk.training(spec, start, share)
        encoder = self.encoder
        windows = enumerate(training_windows(spec, start), start)
        consumed = start
        while True:
            consumed += share.step_samples
            mine = [(g, window) for g, window in islice(windows, share.step_samples) if g % share.world == share.rank]
            facts = {"step_targets": sum(self.scored(window) for _, window in mine), "samples": consumed}
            for first in range(0, len(mine), share.batch_sequences):
                rows = mine[first : first + share.batch_sequences]
                yield partial(self._batch, rows, share.batch_sequences, encoder, facts, training=True)

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        """See sharing.Samples."""
        encoder = self.encoder
        windows = enumerate(evaluation_windows(self, max_samples))
        while rows := list(islice(windows, share.step_samples)):
            yield partial(self._batch, rows[share.rank :: share.world], share.batch_sequences, encoder, {})

    def _batch(
        self,
        windows: list[tuple[int, Window]],
        rows: int,
        encoder: DocumentEncoder,
        facts: dict[str, int],
        training: bool = False,
    ) -> Arrays:
        samples = [self.sample(window, g, encoder, training) for g, window in windows]
        batch = collate(samples, rows, self.vocabulary) if samples else filler(rows, 1, self.vocabulary, self.reset)
        if self.measured:
            extents = [sample.extent for sample in samples if sample.extent is not None]
            facts = {
                **facts,
                "bytes": sum(extent.bytes for extent in extents),
                "words": sum(extent.words for extent in extents),
            }
        return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}


def training_samples(spec: StreamSpec, start: int = 0) -> Iterator[Sample]:
    """The endless stream of training samples, from sample number ``start`` on: the plain-Python way to iterate.

    Raises DataError for bad data, and for a split without records.
    """
    encoder = spec.encoder
    for index, window in enumerate(training_windows(spec, start), start):
        yield spec.sample(window, index, encoder, training=True)


def training_windows(spec: StreamSpec, start: int = 0) -> Iterator[Window]:
    """The windows of training_samples, not yet tokenised; number ``start`` comes first.

    Windows before ``start`` cost reading the blocks' lengths, and whole epochs nothing beyond the first one.
    """
    if spec.packing == "concat":
        joined = _documents_joined if spec.reset else _joined
        yield from cut(joined(spec, start * spec.length), spec.length + spec.overlap, spec.overlap)
        return
    size = spec.length + spec.overlap
    for index, (record, _) in enumerate(_endless(spec, start, lambda record: 1), start):
        whole = document(record)
        cropped = whole.stop > size and spec.crop == "random"
        where = float(uniforms(spec.seed, "crop", index)) if cropped else 0.0
        yield crop(whole, size, where)


def evaluation_samples(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Sample]:
    """The samples of one evaluation pass, at most ``max_samples`` of them: the plain-Python way to iterate.

    Which ones, and in which order, is said at evaluation_windows.
    """
    encoder = spec.encoder
    for index, window in enumerate(evaluation_windows(spec, max_samples)):
        yield spec.sample(window, index, encoder)


def evaluation_windows(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Window]:
    """The windows of one evaluation pass, not yet tokenised.

    Without ``max_samples``: the whole split in file order. Causal: every residue and every EOS is a target exactly
    once. Masked: every residue is in exactly one window. With crop="first", of the first window of each record.

    With it: the first ``max_samples`` windows of a shuffled pass, in which up to OPEN_SOURCES sources take turns and
    records are drawn at random from SAMPLE_BUFFER of the split. So of a split that fits the buffer it is a uniform
    sample of the records, and of a larger one it comes in equal parts from the beginnings of several sources, chosen
    at random. It depends on the sources, the split and the way of cutting, but neither on the seed nor on the shuffle
    buffer of training, so that runs with other seeds are scored on the same records.
    """
    size, overlap = spec.length + spec.overlap, spec.overlap
    records = documents_in_file_order(spec) if max_samples is None else _fair_order(spec)
    windows: Iterable[Window]
    pieces: Iterable[Piece]
    if spec.packing == "concat":
        pieces = map(document, records)
        if not spec.reset:
            # EOS before every record, the first one too. That is what training shows before a record, the end of the
            # one before; BOS is one token of the whole training here, and of a prepared corpus none. What samples and
            # scores single records begins with EOS as well, so the same text has the same probability everywhere.
            pieces = (piece._replace(start=min(number, 1), joined=True) for number, piece in enumerate(pieces))
        windows = cut(pieces, size, overlap)
    elif spec.crop == "first":
        windows = (crop(document(record), size, 0.0) for record in records)
    else:
        windows = (window for record in records for window in cut([document(record)], size, overlap))
    # a masked window without residues (a lone EOS at the end) has nothing to score
    return islice((window for window in windows if spec.scored(window)), max_samples)


def target_counts(spec: StreamSpec, max_targets: int | None = None) -> npt.NDArray[np.int64]:
    """How often each token is a target in an evaluation pass, shape (vocabulary size,): the empirical baseline.

    Causal: residues and EOS. Masked: residues, masked or not. With ``max_targets``, counts the records of a sampled
    evaluation_windows, in its order, up to the one that reaches ``max_targets``.
    """
    counts = np.zeros(spec.vocabulary.size, dtype=np.int64)
    encoder = spec.encoder
    causal = spec.objective == "causal"
    seen = 0
    for record in documents_in_file_order(spec) if max_targets is None else _fair_order(spec):
        targets = Window((document(record),))
        if spec.packing == "crop" and spec.crop == "first":
            targets = crop(document(record), spec.length + spec.overlap, 0.0)
        tokens = targets.tokens(encoder)[1:] if causal else targets.tokens(encoder)
        if not causal:
            tokens = tokens[tokens < spec.vocabulary.ordinary]
        counts += np.bincount(tokens, minlength=spec.vocabulary.size)
        seen += len(tokens)
        if max_targets is not None and seen >= max_targets:
            break
    return counts


def _once() -> Tell:
    """A warning for each sentence, the first time that it comes."""
    said: set[str] = set()

    def tell(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            logging.getLogger("longseq_data").warning("%s", sentence)

    return tell


def _fair_order(spec: StreamSpec) -> Iterator[Document]:
    return shuffled_documents(replace(spec, seed=0, shuffle_buffer=SAMPLE_BUFFER), 0)


def _endless(spec: StreamSpec, skip: int, size: Callable[[Document], int]) -> Iterator[tuple[Document, int]]:
    """Shuffled epochs without end, from position ``skip`` on, where a record takes ``size(record)`` positions.

    Yields (record, positions of it that are still to be skipped): the second is 0 but for the first record.
    """

    def positions(chunk: Chunk) -> npt.NDArray[np.int64]:
        return np.array([size(record) for record in chunk.items.tolist()], dtype=np.int64)

    for chunk, rest in endless(partial(shuffled_chunks, spec), skip, positions):
        for record in chunk.items.tolist():
            yield record, rest
            rest = 0


def _joined(spec: StreamSpec, skip: int) -> Iterator[Piece]:
    """The stream BOS, residues EOS, residues EOS, ... from token ``skip`` on."""
    first = 0 if skip == 0 else 1
    for record, rest in _endless(spec, max(skip - 1, 0), lambda record: record.length + record.closed):
        yield Piece(record, first + rest, document(record).stop)
        first = 1


def _documents_joined(spec: StreamSpec, skip: int) -> Iterator[Piece]:
    """The stream BOS residues EOS, BOS residues EOS, ... from token ``skip`` on."""
    for record, rest in _endless(spec, skip, lambda record: document(record).stop):
        yield document(record)._replace(start=rest)
