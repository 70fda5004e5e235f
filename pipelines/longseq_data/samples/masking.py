"""BERT's masking (Devlin et al., arXiv 1810.04805, section 3.1) over residues, bytes, or whatever tokens stand for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import stream_words, words
from longseq_data.vocabulary import IGNORE, PROTEIN, Tokens, Vocabulary

FRACTION = 0.15  # of the ordinary tokens are predicted; of these
MASKED = 0.8  # read MASK,
RANDOM = 0.1  # a random replacement (of proteins: a standard amino acid), and the rest themselves

BLOCK = 1 << 17  # tokens at once, so that all steps find them in the cache of a core
HALF = np.uint64(0xFFFFFFFF)
HIDDEN, REPLACED = (np.uint64(share * 2**32) for share in (MASKED, MASKED + RANDOM))  # of a word of 32 bits
LAST = np.uint32(0xFFFFFFFF)  # no ordinary position has this word


def masked_count(ordinary: int) -> int:
    """How many of ``ordinary`` positions mask_tokens chooses: 15 %, and one where there is any."""
    return max(1, round(FRACTION * ordinary)) if ordinary else 0


def masked_counts(ordinary: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """masked_count of each entry."""
    return np.where(ordinary > 0, np.maximum(np.rint(FRACTION * ordinary), 1), 0).astype(np.int64)


def mask_tokens(
    tokens: Tokens, seed: int, index: int, vocabulary: Vocabulary = PROTEIN
) -> tuple[Tokens, npt.NDArray[np.signedinteger]]:
    """(inputs, targets) of one sample, both shaped as ``tokens``: see mask_rows."""
    inputs, targets = mask_rows(tokens[None], seed, np.array([index]), vocabulary)
    return inputs[0], targets[0]


def mask_rows(
    tokens: npt.NDArray[np.integer], seed: int, numbers: npt.NDArray[np.int64], vocabulary: Vocabulary = PROTEIN
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.signedinteger]]:
    """(inputs, targets), both shaped as ``tokens``, (B, W); row i is sample ``numbers[i]``.

    A row is a pure function of its tokens, the seed and its number, whatever is around it. Special tokens are
    never chosen. ``targets`` holds the token at each chosen position and IGNORE elsewhere.
    """
    width = tokens.shape[1]
    inputs = np.array(tokens, order="C")
    targets = np.full(tokens.shape, IGNORE, dtype=vocabulary.target_dtype)
    flat_inputs, flat_targets = inputs.ravel(), targets.ravel()
    chosen_keys, fates = words(seed, "mask", numbers), words(seed, "mask fate", numbers)
    rows = max(1, BLOCK // max(1, width))
    for first in range(0, len(tokens), rows):
        here = slice(first, first + rows)
        chosen = _chosen(tokens[here] < vocabulary.ordinary, chosen_keys[here])
        counts = np.count_nonzero(chosen, axis=1)
        places = np.flatnonzero(chosen)
        drawn = stream_words(np.repeat(fates[here], counts), places - np.repeat(np.arange(len(counts)) * width, counts))
        places += first * width
        old = flat_inputs[places]
        flat_targets[places] = old
        fate = drawn >> np.uint64(32)
        replacement = ((drawn & HALF) * np.uint64(vocabulary.replacements)) >> np.uint64(32)
        new = np.where(fate < REPLACED, replacement.astype(tokens.dtype), old)
        new[fate < HIDDEN] = vocabulary.mask
        flat_inputs[places] = new
    return inputs, targets


def _chosen(ordinary: npt.NDArray[np.bool_], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Of each row the positions with the smallest of independent random words: a uniformly chosen set."""
    count = masked_counts(np.count_nonzero(ordinary, axis=1))
    width = ordinary.shape[1]
    pairs = stream_words(keys[:, None], np.arange((width + 1) // 2))  # of 64 bits: two words each
    drawn = pairs.astype("<u8", copy=False).view("<u4")[:, :width]
    drawn = np.where(ordinary, np.minimum(drawn, LAST - 1), LAST)
    limit = np.sort(drawn, axis=1)[np.arange(len(drawn)), np.maximum(count - 1, 0)]
    chosen = (drawn <= limit[:, None]) & (count > 0)[:, None]
    for row in np.flatnonzero(np.count_nonzero(chosen, axis=1) != count).tolist():  # the last word twice: in 10^5 rows
        alike = np.flatnonzero(drawn[row] == limit[row])
        chosen[row, alike[len(alike) - (np.count_nonzero(chosen[row]) - count[row]) :]] = False
    return chosen
