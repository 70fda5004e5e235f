"""Batches on their way from a worker process: in small types, and each piece of memory once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sharing import Arrays


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
    bases: list[npt.NDArray]
    views: dict[str, View]
    numbers: dict[str, int]


def pack(arrays: Arrays) -> Parcel:
    """The arrays of a batch, whatever their integer types. Inputs and targets are often two views of one array."""
    bases: list[npt.NDArray] = []
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


def unpack(parcel: Parcel, pin_memory: bool = False) -> dict[str, Tensor]:
    """The batch as int64 tensors; ``pin_memory``: each contiguous, in memory that a GPU can fetch by itself."""
    batch = {name: torch.tensor(number) for name, number in parcel.numbers.items()}
    bases = [torch.from_numpy(base) for base in parcel.bases]
    if pin_memory:
        for name, view in parcel.views.items():
            batch[name] = torch.empty(view.shape, dtype=torch.int64, pin_memory=True).copy_(view.of(bases))
    else:
        wide = [base.long() for base in bases]
        batch.update({name: view.of(wide) for name, view in parcel.views.items()})
    return batch
