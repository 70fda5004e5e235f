"""Which records form the out-of-distribution split: by a list of ids, or by Pfam families.

A record is found by its id or by the accession in it: P12345 in "sp|P12345|NAME_HUMAN", in "UniRef50_P12345" and in the
isoform "P12345-2". Names are compared by 64-bit hashes, so millions of them take 8 bytes each.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.randomness import generator
from longseq_data.readers.sources import reading_error

from .config import PFAM, PrepareConfig

UNIREF = re.compile(r"UniRef\d+_")
# https://www.uniprot.org/help/accession_numbers
ISOFORM = re.compile(r"([OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2})-\d+")

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class HeldOut:
    """names: hashes of the listed names, sorted. families: the Pfam families that they come from."""

    names: Words
    families: tuple[str, ...] = ()

    def holds(self, names: list[bytes]) -> npt.NDArray[np.bool_]:
        """Which of the records are listed, shape (len(names),)."""
        found = np.zeros(len(names), dtype=bool)
        if self.names.size:
            identifiers = [name.decode() for name in names]
            bare = list(map(accession, identifiers))
            for known in (identifiers, bare, [ISOFORM.sub(r"\1", name) for name in bare]):
                found |= np.isin(hashes(known), self.names)
        return found


def hashes(names: Iterable[str]) -> Words:
    """The 64-bit BLAKE2b hash of each name, which also decides its split (see splits.split_of)."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def accession(identifier: str) -> str:
    """The accession in an identifier of UniProt ("db|ACC|ENTRY") or UniRef ("UniRef50_ACC"); else the identifier."""
    parts = identifier.split("|")
    return parts[1] if len(parts) > 2 else UNIREF.sub("", identifier)


def read_held_out(config: PrepareConfig) -> HeldOut:
    """Read the lists that ``config`` names.

    Raises DataError for a file that cannot be read, an empty list, a family that no record of the map has, and more
    families asked for than there are.
    """
    families: tuple[str, ...] = tuple(sorted(set(config.ood_pfam)))
    if config.ood_pfam_map is not None and config.ood_pfam_random:
        families = _draw(config.ood_pfam_map, config.ood_pfam_random, config.seed)
    parts = [np.empty(0, dtype=np.uint64)]
    if config.ood_ids is not None:
        parts += _hashed(_ids(config.ood_ids))
    if config.ood_pfam_map is not None:
        parts += _hashed(_members(config.ood_pfam_map, frozenset(families)))
    return HeldOut(np.unique(np.concatenate(parts)), families)


def _hashed(names: Iterator[str]) -> Iterator[Words]:
    while some := list(islice(names, 65_536)):
        yield hashes(some)
        yield hashes(map(accession, some))


def _ids(path: str) -> Iterator[str]:
    """The first word of each line, without the '>' of a header; '#' begins a comment."""
    empty = True
    for _, line in lines(path):
        words = line.partition("#")[0].lstrip(">").split()
        if words:
            empty = False
            yield words[0]
    if empty:
        raise DataError(f"{path}: ood_ids has no ids; write one a line.")


def _draw(path: str, count: int, seed: int) -> tuple[str, ...]:
    families = sorted({family for _, families in _pfam_rows(path) for family in families})
    if len(families) < count:
        raise DataError(f"{path}: ood_pfam_random={count}, and the file has {len(families)} families; lower it.")
    order = np.argsort(generator(seed, "held-out families").random(len(families)), kind="stable")
    return tuple(sorted(families[i] for i in order[:count]))


def _members(path: str, wanted: frozenset[str]) -> Iterator[str]:
    met: set[str] = set()
    for name, families in _pfam_rows(path):
        if not wanted.isdisjoint(families):
            met |= wanted.intersection(families)
            yield name
    if lost := sorted(wanted - met):
        raise DataError(f"{path}: no record belongs to {', '.join(lost)} of ood_pfam; correct it.")


def _pfam_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """(id, its Pfam accessions) of each row. Without a header the first two columns are taken."""
    entry, pfam, first = 0, 1, True
    for number, line in lines(path):
        if not line.strip():
            continue
        cells = line.rstrip("\n").split("\t")
        titles = [cell.strip().lower() for cell in cells]
        if first and "pfam" in titles:
            pfam = titles.index("pfam")
            entry = titles.index("entry") if "entry" in titles else 0
            first = False
            continue
        first = False
        if len(cells) <= max(entry, pfam) or not cells[entry].strip():
            raise DataError(
                f"{path}, line {number}: a row needs an id and its Pfam accessions, separated by a tab; export the "
                f"columns Entry and Pfam as TSV."
            )
        families = [family.strip().partition(".")[0] for family in cells[pfam].replace(",", ";").split(";")]
        families = [family for family in families if family]
        wrong = next((family for family in families if not PFAM.fullmatch(family)), None)
        if wrong is not None:
            raise DataError(f"{path}, line {number}: {wrong[:40]!r} is no Pfam accession; they read PF00042;PF00069;.")
        yield cells[entry].strip(), families


def lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a local file, plain or gzipped, with their numbers."""
    number = 0
    try:
        with user_path(path).open("rb") as stored:
            zipped = stored.read(2) == b"\x1f\x8b"
            stored.seek(0)
            with io.TextIOWrapper(gzip.GzipFile(fileobj=stored) if zipped else stored, "utf-8-sig") as handle:
                for number, line in enumerate(handle, 1):
                    yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path}, after line {number}: this is no text; give a file of lines.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise reading_error(path, number or None, error) from error
