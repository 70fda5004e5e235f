"""UniProtKB flat text (.dat): entries as records under the header that UniProt's own FASTA gives them.

Biopython parses (https://web.expasy.org/docs/userman.html describes the format). It is shown the lines that a record
is made of and not the annotation between them, nine tenths of an entry, and every problem gets its line.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TextIO

from longseq_data.errors import DataError

from .fasta import Record
from .sources import reading_error
from .uniprot import Header

NEEDED = frozenset(("ID", "AC", "DT", "DE", "GN", "OS", "OX", "PE", "SQ", "  ", "//"))
LINE = re.compile(r"[A-Z]{2}( {3}|\s*$)|\*\*|//\s*$| {5}")  # how every line of the format begins

DATABASES = {"Reviewed": "sp", "STANDARD": "sp", "Unreviewed": "tr", "PRELIMINARY": "tr"}

EVIDENCE = re.compile(r"\s*\{[^{}]*\}")  # {ECO:0000255|HAMAP-Rule:MF_00001}
FULL_NAME = re.compile(r"(?:RecName|SubName): Full=([^;]*)")
# What the official name of an organism may have in parentheses; other parentheses hold common names and synonyms.
OFFICIAL = (
    r"strain|isolate|sero(?:type|var|group)|(?:sub|geno|bio|patho|chemo|phage )?(?:type|var)\b|type|biotype|variant|"
    r"clone|subsp|var\.|bv\.|pv\.|f\. ?sp|ecotype|cultivar|cv\.|ex |group|clade|genogroup|lineage|segment|race"
)
COMMON_NAMES = re.compile(rf"\s\((?!{OFFICIAL})[^()]*(?:\([^()]*\)[^()]*)*\)(?=[\s,.]|$)")

DAMAGED = "the file is damaged or cut; download or export it again"


def read_flat(handle: TextIO, source: str) -> Generator[Record, None, None]:
    """Stream the entries of an open .dat file; ``line`` of a record is that of its ID line.

    Raises DataError, one sentence with file and line, for what is not in the format, ends too early, or has another
    number of residues than it says.
    """
    from Bio import SwissProt

    lines = _Lines(handle, source)
    entries = SwissProt.parse(lines)
    while True:
        try:
            entry = next(entries, None)
        except DataError:
            raise
        except Exception as error:  # its own class, ValueError, AssertionError, IndexError: whatever a line provokes
            raise DataError(
                f"{source}, line {lines.number}: no UniProtKB flat text ({_said(error, lines.text)}); correct the "
                f"line, or download the file again."
            ) from error
        if entry is None:
            return
        yield _record(entry, source, lines.entry)


class _Lines:
    """The file as Biopython reads it, less the lines that are not needed; knows where it is."""

    def __init__(self, handle: TextIO, source: str) -> None:
        self.number = 0  # line handed out last
        self.text = ""
        self.entry = 0  # line where its entry began
        self._lines = self._needed(handle, source)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.text = next(self._lines)
        return self.text

    def read(self, size: int) -> str:
        """Biopython asks for 0 characters, to see that this is text."""
        return ""

    def _needed(self, handle: TextIO, source: str) -> Iterator[str]:
        inside, number = False, 0
        try:
            for number, line in enumerate(handle, 1):
                key = line[:2]
                if inside and line[-1] != "\n" and key != "//":
                    break  # half a line, perhaps
                if not LINE.match(line):
                    if not line.strip() and not inside:
                        continue
                    raise DataError(f"{source}, line {number}: no line of UniProtKB flat text; {DAMAGED}.")
                if key == "ID":
                    if inside:
                        raise DataError(
                            f"{source}, line {number}: an entry begins before the one of line {self.entry} has ended "
                            f"('//'); {DAMAGED}."
                        )
                    inside, self.entry = True, number
                elif not inside:
                    raise DataError(
                        f"{source}, line {number}: an entry must begin with an ID line, not with '{line[:2]}'; "
                        f"{DAMAGED}."
                    )
                if key in NEEDED:
                    self.number = number
                    inside = key != "//"
                    yield line
        except DataError:
            raise
        except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
            raise reading_error(source, number, error) from error
        if inside:
            raise DataError(
                f"{source}, line {number}: the file ends inside the entry of line {self.entry}, so it is truncated; "
                f"download or copy it again."
            )


def _record(entry: Any, source: str, line: int) -> Record:
    if not entry.accessions or not entry.accessions[0]:
        raise DataError(f"{source}, line {line}: entry '{entry.entry_name}' has no accession (AC line); {DAMAGED}.")
    if len(entry.sequence) != entry.sequence_length:
        raise DataError(
            f"{source}, line {line}: entry '{entry.entry_name}' has {len(entry.sequence):,} residues and says "
            f"{entry.sequence_length:,}; {DAMAGED}."
        )
    if not (entry.sequence.isascii() and entry.sequence.isalpha()):
        what = "something else than letters in its sequence" if entry.sequence else "no residues"
        raise DataError(f"{source}, line {line}: entry '{entry.entry_name}' has {what}; {DAMAGED}.")
    taxid = entry.taxonomy_id[0].strip() if entry.taxonomy_id else ""
    header = Header(
        entry.accessions[0].rstrip(";"),
        _name(entry.description),
        database=DATABASES.get(entry.data_class, "sp"),
        entry=entry.entry_name,
        taxon=_organism(entry.organism),
        taxid=int(taxid) if taxid.isascii() and taxid.isdigit() else None,
        gene=_gene(entry.gene_name),
        existence=entry.protein_existence or None,
        version=entry.sequence_update[1] if entry.sequence_update and entry.sequence_update[1] else None,
    )
    return Record(header.first_word, header.line(), entry.sequence, source, line)


def _name(description: str) -> str:
    """The recommended or submitted name, as FASTA has it. Before 2008 DE lines were that name and no more."""
    description = EVIDENCE.sub("", description)
    found = FULL_NAME.search(description)
    if not found:
        return description.removesuffix(".")
    flags = description.rpartition("Flags: ")[2] if "Flags: " in description else ""
    kind = " (Fragments)" if "Fragments" in flags else " (Fragment)" if "Fragment" in flags else ""
    return found[1].strip() + kind


def _organism(names: str) -> str | None:
    """The official name, without the common names and synonyms that follow it in parentheses."""
    # hybrids and the like had several organisms, joined by ", and"; FASTA shows them all
    return COMMON_NAMES.sub("", names.strip().removesuffix(".")).strip() or None


def _gene(names: Sequence[Mapping[str, str | list[str]]]) -> str | None:
    """The name that FASTA shows: the gene's own, else its first locus or open reading frame."""
    first = names[0] if names else {}
    for key in ("Name", "OrderedLocusNames", "ORFNames"):
        if value := first.get(key):
            return EVIDENCE.sub("", value if isinstance(value, str) else value[0]).strip()
    return None


def _said(error: Exception, line: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if line.strip() in text else f"{text}: '{line.strip()[:60]}'"
