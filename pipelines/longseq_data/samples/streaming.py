"""One endless order of samples, straight from the files: the same for every rank, worker and resume.

The order is a pure function of a StreamSpec, so the only state of a run is how many samples it has consumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from longseq_data.ingest.follow import Tell
from longseq_data.readers.documents import Document

from .infilling import Infilling
from .masking import masked_count
from .packing import Piece, Window, Windows, crop, cut, document
from .rank_share import MakeBatch, Share, Taker, even
from .rows import Arrays, Finish
from .shuffling import documents_in_file_order, leaves_of, road, shuffled_documents
from .stream_rows import Crops, Joined
from .stream_settings import StreamSettings

SAMPLE_BUFFER = 2048  # records of a split among which the sample of an evaluation is drawn


@dataclass(frozen=True)
class StreamSpec(StreamSettings):
    """The samples of one split of some files."""

    @property
    def keeps_all(self) -> bool:
        """Whether all sources have a place in the cache."""
        return road(self, leaves_of(self, 0)).keeps_all

    def begin(self) -> None:
        """See rank_share.Samples."""
        road(self, leaves_of(self, 0)).begin()

    def scored(self, window: Window) -> int:
        """How many targets the window has, known without tokenising it."""
        if self.objective == "masked":
            return masked_count(window.residues())
        return window.size() - (len(window.pieces) if self.reset else 1)

    @property
    def epoch_samples(self) -> float | None:
        """See rank_share.Samples: how many there are shows when all files have been read."""
        return self._size.samples

    @cached_property
    def _size(self) -> _Size:
        return _Size(self)

    def epochs(self, samples: int) -> dict[str, float]:
        """None: files are known whole at a step that depends on time, and the curves of a run must not."""
        return {}

    def measuring(self) -> StreamSpec:
        """The same with ``measured`` where the losses add up to the probability of text or images."""
        return replace(
            self, measured=not self.infilled and not self.reading.has_residues and self.objective == "causal"
        )

    def infilling(self) -> StreamSpec:
        """See rank_share.Samples."""
        return replace(self, infilled=True)

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        return target_counts(self, max_targets)

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """See rank_share.Samples. Raises DataError for bad data, and for a split without records."""
        return even(self.taker(start, warn), self._finish(training=True), start, share)

    def taker(self, start: int, warn: bool = False) -> Taker:
        spec = replace(self, tell=_once()) if warn else self
        return (Joined if self.packing == "concat" else Crops)(spec, start)

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        """See rank_share.Samples."""
        finish, encoder, overlap = self._finish(training=False), self.encoder, self.overlap
        windows = enumerate(evaluation_windows(self, max_samples))
        while step := list(islice(windows, share.step_samples)):
            mine = step[share.rank :: share.world]
            numbers = np.array([g for g, _ in mine], dtype=np.int64)
            taken = Windows([window for _, window in mine], numbers, encoder, self.reset)
            if self.measured:
                yield partial(_measured, finish, taken, share.batch_sequences, overlap)
            else:
                yield partial(finish.batch, taken, share.batch_sequences, {})

    def _finish(self, *, training: bool) -> Finish:
        tokens, length = self.vocabulary, self.length
        infilling = Infilling.of(self.fim_rate, self.infilled, self.seed, tokens, length, training=training)
        return Finish(self.objective, self.seed, tokens, self.reset, infilling)


class _Size:
    """How much there is in an epoch, once all blocks are in the cache."""

    def __init__(self, spec: StreamSpec) -> None:
        self._spec, self._leaves = spec, leaves_of(spec, 0)
        self._road = road(spec, self._leaves)
        self._samples: float | None = None

    @property
    def samples(self) -> float | None:
        if self._samples is None and self._road.is_whole:
            spec, records, tokens = self._spec, 0, 0
            for block in (block for leaf in self._leaves for block in self._road.kept(leaf)):
                chosen = block.lengths > 0
                if not spec.whole:
                    chosen &= spec.rule.chosen(spec.split or "", block.places(spec.rule.by))
                records += int(np.count_nonzero(chosen))
                tokens += int(block.lengths[chosen].sum())
            marks = spec.reset + spec.vocabulary.closed
            self._samples = (tokens + marks * records) / spec.length if spec.packing == "concat" else float(records)
        return self._samples


def _measured(finish: Finish, taken: Windows, rows: int, overlap: int) -> Arrays:
    """A batch that says what its targets stand for."""
    extents = [window.measure(taken.encoder, overlap) for window in taken.windows]
    facts = {name: sum(getattr(extent, name) for extent in extents) for name in ("bytes", "words")}
    return finish.batch(taken, rows, facts)


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
    return shuffled_documents(replace(spec, seed=0, shuffle_buffer=SAMPLE_BUFFER, ring=None), 0)
