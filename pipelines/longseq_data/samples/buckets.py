"""Steps of sequences of similar length, as many as a budget of tokens allows, so that little of a batch is padding.

The endless order is taken in blocks of a fixed number of samples. The samples of a block, sorted by length, are cut
into steps whose rows, padded to the longest, stay within the budget; the steps then come in a random order. Everything
is a function of the seed and the block, so a run goes on from the number of samples consumed alone, at the price of one
block's lengths.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

STEPS = 32  # a block, about: more have less padding, fewer mix lengths better


def block_samples(mean_width: float, batch_tokens: int) -> int:
    """How many samples make a block."""
    return max(1, round(STEPS * batch_tokens / mean_width))


def cut_block(widths: Integers, batch_tokens: int) -> list[Integers]:
    """The samples of a block, by their places in ``widths``, in steps: the longest first in each, and of all steps.

    rows × longest <= batch_tokens in every step. There are as few steps as possible, and the fullest is as little full
    as possible, so that no small rest is left over. Raises ValueError for a sample beyond the budget.
    """
    order = np.argsort(-widths, kind="stable")
    ordered = widths[order]
    if ordered[0] > batch_tokens:
        raise ValueError(f"a sample of {ordered[0]} tokens is more than a step's {batch_tokens}")
    fewest = len(_borders(ordered, batch_tokens))
    low, high = int(ordered[0]), batch_tokens  # a budget that may be too small, and one that is enough
    while low < high:
        middle = (low + high) // 2
        if len(_borders(ordered, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return np.split(order, _borders(ordered, high)[1:])


def _borders(widths: Integers, budget: int) -> list[int]:
    """Where steps begin, of falling widths."""
    borders, place = [], 0
    while place < len(widths):
        borders.append(place)
        place += budget // int(widths[place])
    return borders
