"""Which records are trained on and which are held out: decided by their identifiers alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "valid", "test"]


LOOKED_AT = 100_000  # identifiers that are told apart
_RENAME = """awk '/^>/{print ">r" ++n " " substr($0, 2); next} 1' OLD > NEW"""


def split_of(identifier: str, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a record, by a hash of its identifier: it stays where it is, whatever file it comes in."""
    return _split(_place(identifier), valid_fraction, test_fraction)


def _place(identifier: str) -> float:
    """Where a record stands in [0, 1)."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _split(place: float, valid_fraction: float, test_fraction: float) -> Split:
    if place < valid_fraction:
        return "valid"
    return "test" if place < valid_fraction + test_fraction else "train"


@dataclass
class Identifiers:
    """What the identifiers of some records say of their splits, and of fractions that would do."""

    records: int = 0
    splits: Counter[Split] = field(default_factory=Counter)
    first: str = ""
    places: set[float] = field(default_factory=set)  # of the first LOOKED_AT different ones

    def add(self, identifier: str, valid_fraction: float, test_fraction: float) -> None:
        place = _place(identifier)
        self.first = self.first or identifier
        self.records += 1
        self.splits[_split(place, valid_fraction, test_fraction)] += 1
        if len(self.places) < LOOKED_AT:
            self.places.add(place)

    @property
    def repeated(self) -> bool:
        """Whether most records have an identifier that others have too."""
        return len(self.places) < LOOKED_AT and 2 * len(self.places) < self.records

    def lost(
        self, split: Split, valid: float, test: float, prefix: str = "data.", otherwise: str = "", fixed: bool = False
    ) -> str:
        """Why a split is empty and what fills it, as a sentence without its end's period.

        prefix: of the keys valid_fraction and test_fraction. otherwise: what else can be done. fixed: the
        fractions cannot be changed any more.
        """
        shown = self.first[:40]
        name = {"train": "training", "valid": "validation", "test": "test"}[split]
        if self.records == 1:
            return f"one record ('{shown}') cannot be both trained on and held out: {otherwise}"
        why = (
            f"the hash of the identifiers puts none of the {self.records:,} records into {name} with "
            f"{prefix}valid_fraction={valid:g} and {prefix}test_fraction={test:g}"
        )
        if self.repeated:
            why += (
                f"; they have only {len(self.places):,} different identifiers"
                if len(self.places) > 1
                else (f"; all of them have the identifier '{shown}'")
            )
            why += (
                " (in FASTA the first word after '>', in a table its id, else the name of the file): give each record "
                f"its own, FASTA by {_RENAME}"
            )
        change = None if fixed else self._filling(split, valid, test)
        if change is not None:
            words = [
                f"{prefix}{key}={now:.8g}"
                for key, now, old in (("valid_fraction", change[0], valid), ("test_fraction", change[1], test))
                if now != old
            ]
            return f"{why}{', or' if self.repeated else ':'} set {' and '.join(words)}, or {otherwise}"
        return f"{why}{', or' if self.repeated else ':'} {otherwise}"

    def _filling(self, split: Split, valid: float, test: float) -> tuple[float, float] | None:
        """Fractions with which no split is empty that is asked for, as near as can be; None: there are none."""
        places = sorted(self.places)
        for digits in (1e3, 1e5, 1e7):
            lowest = (int(places[0] * digits) + 1) / digits
            if split == "test":
                nearest = min((place for place in places if place >= valid), default=1.0)
                tried = [(valid, (int((nearest - valid) * digits) + 1) / digits)]
            else:
                tried = [(lowest, test), (lowest, 0.0)] if split == "train" or valid < lowest else [(valid, 0.0)]
            for fractions in tried:
                found = {_split(place, *fractions) for place in places}
                if {"train", "valid", split} <= found and sum(fractions) < 1:
                    return fractions
        return None


def places(identifiers: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """Where each record stands in [0, 1), by its identifier as UTF-8: what the splits are shares of."""
    hashed = hashlib.blake2b
    digests = b"".join([hashed(identifier, digest_size=8).digest() for identifier in identifiers])
    return (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)).astype(np.float64) / 2**53


def in_split(
    places: npt.NDArray[np.float64], split: str, valid_fraction: float, test_fraction: float
) -> npt.NDArray[np.bool_]:
    """Whether each record is in ``split``: split_of in bulk."""
    valid, held_out = places < valid_fraction, places < valid_fraction + test_fraction
    return {"valid": valid, "test": held_out & ~valid, "train": ~(held_out | valid)}[split]
