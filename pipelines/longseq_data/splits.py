"""Which records are trained on and which are held out: decided by their identifiers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "valid", "test"]


def split_of(identifier: str, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a record, by a hash of its identifier: it stays where it is, whatever file it comes in."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    u = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
    if u < valid_fraction:
        return "valid"
    return "test" if u < valid_fraction + test_fraction else "train"


def in_split(
    identifiers: Iterable[bytes], split: str, valid_fraction: float, test_fraction: float
) -> npt.NDArray[np.bool_]:
    """Whether each record is in ``split``: split_of in bulk, of identifiers as UTF-8."""
    hashed = hashlib.blake2b
    digests = b"".join([hashed(identifier, digest_size=8).digest() for identifier in identifiers])
    u = (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)).astype(np.float64) / 2**53
    valid, held_out = u < valid_fraction, u < valid_fraction + test_fraction
    return {"valid": valid, "test": held_out & ~valid, "train": ~(held_out | valid)}[split]
