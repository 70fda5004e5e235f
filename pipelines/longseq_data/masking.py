"""BERT's masking (Devlin et al., arXiv 1810.04805, section 3.1) over residues, bytes, or whatever tokens stand for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .randomness import generator
from .vocabulary import IGNORE, PROTEIN, Tokens, Vocabulary

FRACTION = 0.15  # of the ordinary tokens are predicted; of these
MASKED = 0.8  # read MASK,
RANDOM = 0.1  # a random replacement (of proteins: a standard amino acid), and the rest themselves


def masked_count(ordinary: int) -> int:
    """How many of ``ordinary`` positions mask_tokens chooses: 15 %, and one where there is any."""
    return max(1, round(FRACTION * ordinary)) if ordinary else 0


def masked_counts(ordinary: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """masked_count of each entry."""
    return np.where(ordinary > 0, np.maximum(np.rint(FRACTION * ordinary), 1), 0).astype(np.int64)


def mask_tokens(
    tokens: Tokens, seed: int, index: int, vocabulary: Vocabulary = PROTEIN
) -> tuple[Tokens, npt.NDArray[np.signedinteger]]:
    """(inputs, targets), both shaped as ``tokens``: a pure function of (tokens, seed, index).

    Special tokens are never chosen. ``targets`` holds the token at each chosen position and IGNORE elsewhere.
    """
    rng = generator(seed, "mask", index)
    inputs = tokens.copy()
    targets = np.full(tokens.shape, IGNORE, dtype=vocabulary.target_dtype)
    ordinary = np.flatnonzero(tokens < vocabulary.ordinary)
    count = masked_count(ordinary.size)
    if not count:
        return inputs, targets
    # the `count` smallest of independent uniforms stand at a uniformly chosen set of positions
    chosen = np.sort(ordinary[np.argpartition(rng.random(ordinary.size), count - 1)[:count]])
    fate = rng.random(count)
    replacement = (rng.random(count) * vocabulary.replacements).astype(tokens.dtype)
    targets[chosen] = tokens[chosen]
    inputs[chosen] = np.where(
        fate < MASKED, vocabulary.mask, np.where(fate < MASKED + RANDOM, replacement, tokens[chosen])
    )
    return inputs, targets
