"""Which records are trained on and which are held out: a hash of the sequence, or of the identifier, decides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "valid", "test"]
Floats = npt.NDArray[np.float64]

LOOKED_AT = 100_000  # identifiers that are told apart
_RENAME = """awk '/^>/{print ">r" ++n " " substr($0, 2); next} 1' OLD > NEW"""


@dataclass(frozen=True)
class SplitRule:
    """Puts a record at a place in [0, 1): those below ``valid`` are for validation, those in the next ``test`` of it
    for the test.

    by: "sequence" hashes the residues, so that a record stays where it is in whatever file and under whatever
    identifier it comes, and identifiers may repeat. "id" hashes the identifier, as all versions before did.
    """

    valid: float
    test: float
    by: str = "id"

    def place(self, identifier: str, residues: bytes | None = None) -> float:
        """residues: ids as vocabulary.TABLE gives them, X for those it does not know; None: the record has none."""
        if self.by == "id" or residues is None:
            return _fraction(hashlib.blake2b(identifier.encode(), digest_size=8).digest())
        return _fraction(hashlib.blake2b(residues, digest_size=16).digest()[8:])

    def split(self, identifier: str, residues: bytes | None = None) -> Split:
        return self.at(self.place(identifier, residues))

    def at(self, place: float) -> Split:
        if place < self.valid:
            return "valid"
        return "test" if place < self.valid + self.test else "train"

    def chosen(self, split: str, places: Floats) -> npt.NDArray[np.bool_]:
        """Which of the places are in ``split``."""
        valid, held_out = places < self.valid, places < self.valid + self.test
        return {"valid": valid, "test": held_out & ~valid, "train": ~(held_out | valid)}[split]


def split_of(identifier: str, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a record by a hash of its identifier."""
    return SplitRule(valid_fraction, test_fraction).split(identifier)


def _fraction(digest: bytes) -> float:
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def fractions(words: npt.NDArray[np.uint64]) -> Floats:
    """The places of 64-bit hashes."""
    return (words >> np.uint64(11)).astype(np.float64) / 2**53


def identifier_places(identifiers: Iterable[bytes]) -> Floats:
    """SplitRule.place by identifiers (UTF-8), in bulk."""
    hashed = hashlib.blake2b
    digests = b"".join([hashed(identifier, digest_size=8).digest() for identifier in identifiers])
    return fractions(np.frombuffer(digests, dtype=">u8").astype(np.uint64))


def sequence_places(sequences: Iterable[bytes]) -> Floats:
    """SplitRule.place by residues, in bulk: the second half of the digest whose first half orders a corpus."""
    hashed = hashlib.blake2b
    digests = b"".join([hashed(residues, digest_size=16).digest() for residues in sequences])
    return fractions(np.frombuffer(digests, dtype=">u8")[1::2].astype(np.uint64))


@dataclass
class Identifiers:
    """What the records' places say of their splits, and of fractions that would do; and which identifiers repeat."""

    records: int = 0
    splits: Counter[Split] = field(default_factory=Counter)
    first: str = ""
    places: set[float] = field(default_factory=set)  # of the first LOOKED_AT different ones
    by: str = "id"  # what the places are hashes of
    names: set[int] = field(default_factory=set)  # hashes of the first LOOKED_AT different identifiers
    again: int = 0  # records whose identifier came before
    first_again: str = ""

    def add(self, identifier: str, rule: SplitRule, residues: Callable[[], bytes] | None = None) -> None:
        """residues: gives those of a record that has some."""
        content = residues() if residues is not None and rule.by == "sequence" else None
        by = rule if content is not None else SplitRule(rule.valid, rule.test)
        self.put(identifier, rule.place(identifier, content), by)

    def put(self, identifier: str, place: float, rule: SplitRule) -> None:
        """A record whose place is known, by ``rule``."""
        self.first = self.first or identifier
        self.by = rule.by
        self.records += 1
        self.splits[rule.at(place)] += 1
        if len(self.places) < LOOKED_AT:
            self.places.add(place)
        self.name(identifier)

    def name(self, identifier: str) -> None:
        """Look for the identifier among those before."""
        hashed = hash(identifier)
        if hashed in self.names:
            self.again += 1
            self.first_again = self.first_again or identifier
        elif len(self.names) < LOOKED_AT:
            self.names.add(hashed)

    @property
    def repeated(self) -> bool:
        """Whether most records have a place that others have too."""
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
        of = "identifiers" if self.by == "id" else "sequences"
        why = (
            f"the hash of the {of} puts none of the {self.records:,} records into {name} with "
            f"{prefix}valid_fraction={valid:g} and {prefix}test_fraction={test:g}"
        )
        if self.repeated:
            what = f"identifier '{shown}'" if self.by == "id" else "same sequence"
            why += (
                f"; they have only {len(self.places):,} different {of}"
                if len(self.places) > 1
                else f"; all of them have the {what}"
            )
        if self.repeated and self.by == "id":
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
            for shares in tried:
                found = {SplitRule(*shares).at(place) for place in places}
                if {"train", "valid", split} <= found and sum(shares) < 1:
                    return shares
        return None
