"""Which cluster a record belongs to, by a table of (representative, member) as MMseqs2 and UniRef write it.

The table may be larger than memory: hashes of its names are spread over files by their first bits, each of which is
sorted for itself, and looked up where they lie. A row takes 16 bytes, or 32 where a name holds an accession.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longseq_data.errors import DataError

from .held_out import Words, accession, hashes, lines

BITS = 8
ROWS = 1 << 18  # of the table in memory at a time
PAIR = np.dtype([("member", "<u8"), ("cluster", "<u8")])


@dataclass(frozen=True)
class ClusterTable:
    """path: of a .npy of PAIR, sorted by members."""

    path: Path

    def of(self, identifiers: list[str]) -> Words:
        """The hash of each record's cluster; a record that is not listed is a cluster of its own.

        A record is found by its identifier or by the accession in it, as in held_out.
        """
        return self.look_up(identifiers)[0]

    def look_up(self, identifiers: list[str]) -> tuple[Words, int]:
        """The same, and how many of the records are listed."""
        table = np.load(self.path, mmap_mode="r")
        bare = hashes(map(accession, identifiers))
        found, anywhere = bare.copy(), np.zeros(len(bare), dtype=bool)
        for names in (bare, hashes(identifiers)):  # the identifier goes before the accession
            if not table.size:
                break
            places = np.minimum(np.searchsorted(table["member"], names), table.size - 1)
            listed = table["member"][places] == names
            found[listed] = table["cluster"][places[listed]]
            anywhere |= listed
        return found, int(anywhere.sum())


def read_clusters(source: str, path: Path) -> int:
    """Write the table of a TSV to ``path``, and give the number of its rows.

    Raises DataError for a file that cannot be read, a row without two names, and a member of two clusters.
    """
    rows = 0
    folder = path.parent / f"{path.stem}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03d}" for number in range(1 << BITS)]
    with ExitStack() as stack:
        handles = [stack.enter_context(file.open("wb")) for file in files]
        pairs = _pairs(source)
        while some := list(islice(pairs, ROWS)):
            rows += len(some)
            clusters = hashes(accession(representative) for representative, _ in some)
            named = np.rec.fromarrays([hashes(member for _, member in some), clusters], dtype=PAIR)
            bare = np.rec.fromarrays([hashes(accession(member) for _, member in some), clusters], dtype=PAIR)
            both = np.concatenate([named, bare[bare["member"] != named["member"]]])
            first = both["member"] >> np.uint64(64 - BITS)
            order = np.argsort(first, kind="stable")
            borders = np.searchsorted(first[order], np.arange((1 << BITS) + 1, dtype=np.uint64))
            for number, handle in enumerate(handles):
                handle.write(both[order[borders[number] : borders[number + 1]]].tobytes())
    if not rows:
        raise DataError(f"{source}: clusters has no rows; write a representative, a tab and a member on each line.")
    parts = (np.unique(np.fromfile(file, dtype=PAIR)) for file in files)
    with path.open("wb") as handle:
        kept = 0
        _write_header(handle, 0)
        for part in parts:
            twice = int((part["member"][1:] == part["member"][:-1]).sum())
            if twice:
                raise DataError(
                    f"{source}: {twice:,} members or more belong to two clusters each; give each member one cluster."
                )
            kept += part.size
            handle.write(part.tobytes())
        handle.seek(0)
        _write_header(handle, kept)
    for file in files:
        file.unlink()
    folder.rmdir()
    return rows


def _write_header(handle: BinaryIO, rows: int) -> None:
    """Of a length that does not depend on ``rows``: NumPy leaves room for the digits of a larger first axis."""
    description = {"descr": np.lib.format.dtype_to_descr(PAIR), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(handle, description)


def _pairs(source: str) -> Iterator[tuple[str, str]]:
    for number, line in lines(source):
        cells = line.rstrip("\n").split("\t")
        if not line.strip():
            continue
        names = [cell.strip().lstrip(">").split(None, 1)[0] for cell in cells[:2] if cell.strip()]
        if len(names) < 2:
            raise DataError(
                f"{source}, line {number}: a row needs a representative and a member, separated by a tab; correct it."
            )
        yield names[0], names[1]
