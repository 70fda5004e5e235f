"""UniProtKB XML and UniRef XML: entries as records under the header that UniProt's own FASTA gives them.

Biopython's reader of UniProtKB XML keeps an element of every entry until the end, so its memory grows with the file,
and it does not know UniRef's. This one forgets an entry once it is read, and reads no document type declaration, the
only place where XML can name external files or define entities that explode.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Generator, Iterator
from typing import TextIO, cast
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from longseq_data.errors import DataError

from .fasta import Record
from .sources import reading_error
from .uniprot import Header

READ = 1 << 18  # characters at a time
LONGEST_MARK = len("<!DOCTYPE")
MAX_ENTRY = 1 << 28  # characters; the largest entries of UniProt have some millions

DATABASES = {"Swiss-Prot": "sp", "TrEMBL": "tr"}
Events = Iterator[tuple[str, Element]]

ENTRY = re.compile(r"<entry[\s>]")


def read_xml(handle: TextIO, source: str) -> Generator[Record, None, None]:
    """Stream the entries of an open UniProtKB or UniRef XML file; ``line`` of a record is that of its <entry> tag.

    Raises DataError, one sentence with file and line, for what is no such XML, ends too early, or has an entry without
    an identifier or with another number of residues than it says.
    """
    lines: deque[int] = deque()  # of the <entry> tags that were read and whose entries are not yet whole
    parser: ElementTree.XMLPullParser[Element] = ElementTree.XMLPullParser(("start", "end"))
    elements = _elements(parser, handle, source, lines)
    try:
        _, root = next(elements)
        namespace, name = root.tag[: root.tag.find("}") + 1], root.tag.rpartition("}")[2]
        if name == "uniprot":
            header_of, sequence_path = _uniprotkb, f"{namespace}sequence"
        elif name.startswith("UniRef"):
            header_of, sequence_path = _uniref, f"{namespace}representativeMember/{namespace}sequence"
        else:
            raise DataError(
                f"{source}: XML of another kind (<{name[:40]}>); give UniProtKB XML (<uniprot>) or UniRef XML "
                f"(<UniRef50>)."
            )
        entry = f"{namespace}entry"
        for event, element in elements:
            if event == "end" and element.tag == entry:
                line = lines.popleft() if lines else 0
                try:
                    header = header_of(element, namespace)
                except (KeyError, AttributeError):
                    raise DataError(
                        f"{source}, line {line}: an entry without its accession or name; the file is damaged; "
                        f"download or export it again."
                    ) from None
                sequence = _sequence(element.find(sequence_path), header, source, line)
                yield Record(header.first_word, header.line(), sequence, source, line)
                root.clear()  # its entries, of which the parser keeps the one that it is in
    except ElementTree.ParseError as error:
        line, said = error.position[0], str(error).partition(":")[0]
        if said == "no element found" or said.startswith("unclosed"):
            raise DataError(
                f"{source}, line {line}: the XML ends too early, so the file is truncated; download or copy it again."
            ) from error
        raise DataError(f"{source}, line {line}: damaged XML ({said}); download or export the file again.") from error


def _elements(parser: ElementTree.XMLPullParser[Element], handle: TextIO, source: str, lines: deque[int]) -> Events:
    """Starts and ends of elements. ``lines`` receives the line of each <entry> before the events that follow it."""
    line, held, waiting, prolog = 1, "", 0, True
    try:
        while read := handle.read(READ):
            text = held + read
            tag_start = text.rfind("<", -LONGEST_MARK)  # what is looked for here must not be cut in two
            text, held = (text[:tag_start], text[tag_start:]) if tag_start >= 0 else (text, "")
            if prolog and "<!DOCTYPE" in text:
                raise DataError(
                    f"{source}: the XML has a DOCTYPE, as web pages have and UniProt's files do not; give UniProtKB "
                    f"or UniRef XML."
                )
            last, waiting = 0, waiting + len(text)
            for tag in ENTRY.finditer(text):
                line += text.count("\n", last, tag.start())
                last = tag.start()
                lines.append(line)
                waiting, prolog = len(text) - last, False
            line += text.count("\n", last)
            if waiting > MAX_ENTRY:
                raise DataError(f"{source}, line {line}: an entry of more than 256 MiB; the file is damaged.")
            parser.feed(text)
            yield from cast(Events, parser.read_events())
        parser.feed(held)
        parser.close()
        yield from cast(Events, parser.read_events())
    except (DataError, ElementTree.ParseError):
        raise
    except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
        raise reading_error(source, line, error) from error


def _uniprotkb(entry: Element, ns: str) -> Header:
    names = [*entry.findall(f"{ns}protein/{ns}recommendedName"), *entry.findall(f"{ns}protein/{ns}submittedName")]
    organism = entry.find(f"{ns}organism")
    sequence = entry.find(f"{ns}sequence")
    fragment = None if sequence is None else sequence.get("fragment")
    kind = {"single": " (Fragment)", "multiple": " (Fragments)"}.get(fragment or "", "")
    existence = entry.find(f"{ns}proteinExistence")
    version = "" if sequence is None else sequence.get("version", "")
    return Header(
        _text(entry.find(f"{ns}accession")),
        _text(names[0].find(f"{ns}fullName")) + kind if names else "",
        database=DATABASES.get(entry.get("dataset", ""), "sp"),
        entry=_text(entry.find(f"{ns}name")),
        taxon=None if organism is None else _organism(organism, ns),
        taxid=None if organism is None else _taxid(organism, ns),
        gene=_gene(entry, ns),
        existence=None if existence is None else EXISTENCE.get(existence.get("type", "")),
        version=_number(version),
    )


EXISTENCE = {
    "evidence at protein level": 1,
    "evidence at transcript level": 2,
    "inferred from homology": 3,
    "predicted": 4,
    "uncertain": 5,
}


def _organism(organism: Element, ns: str) -> str | None:
    for name in organism.findall(f"{ns}name"):
        if name.get("type") == "scientific" and name.text:
            return " ".join(name.text.split())
    return None


def _taxid(organism: Element, ns: str) -> int | None:
    for reference in organism.findall(f"{ns}dbReference"):
        if reference.get("type") == "NCBI Taxonomy":
            return _number(reference.get("id", ""))
    return None


def _gene(entry: Element, ns: str) -> str | None:
    """The name that FASTA shows: the gene's own, else its first locus or open reading frame."""
    names = [(name.get("type"), name.text) for gene in entry.findall(f"{ns}gene")[:1] for name in gene]
    for kind in ("primary", "ordered locus", "ORF"):
        for type_, text in names:
            if type_ == kind and text:
                return " ".join(text.split())
    return None


