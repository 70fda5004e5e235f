"""The records of a corpus as one stream of tokens: where each document lies in it, and windows cut from it.

Two streams. Crossing: residues EOS, residues EOS, ... With ``reset``: BOS residues EOS, BOS residues EOS, ..., as
documents that do not see each other need it. Everything is computed from the corpus's offsets, for any place.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq_data.corpus.corpus import Corpus

Integers = npt.NDArray[np.int64]


class CorpusStream:
    """``total`` tokens; record r begins at offsets[r] + r · marks, of which ``marks`` are BOS or EOS.

    Places count from 0. Windows may reach beyond the end, where the stream begins again.
    """

    def __init__(self, corpus: Corpus, reset: bool) -> None:
        self.corpus = corpus
        self.bos = int(reset)  # tokens before each document
        self.marks = self.bos + 1
        self._borders = memoryview(corpus.offsets)  # type: ignore[arg-type]  # for loops, faster than the array
        self.total = corpus.tokens + self.marks * len(corpus)

    def record_at(self, places: npt.ArrayLike) -> Integers:
        """The record that each place in [0, total] belongs to; its EOS belongs to it. Of ``total``: len(corpus)."""
        wanted = np.asarray(places, dtype=np.int64)
        low, high = np.zeros_like(wanted), np.full_like(wanted, len(self.corpus))
        offsets = self.corpus.offsets
        for _ in range(len(self.corpus).bit_length()):  # the last record that begins at the place or before it
            middle = (low + high + 1) >> 1
            here = offsets[middle] + self.marks * middle <= wanted
            low, high = np.where(here, middle, low), np.where(here, high, middle - 1)
        return low

    def documents_before(self, places: Integers) -> Integers:
        """How many documents begin before each place, in a stream that goes round."""
        rounds, rest = np.divmod(places - 1, self.total)
        return rounds * len(self.corpus) + self.record_at(rest) + 1

    def residues_before(self, places: Integers) -> Integers:
        """How many ordinary tokens stand before each place, in a stream that goes round."""
        rounds, rest = np.divmod(places, self.total)
        records = self.record_at(rest)
        offsets = self.corpus.offsets
        into = rest - offsets[records] - self.marks * records - self.bos
        length = offsets[np.minimum(records + 1, len(self.corpus))] - offsets[records]
        return rounds * self.corpus.tokens + offsets[records] + np.clip(into, 0, length)

    def pieces(self, start: int, size: int) -> tuple[Integers, Integers, Integers]:
        """What the places from ``start`` on have of each document: marks before, ordinary tokens, marks behind."""
        found, done = [], 0
        while done < size:
            place = (start + done) % self.total
            until = min(size, done + self.total - place)
            first = self._record(place, 0, len(self.corpus))
            last = self._record(place + until - done - 1, first, len(self.corpus))
            begins = self.corpus.offsets[first : last + 2] + (np.arange(first, last + 2) * self.marks - place)
            borders = np.stack([begins[:-1], begins[:-1] + self.bos, begins[1:] - 1, begins[1:]])
            found.append(np.diff(np.clip(borders, 0, until - done), axis=0))
            done = until
        heads, plain, tails = np.concatenate(found, 1)
        return heads, plain, tails

    def fill(self, starts: Integers, out: npt.NDArray[Any], segments: npt.NDArray[Any] | None = None) -> None:
        """Row i of ``out``, (B, size): the places from starts[i] on. ``segments``: numbers of documents, from 0."""
        size = out.shape[1]
        if not self.bos and segments is None:
            inside = np.flatnonzero(starts + size <= self.total)
            if inside.size == len(out):
                self.corpus.stream_window(starts, size, out)
                return
        for i, start in enumerate(starts.tolist()):
            done = document = 0
            while done < size:  # once, but for a window across the end
                place = (start + done) % self.total
                until = min(size, done + self.total - place)
                numbers = self._piece(place, out[i, done:until])
                if segments is not None:
                    segments[i, done:until] = numbers - numbers[0] + document
                    document = int(segments[i, until - 1]) + 1
                done = until

    def _piece(self, start: int, row: npt.NDArray[Any]) -> Integers:
        """The places from ``start`` on into ``row``; the record of each."""
        size = row.size
        first = self._record(start, 0, len(self.corpus))
        last = self._record(start + size - 1, first, min(len(self.corpus), first + size))
        offsets = self.corpus.offsets[first : last + 2]
        begins = offsets + (np.arange(first, last + 2) * self.marks - start)
        inside = np.ones(size, dtype=bool)
        marks = [(begins[1:] - 1, self.corpus.vocabulary.eos), (begins[:-1], self.corpus.vocabulary.bos)]
        for places, token in marks[: self.marks]:
            here = places[(places >= 0) & (places < size)]
            row[here] = token
            inside[here] = False
        residues = int(np.count_nonzero(inside))
        flat = min(int(offsets[0]) + max(0, -int(begins[0]) - self.bos), int(offsets[1]))
        row[inside] = self.corpus.read(flat, flat + residues)
        return np.repeat(np.arange(first, last + 1), np.diff(np.clip(begins, 0, size)))

    def _record(self, place: int, low: int, high: int) -> int:
        """record_at for one place whose record is in [low, high)."""
        borders = self._borders
        return bisect_right(range(high), place, low, key=lambda r: borders[r] + self.marks * r) - 1
