"""BERT's masking (Devlin et al., arXiv 1810.04805, section 3.1) over residues."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .randomness import generator
from .vocabulary import IGNORE, MASK, RESIDUES, STANDARD

FRACTION = 0.15  # of the residues are predicted; of these
MASKED = 0.8  # read MASK,
RANDOM = 0.1  # a random standard amino acid, and the rest themselves


def masked_count(residues: int) -> int:
    """How many of ``residues`` positions mask_tokens chooses: 15 %, and one where there is any."""
    return max(1, round(FRACTION * residues)) if residues else 0


def mask_tokens(
    tokens: npt.NDArray[np.uint8], seed: int, index: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]:
    """(inputs, targets), both shaped as ``tokens``: a pure function of (tokens, seed, index).

    Special tokens are never chosen. ``targets`` holds the token at each chosen position and IGNORE elsewhere.
    """
    rng = generator(seed, "mask", index)
    inputs = tokens.copy()
    targets = np.full(tokens.shape, IGNORE, dtype=np.int16)
    residues = np.flatnonzero(tokens < RESIDUES)
    count = masked_count(residues.size)
    if not count:
        return inputs, targets
    # the `count` smallest of independent uniforms stand at a uniformly chosen set of positions
    chosen = np.sort(residues[np.argpartition(rng.random(residues.size), count - 1)[:count]])
    fate = rng.random(count)
    replacement = (rng.random(count) * STANDARD).astype(np.uint8)
    targets[chosen] = tokens[chosen]
    inputs[chosen] = np.where(fate < MASKED, MASK, np.where(fate < MASKED + RANDOM, replacement, tokens[chosen]))
    return inputs, targets
