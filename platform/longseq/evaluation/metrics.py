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


def bits_per_unit(loss: float, targets: int, units: int) -> float:
    """Bits a byte of text, or a dimension (colour value) of an image: all losses together, in bits, over the units.

    Args:
        loss: nats a target.
        targets: how many targets that is the mean of; for a text the ends of documents are among them.
        units: bytes, or colour values, that the targets stand for.
    """
    return loss * targets / units / math.log(2) if units else math.nan


def word_perplexity(loss: float, targets: int, words: int) -> float:
    """Perplexity a word, whatever the tokens: exp(loss · targets / words).

    Choromanski et al. 2020 call targets / words the multiplier: 1.5634, 1.5487 and 1.5359 for the train, valid and test
    splits of PG-19 under their tokenizer. Words are separated by white space.
    """
    return math.exp(min(loss * targets / words, 700.0)) if words else math.nan


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
