"""Protein chains with what is known of their structure: a JSON object on each line. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from longseq.errors import LongseqError
from longseq_data.os_errors import explained
from longseq_data.randomness import generator

STATES = "HE-"  # helix, strand, anything else: DSSP's eight states in three

Item = TypeVar("Item")
Contacts = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Chain:
    """A sequence, and what the file says of it.

    Attributes:
        contacts: (pairs, 2), i < j, counted from 0; None: not given.
        states: a letter of ``STATES`` for each residue; None: not given.
    """

    id: str
    sequence: str
    contacts: npt.NDArray[np.int64] | None
    states: str | None

    def contact_map(self) -> Contacts:
        """(L, L), above the diagonal."""
        assert self.contacts is not None
        found = np.zeros((len(self.sequence),) * 2, dtype=bool)
        found[self.contacts[:, 0], self.contacts[:, 1]] = True
        return found


def read_chains(path: Path, needed: str) -> list[Chain]:
    """The chains of a file.

    Args:
        path: on each line an object with id, sequence, contacts ([[i, j], ...], counted from 0) and secondary_structure
            ("HHE-..."); other keys are left alone.
        needed: contacts or secondary_structure, which every line must have.

    Raises:
        LongseqError: for a file that cannot be read, and a line that is no such object; naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON's texts may hold Unicode's other line ends
    except OSError as error:
        raise LongseqError(f"{explained(error, path, 'cannot be read')}.") from None
    except UnicodeDecodeError:
        raise LongseqError(f"{path}: not text; give a file with a JSON object on each line.") from None
    chains = [_chain(line, f"{path}, line {number}", needed) for number, line in enumerate(lines, 1) if line.strip()]
    ids = [chain.id for chain in chains]
    twice = next((id_ for id_ in ids if ids.count(id_) > 1), None)
    if twice is not None:
        raise LongseqError(f"{path}: two chains are called {twice}; give each an id of its own.")
    if not chains:
        raise LongseqError(f"{path}: no chain in it; give a file with a JSON object on each line.")
    return chains


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, at equal distances and in their order; 0: all."""
    count = min(most or len(items), len(items))
    return [items[number * len(items) // count] for number in range(count)]


def folds(number: int, train: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Which chains are learned from and which are then tested: every chain is tested, by what ``train`` others teach.

    Returns:
        (learned from, tested), indices; of n chains about n / (n − train) pairs.

    Raises:
        LongseqError: where no chain would be left to test.
    """
    if not 0 < train < number:
        raise LongseqError(f"{number} chains, and {train} to learn from (--train): leave at least one to test.")
    order = generator(seed, "chains").random(number).argsort(kind="stable").tolist()
    size = number - train
    found = []
    for start in range(0, number, size):
        tested = order[start : start + size]
        others = [index for index in order if index not in set(tested)]
        found.append((others[:train], tested))
    return found


def _chain(line: str, place: str, needed: str) -> Chain:
    try:
        row = json.loads(line)
        id_, sequence = row["id"], row["sequence"].upper()
        whole = sequence and isinstance(row[needed], str if needed == "secondary_structure" else list)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise LongseqError(f"{place}: no JSON object with id, sequence and {needed}; correct the line.")
    states, contacts = row.get("secondary_structure"), row.get("contacts")
    if states is not None and (
        not isinstance(states, str) or len(states) != len(sequence) or set(states) - set(STATES)
    ):
        raise LongseqError(
            f"{place}: secondary_structure of {id_} must have one of {', '.join(STATES)} for each of its "
            f"{len(sequence)} residues."
        )
    return Chain(str(id_), sequence, None if contacts is None else _pairs(contacts, len(sequence), place), states)


def _pairs(pairs: Any, length: int, place: str) -> npt.NDArray[np.int64]:
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        good = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and 0 <= i < length for i in pair)
        if not good or pair[0] == pair[1]:
            raise LongseqError(f"{place}: the contact {pair} is no pair of residues from 0 to {length - 1}.")
    return np.sort(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=1)
