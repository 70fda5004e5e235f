"""Which vectors of a record there may be, and a record with those it has. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

POOLS = ("mean", "bos", "max")
DTYPES = ("float32", "float16")
IDS = ("given", "numbered")
Layer = int | None
Vectors = npt.NDArray[np.floating]


class Embedded(NamedTuple):
    identifier: str
    length: int
    pooled: Vectors  # (E,), or (layers, E); NaN for the mean or maximum of a record without residues
    residues: Vectors | None = None  # (length, E) or (layers, length, E), of ordinary tokens; None: not asked for
    pool: str = "mean"

    @property
    def mean(self) -> Vectors:
        """``pooled``. Raises AttributeError where another pool was asked for."""
        if self.pool != "mean":
            raise AttributeError(f"pool={self.pool} was asked for, and no mean: take .pooled")
        return self.pooled


@dataclass(frozen=True)
class Wanted:
    """Which vectors of a record.

    Attributes:
        layers: 0: the embedding; k: the output of block k; None: of the last block after the final norm, which is what
            the head reads.
        several: whether results have an axis of layers.
        pool: mean or max over the residues, the mean summed in float64; bos: the vector of the token before them.
        per_residue: whether the vectors of residues are wanted, too.
        dtype: of all of them, float32 or float16.
    """

    layers: tuple[Layer, ...] = (None,)
    several: bool = False
    pool: str = "mean"
    per_residue: bool = True
    dtype: str = "float32"

    @property
    def suffixes(self) -> list[str]:
        """Behind a layer's names in a file."""
        return ["_last" if layer is None else f"_{layer}" for layer in self.layers] if self.several else [""]
