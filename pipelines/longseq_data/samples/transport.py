"""Batches on their way from a worker process: in small types, and each piece of memory once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .rows import Arrays

if TYPE_CHECKING:
    from torch import Tensor


class View(NamedTuple):
    """A tensor over the memory of another one; strides and offset count entries."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, bases: list[Tensor]) -> Tensor:
        return bases[self.base].as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Parcel:
    bases: list[npt.NDArray[Any]]
    views: dict[str, View]
    numbers: dict[str, int]


def pack(arrays: Arrays) -> Parcel:
    """The arrays of a batch, whatever their integer types. Inputs and targets are often two views of one array."""
    bases: list[npt.NDArray[Any]] = []
    places: dict[int, int] = {}
    views: dict[str, View] = {}
    numbers: dict[str, int] = {}
    for name, array in arrays.items():
        if array.ndim == 0:
            numbers[name] = int(array)
            continue
        base = array if array.base is None else array.base
        if not isinstance(base, np.ndarray) or base.dtype != array.dtype or not base.flags.c_contiguous:
            base = array = np.array(array)
        if id(base) not in places:
            places[id(base)] = len(bases)
            bases.append(base)
        offset = (array.ctypes.data - base.ctypes.data) // array.itemsize
        strides = tuple(step // array.itemsize for step in array.strides)
        views[name] = View(places[id(base)], array.shape, strides, offset)
    return Parcel(bases, views, numbers)
