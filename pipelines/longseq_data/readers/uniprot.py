"""UniProt's header lines: which protein or cluster, how many members, of which organism.

UniRef:    UniRef50_ID description n=MEMBERS Tax=NAME TaxID=ID RepID=ENTRY
UniProtKB: db|ACCESSION|ENTRY description OS=NAME OX=ID GN=GENE PE=LEVEL SV=VERSION
(https://www.uniprot.org/help/fasta-headers)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CLUSTER = re.compile(r"(UniRef[0-9]+)_.")
INTEGER = re.compile(r"-?[0-9]{1,18}")  # 18 digits fit an int64

# The usual ends of headers: parse_header reads the same TaxID from these, several times as slowly.
UNIREF = re.compile(r"UniRef[0-9]+_[^\s|]+ (?:.* )?TaxID=(-?[0-9]{1,18}) RepID=\S*")
UNIPROTKB = re.compile(r"[^\s|]+\|[^\s|]+\|[^\s|]+ .* OX=(-?[0-9]{1,18})( GN=\S*)? PE=[0-9] SV=[0-9]+")

UNIREF_KEYS = ("n", "Tax", "TaxID", "RepID")
UNIPROTKB_KEYS = ("OS", "OX", "GN", "PE", "SV")


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header line; what the line does not say is None."""

    identifier: str  # cluster id or accession; of other headers the first word
    description: str = ""  # protein or cluster name
    database: str | None = None  # "UniRef50", ...; "sp" (Swiss-Prot), "tr" (TrEMBL) or another
    entry: str | None = None  # UniProtKB's entry name, such as INS_HUMAN
    members: int | None = None  # sequences in the cluster
    taxon: str | None = None  # name of the organism, or of the cluster's lowest common taxon
    taxid: int | None = None  # NCBI Taxonomy, of the same
    representative: str | None = None  # entry name, or UniParc id (UPI...), of the cluster's shown member
    gene: str | None = None
    existence: int | None = None  # evidence, from 1 (protein level) to 5 (uncertain)
    version: int | None = None  # of the sequence

    @property
    def first_word(self) -> str:
        """What a FASTA file has between '>' and the first space."""
        if self.entry is not None:
            return f"{self.database}|{self.identifier}|{self.entry}"
        return self.identifier

    def line(self) -> str:
        """The header line that says the same, without '>'. ``parse_header`` reads it back."""
        fields: dict[str, str | int | None]
        if self.entry is not None:
            values = (self.taxon, self.taxid, self.gene, self.existence, self.version)
            fields = dict(zip(UNIPROTKB_KEYS, values, strict=True))
        else:
            fields = dict(zip(UNIREF_KEYS, (self.members, self.taxon, self.taxid, self.representative), strict=True))
        words = [self.first_word, self.description]
        words += [f"{key}={value}" for key, value in fields.items() if value is not None]
        return " ".join(" ".join(str(word) for word in words if word).split())


def parse_header(line: str) -> Header:
    """Read a header line, with or without '>'. Any text is accepted: what cannot be understood is left out.

    Values may hold spaces and '='. Where a description looks like a field, the last one in the line counts.
    """
    first, _, rest = line.removeprefix(">").replace("\t", " ").strip().partition(" ")
    parts = first.split("|")
    if len(parts) == 3 and all(parts):
        return _uniprotkb(parts, rest)
    fields = f" {rest}"
    if not CLUSTER.match(first) and (" OS=" in fields or (" OX=" in fields and " TaxID=" not in fields)):
        return _uniprotkb([first], rest)
    return _uniref(first, rest)


def taxid_of(line: str) -> int | None:
    """``parse_header(line).taxid``, for the millions of headers of a file."""
    if "TaxID=" not in line and "OX=" not in line:
        return None
    if usual := UNIREF.fullmatch(line):
        return int(usual[1])
    usual = UNIPROTKB.fullmatch(line)
    # a gene's name that stands elsewhere, or in several words, is another matter
    if usual and (usual[2] or "GN=" not in line):
        return int(usual[1])
    return parse_header(line).taxid


def _uniref(first: str, rest: str) -> Header:
    rest, representative = _take(f" {rest}", "RepID", " Tax")
    rest, taxid = _take(rest, "TaxID", " Tax=")
    rest, taxon = _take(rest, "Tax")
    before, members = _take(rest, "n")
    if (count := _integer(members)) is not None:
        rest = before
    cluster = CLUSTER.match(first)
    return Header(
        first,
        rest.strip(),
        database=cluster[1] if cluster else None,
        members=count,
        taxon=taxon,
        taxid=_integer(taxid),
        representative=_first_word(representative),
    )


def _uniprotkb(parts: list[str], rest: str) -> Header:
    rest, version = _take(f" {rest}", "SV", " OS=")
    rest, existence = _take(rest, "PE", " OS=")
    rest, gene = _take(rest, "GN", " OS=")
    rest, taxid = _take(rest, "OX", " OS=")
    rest, taxon = _take(rest, "OS")
    if taxon is None and taxid is None:  # a file of one's own
        rest, taxid = _take(rest, "TaxID")
    return Header(
        parts[1] if len(parts) == 3 else parts[0],
        rest.strip(),
        database=parts[0] if len(parts) == 3 else None,
        entry=parts[2] if len(parts) == 3 else None,
        taxon=taxon,
        taxid=_integer(taxid),
        gene=gene,
        existence=_integer(existence),
        version=_integer(version),
    )


def _take(text: str, key: str, earlier: str = "\n") -> tuple[str, str | None]:
    """(text before the last ' key=', its value), or (text, None).

    A value that holds an ``earlier`` field is none: what looks like ``key`` is then part of the description.
    """
    before, found, value = text.rpartition(f" {key}=")
    if not found or earlier in value:
        return text, None
    return before, value.strip() or None


def _integer(value: str | None) -> int | None:
    word = _first_word(value)
    return int(word) if word is not None and INTEGER.fullmatch(word) else None


def _first_word(value: str | None) -> str | None:
    return value.split(None, 1)[0] if value else None
