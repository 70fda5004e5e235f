"""Which records are trained on and which are held out: decided by their identifiers alone."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "valid", "test"]


def split_of(identifier: str, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a record, by a hash of its identifier: it stays where it is, whatever file it comes in."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    u = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
    if u < valid_fraction:
        return "valid"
    return "test" if u < valid_fraction + test_fraction else "train"
