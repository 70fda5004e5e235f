"""Loss, perplexity and accuracy over targets, and the empirical baseline they are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """How well targets are predicted."""

    loss: float  # nats a target
    accuracy: float  # share of targets whose most probable token is right

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}


def frequency_baseline(train: Counts, targets: Counts) -> Quality:
    """The empirical baseline of Choromanski et al. 2020 (Table 2): always predict the training frequencies.

    Args:
        train: (V,) how often each token is a target in the training data; one is added to each, so that a token
            the training data lack costs much and not infinitely much.
        targets: (V,) how often each token is a target in the data that are scored.
    """
    probabilities = (train + 1) / (train + 1).sum()
    total = max(int(targets.sum()), 1)
    return Quality(
        loss=float(-(targets * np.log(probabilities)).sum() / total),
        accuracy=float(targets[probabilities.argmax()] / total),
    )