def _uniref(entry: Element, ns: str) -> Header:
    properties = {found.get("type"): found.get("value", "") for found in entry.findall(f"{ns}property")}
    member = entry.find(f"{ns}representativeMember/{ns}dbReference")
    identifier = entry.attrib["id"]
    return Header(
        identifier,
        _text(entry.find(f"{ns}name")).removeprefix("Cluster: "),
        database=identifier.partition("_")[0],
        members=_number(properties.get("member count", "")),
        taxon=properties.get("common taxon"),
        taxid=_number(properties.get("common taxon ID", "")),
        representative=None if member is None else member.get("id"),
    )


def _sequence(element: Element | None, header: Header, source: str, line: int) -> str:
    sequence = "" if element is None else "".join((element.text or "").split())
    said = _number("" if element is None else element.get("length", ""))
    where = f"{source}, line {line}: entry '{header.identifier}'"
    if not sequence:
        raise DataError(f"{where} has no residues; remove it, or download the file again.")
    if not (sequence.isascii() and sequence.isalpha()):
        raise DataError(f"{where} has something else than letters in its sequence; download or export the file again.")
    if said is not None and said != len(sequence):
        raise DataError(
            f"{where} has {len(sequence):,} residues and says {said:,}; the file is damaged; download it again."
        )
    return sequence


def _text(element: Element | None) -> str:
    """Its text, in one line. AttributeError where there is none."""
    return " ".join(element.text.split())  # type: ignore[union-attr]


def _number(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 18 else None
