"""Protein files that are none, or damaged: one sentence, whatever is wrong with them."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks import by_line, in_blocks
from longseq_data.errors import DataError
from longseq_data.readers.proteins import read_proteins
from protein_formats import PROTEINS, flat, uniref_xml, xml

Write = Callable[..., str]


def cut(text: str, before: str) -> str:
    return text[: text.rindex(before)]


FLAT, XML = flat(PROTEINS[:3]), xml(PROTEINS[:3])


FLAT_LINES, XML_LINES = FLAT.count("\n"), XML.count("\n")


STARTS = [i for i, line in enumerate(FLAT.splitlines(), 1) if line.startswith("ID  ")]


ENTRIES = [i for i, line in enumerate(XML.splitlines(), 1) if line.startswith("<entry")]


LENGTH = len(PROTEINS[1].sequence)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(cut(FLAT, "//"), f", line {FLAT_LINES - 1}: the file ends inside the entry of line", id="no end"),
        pytest.param(cut(FLAT, "SQ "), f"the file ends inside the entry of line {STARTS[2]}, so it is", id="cut dat"),
        pytest.param(
            cut(FLAT, "DT ") + "DT", f"inside the entry of line {STARTS[2]}, so it is truncated", id="cut line"
        ),
        pytest.param(
            FLAT.replace("//\n", "", 1),
            f", line {STARTS[1] - 1}: an entry begins before the one of line 1",
            id="joined",
        ),
        pytest.param(
            FLAT.replace(f"{LENGTH:>12} AA.", f"{LENGTH + 1:>12} AA."),
            f", line {STARTS[1]}: entry 'P1_HUMAN' has {LENGTH} residues and says {LENGTH + 1}; the file is",
            id="wrong length",
        ),
        pytest.param(
            FLAT.replace("AC   Q00000; Q99999;\nAC   Q99998;\n", ""), "line 1: entry 'P0_HUMAN' has no acc", id="no AC"
        ),
        pytest.param(FLAT + "OX   x\n", f", line {FLAT_LINES + 1}: an entry must begin with an ID line", id="no ID"),
        pytest.param(
            FLAT.replace("OX   NCBI_TaxID", "OX   Other", 1),
            "no UniProtKB flat text (Unexpected taxonomy type Other: 'OX   Other=9606",
            id="what Biopython refuses",
        ),
        pytest.param(
            FLAT.replace("SQ   SEQUENCE", "SQ   ", 1), "no UniProtKB flat text (I don't understand SQ", id="SQ"
        ),
        pytest.param(
            FLAT.replace("KW   Disease", "<p>Disease", 1), "no line of UniProtKB flat text; the fi", id="HTML"
        ),
        pytest.param(
            FLAT.replace("ID   P1_HUMAN ", "ID   P1_HUMAN x y z ", 1), f"line {STARTS[1]}: no UniProtKB", id="ID"
        ),
        pytest.param(cut(XML, "</uniprot>"), f", line {XML_LINES}: the XML ends too early, so the file", id="no close"),
        pytest.param(
            cut(XML, "mass="), ": the XML ends too early, so the file is truncated; download", id="cut in a tag"
        ),
        pytest.param(cut(XML, "Not this"), ": the XML ends too early, so the file is truncated", id="cut in a text"),
        pytest.param(
            XML.replace("</organism>", "", 1), ": damaged XML (mismatched tag); download or ex", id="no end tag"
        ),
        pytest.param(XML.replace("&amp;", "&", 1), ": damaged XML (not well-formed (invalid token)); do", id="bare &"),
        pytest.param(XML.replace("&amp;", "&x;", 1), ": damaged XML (undefined entity); download", id="entity"),
        pytest.param(XML.replace("Protein A", "Protein \x01", 1), ": damaged XML (not well-formed", id="control char"),
        pytest.param(
            XML.replace("<accession>Q00001</accession><accession>Q99999</accession>", ""),
            f", line {ENTRIES[1]}: an entry without its accession or name; the file is damaged;",
            id="no accession",
        ),
        pytest.param(
            XML.replace(f'length="{LENGTH}"', f'length="{LENGTH + 1}"'),
            f", line {ENTRIES[1]}: entry 'Q00001' has {LENGTH} residues and says {LENGTH + 1}; the file is damaged",
            id="wrong length in XML",
        ),
        pytest.param(
            XML.replace("<sequence length", "<sequins length").replace("</sequence>", "</sequins>"),
            f", line {ENTRIES[0]}: entry 'Q00000' has no residues; rem",
            id="no sequence",
        ),
        pytest.param(XML.replace(PROTEINS[0].sequence, "AC-D"), "has something else than letters in its seq", id="gap"),
        pytest.param(
            "<html><body>Sorry; <a>not found</a></body></html>", ": XML of another kind (<html>); give", id="page"
        ),
        pytest.param("<!DOCTYPE html><html></html>", ": the XML has a DOCTYPE, as web pages have and", id="web page"),
        pytest.param(" \n<?xml version='1.0'?><a/>", "damaged XML (XML or text declaration not at start", id="blank"),
        pytest.param("hello; world\n", ", line 1: begins neither like FASTA ('>identifier') nor like", id="other text"),
        pytest.param("ID = 5; x\n", ", line 1: begins neither like FASTA", id="an assignment"),
        pytest.param(gzip.compress(FLAT.encode())[:-20], ": the gzip data ends too early, so", id="gzip cut, dat"),
        pytest.param(gzip.compress(XML.encode())[:-20], ": the gzip data ends too early, so", id="gzip cut, XML"),
        pytest.param(
            gzip.compress(XML.encode())[:-8] + bytes(8), ": the gzip data is damaged (", id="gzip damaged, XML"
        ),
    ],
)
def test_bad_input_is_refused_with_one_sentence(content: str | bytes, message: str, write: Write):
    source = write("bad.bin", content)
    with pytest.raises(DataError) as caught:
        list(read_proteins(source))
    said = str(caught.value)
    assert said.startswith(source)
    assert message in said
    assert said.endswith(".")
    assert "\n" not in said
    assert ";" in said


@pytest.mark.parametrize(
    "prolog",
    [
        '<!DOCTYPE u SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE u [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
        "<!DOCTYPE u [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;'>]>",
    ],
)
@pytest.mark.parametrize("padding", [0, (1 << 18) - 40, 1 << 18])
def test_declarations_that_name_files_or_explode_are_refused_unread(prolog: str, padding: int, write: Write):
    text = f'<?xml version="1.0"?><!--{"x" * padding}-->{prolog}<uniprot xmlns="http://uniprot.org/uniprot">'
    with pytest.raises(DataError, match="the XML has a DOCTYPE"):
        list(read_proteins(write("bad.xml", text + "<entry>&x;</entry></uniprot>")))


@pytest.mark.parametrize("text", [FLAT, XML, uniref_xml(3)], ids=["dat", "xml", "uniref"])
def test_any_damage_gives_records_or_one_sentence(text: str, write: Write):
    rng = random.Random(7)
    for _ in range(300):
        content = bytearray(text.encode())
        for _ in range(rng.choice((1, 1, 3))):
            start = rng.randrange(len(content))
            stop = start + rng.choice((1, 4, 40, 400))
            change = rng.randrange(4)
            if change == 0:
                content[start] = rng.randrange(256)
            elif change == 1:
                del content[start:stop]
            elif change == 2:
                content[start:start] = content[start:stop]
            else:
                del content[start + 1 :]
        source = write("damaged", bytes(content))
        said = said_of(source)
        assert said is None or (said.startswith(source) and "\n" not in said)


def said_of(source: str) -> str | None:
    """The sentence that reading ends with; None where all of it is read."""
    try:
        for record in read_proteins(source):
            assert record.sequence.isalpha()
            assert "\n" not in record.description
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_pir_is_refused_as_such(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.pir"
    path.write_bytes(mark + b">P1;CRAB_ANAPL\nALPHA CRYSTALLIN B CHAIN\n  MDITIHNPLI RRPLFSWLAP*\n")
    with pytest.raises(DataError, match=r"a\.pir, line 1: PIR format"):
        list(read_proteins(str(path)))
    assert in_blocks(str(path)) == by_line(str(path))
