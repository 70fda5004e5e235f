"""Fill in the middle: documents laid out so that a causal model learns to write what is missing between two parts.

Of a document with residues x two places a ≤ b are drawn, and BOS x EOS becomes

    BOS PREFIX x[:a] SUFFIX x[b:] MIDDLE x[a:b] EOS

(PSM of Bavarian et al. 2022, arXiv 2207.14255). EOS ends the middle, as it ends every document. Where a window has a
part of a document only, that part is laid out: their context-level infilling (section 4.4), by which no part comes
without the others, and any sample is still found without those before it. The window gives up as many of its last
tokens as the marks take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import stream_words, words
from longseq_data.vocabulary import IGNORE, InfillVocabulary, Tokens, Vocabulary

Integers = npt.NDArray[np.int64]
Segments = npt.NDArray[np.int32]
MARKS = 3  # of a document that is laid out


@dataclass(frozen=True)
class Pieces:
    """What B samples have of each document: N pieces, one sample after another.

    Of BOS a b EOS c d and e f EOS: counts 2 1, heads 1 0 0, plain 2 2 2, tails 1 0 1.
    """

    counts: Integers  # (B,) pieces of each sample
    heads: Integers  # (N,) marks before the ordinary tokens, BOS: 0 or 1
    plain: Integers  # (N,) ordinary tokens
    tails: Integers  # (N,) marks behind them, EOS: 0 or 1

    @property
    def sizes(self) -> Integers:
        return self.heads + self.plain + self.tails

    def before(self, values: Integers) -> Integers:
        """The sum of a sample's ``values``, (N,), before each of its pieces."""
        total = np.concatenate([[0], np.cumsum(values)])
        firsts = np.cumsum(self.counts) - self.counts
        return total[:-1] - np.repeat(total[firsts], self.counts)

    def summed(self, values: Integers) -> Integers:
        """The sum of each sample's ``values``: (B,)."""
        total = np.concatenate([[0], np.cumsum(values)])
        ends = np.cumsum(self.counts)
        return total[ends] - total[ends - self.counts]

    @staticmethod
    def one_each(heads: npt.NDArray[Any], plain: Integers, tails: npt.NDArray[Any]) -> Pieces:
        """Of samples that are one document each."""
        return Pieces(np.ones_like(plain), heads.astype(np.int64), plain, tails.astype(np.int64))

    @staticmethod
    def listed(samples: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]) -> Pieces:
        """Of (heads, plain, tails) of each sample."""
        none = np.zeros(0, np.int64)
        each = [(none, none, none), *samples]  # or none could not be joined
        heads, plain, tails = (np.concatenate(part) for part in zip(*each, strict=True))
        return Pieces(np.array([len(part[0]) for part in each[1:]], np.int64), heads, plain, tails)

    @staticmethod
    def of_rows(rows: npt.NDArray[np.integer], vocabulary: Vocabulary) -> Pieces:
        """Of tokens (B, W), negative behind the end of a sample."""
        begins = rows == vocabulary.bos
        begins[:, 1:] |= rows[:, :-1] == vocabulary.eos
        begins[:, 0] = True
        real = rows >= 0
        begins &= real
        at = np.flatnonzero(begins)
        ends = np.append(at[1:], 0)[: len(at)]
        lasts = np.cumsum(begins.sum(1)) - 1  # the last piece of each row
        ends[lasts] = np.arange(len(rows)) * rows.shape[1] + real.sum(1)
        flat = rows.ravel()
        heads = (flat[at] == vocabulary.bos).astype(np.int64)
        tails = ((flat[ends - 1] == vocabulary.eos) & (ends - at > heads)).astype(np.int64)
        return Pieces(begins.sum(1), heads, ends - at - heads - tails, tails)


@dataclass(frozen=True)
class Laid:
    """Where each of N pieces comes in its sample's row of tokens, which ends after ``Infilling.size`` of them."""

    chosen: npt.NDArray[np.bool_]  # (N,) whether it is laid out; others stay as they are
    begins: Integers  # (N,) its first position in the row
    sizes: Integers  # (N,) positions that it takes, marks included; 0 behind the row's end
    cuts: Integers  # (N, 2) a and b of those that are laid out: the middle is the ordinary tokens [a, b)
    plain: Integers  # (N,) ordinary tokens of those that are laid out, as far as the row has room; 0 of others


def check_infilling(objective: str, rate: float | None) -> None:
    """Raise ValueError for a rate that is none, or of samples that are not causal."""
    if rate is not None and not (0 <= rate <= 1 and objective == "causal"):
        raise ValueError(f"fim_rate must be a probability of causal samples, not {rate} of {objective} ones")


@dataclass(frozen=True)
class Infilling:
    """Which documents are laid out, and how: a function of seed, the sample's number and the document's in it."""

    rate: float  # probability
    seed: int
    vocabulary: InfillVocabulary
    size: int  # tokens of a row at most
    middles: bool = False  # whether middles, and their ends, are the only targets

    @staticmethod
    def of(
        rate: float | None, infilled: bool, seed: int, vocabulary: Vocabulary, length: int, *, training: bool
    ) -> Infilling | None:
        """That of samples with these settings; None: they are as they are read."""
        if rate is None or not (training or infilled):
            return None
        assert isinstance(vocabulary, InfillVocabulary)
        if training:
            return Infilling(rate, seed, vocabulary, length + 1)
        return Infilling(1.0, 0, vocabulary, length + 1, middles=True)  # whatever the seed, as evaluations are

    def laid(self, pieces: Pieces, numbers: Integers) -> Laid:
        """The layout of samples with these ``numbers``, (B,). Each piece has three random numbers: whether it is laid
        out, and its two places.
        """
        sizes, heads = pieces.sizes, pieces.heads
        states = np.repeat(words(self.seed, "infill", numbers), pieces.counts)
        draws = 3 * pieces.before(np.ones_like(sizes))

        def uniform(which: int) -> npt.NDArray[np.float64]:
            return (stream_words(states, draws + which) >> np.uint64(11)) * np.float64(2.0**-53)

        chosen = (uniform(0) < self.rate) & (pieces.plain > 0)
        # One that would be left without any token is not laid out.
        chosen &= pieces.before(sizes + MARKS * chosen) + heads + MARKS < self.size
        begins = pieces.before(sizes + MARKS * chosen)
        left = np.clip(self.size - begins, 0, sizes + MARKS * chosen)
        plain = np.where(chosen, np.minimum(pieces.plain, left - heads - MARKS), 0)
        places = np.stack([uniform(1), uniform(2)], 1) * (plain[:, None] + 1)
        return Laid(chosen, begins, left, np.sort(places.astype(np.int64), 1), plain)

    def sizes(self, pieces: Pieces, numbers: Integers) -> Integers:
        """Tokens of the rows: (B,)."""
        return pieces.summed(self.laid(pieces, numbers).sizes)

    def scored(self, pieces: Pieces, numbers: Integers, segments: bool) -> Integers:
        """Targets of training samples, (B,): all tokens but the first, marks of the layout, and with ``segments`` the
        first one of each document."""
        laid = self.laid(pieces, numbers)
        given = np.where(laid.chosen, MARKS - (laid.begins + pieces.heads == 0), 0)
        return pieces.summed(laid.sizes - given - (segments & (laid.sizes > 0))) - (not segments)

    def rows(
        self, rows: npt.NDArray[np.integer], segments: Segments | None, numbers: Integers
    ) -> tuple[npt.NDArray[np.signedinteger], Segments | None, npt.NDArray[np.bool_]]:
        """Samples' tokens (B, W), documents and numbers to those that they make, (B, W'): tokens, documents, and which
        tokens are of a middle, or its end."""
        tokens, pieces = self.vocabulary, Pieces.of_rows(rows, self.vocabulary)
        laid = self.laid(pieces, numbers)
        shape = len(rows), int(pieces.summed(laid.sizes).max())
        out = np.full(shape, IGNORE, dtype=tokens.target_dtype)
        of = None if segments is None else np.full(shape, -1, dtype=np.int32)
        middles = np.zeros(shape, dtype=bool)
        origins = pieces.before(pieces.sizes)
        each = (np.repeat(np.arange(len(rows)), pieces.counts), origins, laid.begins, laid.sizes, pieces.heads)
        for row, origin, begin, size, head, is_laid, (a, b), plain in zip(
            *(values.tolist() for values in (*each, laid.chosen, laid.cuts, laid.plain)), strict=True
        ):
            if not size:
                continue
            end = begin + size
            if of is not None and segments is not None:
                of[row, begin:end] = segments[row, origin]
            if not is_laid:
                out[row, begin:end] = rows[row, origin : origin + size]
                continue
            text = rows[row, origin + head :]
            into = out[row, begin:end]
            into[:head] = tokens.bos
            into[head] = tokens.prefix
            into[head + 1 : head + 1 + a] = text[:a]
            into[head + 1 + a] = tokens.suffix
            middle = head + MARKS + plain - (b - a)
            into[head + 2 + a : middle - 1] = text[b:plain]
            into[middle - 1] = tokens.middle
            into[middle : middle + b - a] = text[a:b]
            into[middle + b - a :] = tokens.eos
            middles[row, begin + middle : end] = True
        return out, of, middles


def laid_out(
    before: Sequence[int], prefix: Sequence[int], suffix: Sequence[int], vocabulary: InfillVocabulary
) -> Tokens:
    """What a model goes on from with a middle, behind the tokens ``before`` a document."""
    marked = [*before, vocabulary.prefix, *prefix, vocabulary.suffix, *suffix, vocabulary.middle]
    return np.array(marked, dtype=vocabulary.dtype)
