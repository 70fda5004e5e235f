"""FASTA, UniProtKB flat text and XML, UniRef XML: one door, equal records."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from blocks import by_line, in_blocks
from corpora import config, found
from longseq_data.errors import DataError
from longseq_data.prepare.prepare import prepare
from longseq_data.readers import uniprot_xml
from longseq_data.readers.fasta import Encoder, read_records
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.uniprot import parse_header

Write = Callable[..., str]


@dataclass(frozen=True)
class Protein:
    """An entry, from which the texts of all formats are made."""

    accession: str
    entry: str
    name: str
    organism: str
    taxid: int
    sequence: str
    reviewed: bool = True
    common: str = ""
    gene: str = ""
    existence: int = 1
    version: int = 1
    fragment: bool = False


EXISTENCE = (
    "evidence at protein level",
    "evidence at transcript level",
    "inferred from homology",
    "predicted",
    "uncertain",
)


def make_proteins(count: int = 23) -> list[Protein]:
    rng = random.Random(5)
    organisms = [
        ("Homo sapiens", "Human", 9606),
        ("Escherichia coli (strain K12)", "", 83333),
        ("Human immunodeficiency virus type 1 group M subtype B (isolate HXB2)", "HIV-1", 11706),
        ("Saccharomyces cerevisiae (strain ATCC 204508 / S288c)", "Baker's yeast", 559292),
    ]
    proteins = []
    for i in range(count):
        organism, common, taxid = organisms[i % len(organisms)]
        proteins.append(
            Protein(
                f"Q{i:05d}",
                f"P{i}_HUMAN",
                f"Protein A<B> & {i}, EC=1.1, with a long enough name, beta(1->{i})-linked, for more lines than one",
                organism,
                taxid,
                "".join(rng.choices("ACDEFGHIKLMNPQRSTVWYUX", k=rng.randint(1, 200))),
                reviewed=i % 3 > 0,
                common=common,
                gene=f"gen{i}=x" if i % 4 else "",
                existence=1 + i % 5,
                version=1 + i % 7,
                fragment=i % 5 == 0,
            )
        )
    return proteins


def fasta(proteins: list[Protein]) -> str:
    text = ""
    for p in proteins:
        fragment, gene = " (Fragment)" * p.fragment, f" GN={p.gene}" * bool(p.gene)
        text += f">{'sp' if p.reviewed else 'tr'}|{p.accession}|{p.entry} {p.name}{fragment} OS={p.organism}"
        text += f" OX={p.taxid}{gene} PE={p.existence} SV={p.version}\n{p.sequence}\n"
    return text


def flat(proteins: list[Protein]) -> str:
    text = ""
    for p in proteins:
        first, second = p.name[: p.name.index("with")].strip(), p.name[p.name.index("with") :]
        lines = [
            f"ID   {p.entry:<24}{'Reviewed' if p.reviewed else 'Unreviewed'};{len(p.sequence):>12} AA.",
            f"AC   {p.accession}; Q99999;",
            "AC   Q99998;",
            "DT   21-JUL-1986, integrated into UniProtKB/Swiss-Prot.",
            f"DT   21-JUL-1986, sequence version {p.version}.",
            "DT   24-JAN-2024, entry version 275.",
            f"DE   {'RecName' if p.reviewed else 'SubName'}: Full={first}",
            f"DE            {second} {{ECO:0000255|HAMAP-Rule:MF_00001,",
            "DE            ECO:0000303|PubMed:1234}};".replace("}}", "}"),
            "DE            EC=1.2.3.4;",
            "DE   Contains:",
            "DE     RecName: Full=Not this one;",
        ]
        lines += ["DE   Flags: Precursor; Fragment;"] if p.fragment else []
        lines += [f"GN   Name={p.gene} {{ECO:0000312|EMBL:A1}}; Synonyms=a, b;", "GN   ORFNames=c;"] if p.gene else []
        lines += [f"OS   {p.organism}" + f" ({p.common})." * bool(p.common) + "." * (not p.common)]
        lines += ["OC   Eukaryota; Metazoa.", f"OX   NCBI_TaxID={p.taxid} {{ECO:0000313|EMBL:AEX14553.1}};"]
        lines += ["OH   NCBI_TaxID=9913; Bos taurus (Bovine).", "RN   [1]", "RP   NUCLEOTIDE SEQUENCE.", "RL   x."]
        lines += ["CC   -!- FUNCTION: does ID   and // things.", "CC   ----", "DR   EMBL; A; B; -; mRNA."]
        lines += [f"PE   {p.existence}: {EXISTENCE[p.existence - 1].capitalize()};", "KW   Disease.", "FT   CHAIN 1..2"]
        lines += [f"SQ   SEQUENCE   {len(p.sequence)} AA;  11981 MW;  C2C3B23B85E520E5 CRC64;"]
        for i in range(0, len(p.sequence), 60):
            row = p.sequence[i : i + 60]
            lines.append("     " + " ".join(row[j : j + 10] for j in range(0, len(row), 10)))
        text += "\n".join([*lines, "//"]) + "\n"
    return text


def xml(proteins: list[Protein]) -> str:
    text = '<?xml version="1.0" encoding="UTF-8"?>\n<uniprot xmlns="http://uniprot.org/uniprot"\n xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
    for p in proteins:
        gene = f'<gene>\n<name type="synonym">s</name><name type="primary">{escape(p.gene)}</name></gene>' * bool(
            p.gene
        )
        common = f'<name type="common">{escape(p.common)}</name>' * bool(p.common)
        fragment = ' fragment="single"' * p.fragment
        kind = "recommendedName" if p.reviewed else "submittedName"
        text += f"""<entry dataset="{"Swiss-Prot" if p.reviewed else "TrEMBL"}" created="1986-07-21"
 modified="2024-01-24" version="275">
<accession>{p.accession}</accession><accession>Q99999</accession>
<name>{p.entry}</name>
<protein><{kind}><fullName evidence="1">{escape(p.name)}</fullName><ecNumber>1.2.3.4</ecNumber></{kind}>
<component><recommendedName><fullName>Not this one</fullName></recommendedName></component></protein>
{gene}
<organism><name type="scientific">{escape(p.organism)}</name>{common}
<dbReference type="NCBI Taxonomy" id="{p.taxid}"/><lineage><taxon>Eukaryota</taxon></lineage></organism>
<organismHost><name type="scientific">Bos taurus</name><dbReference type="NCBI Taxonomy" id="9913"/></organismHost>
<comment type="alternative products"><isoform><id>x</id><sequence type="displayed"/></isoform></comment>
<proteinExistence type="{EXISTENCE[p.existence - 1]}"/>
<sequence length="{len(p.sequence)}" mass="1"{fragment} version="{p.version}">{p.sequence}</sequence>
</entry>
"""
    return text + "<copyright>Copyrighted by the UniProt Consortium</copyright>\n</uniprot>\n"


def uniref_xml(entries: int = 7) -> str:
    text = (
        '<?xml version="1.0" encoding="ISO-8859-1" ?>\n<UniRef50 xmlns="http://uniprot.org/uniref" version="2021_04">\n'
    )
    for i in range(entries):
        text += f"""<entry id="UniRef50_Q{i}" updated="2024-05-29">
<name>Cluster: protein &lt;{i}&gt;</name>
<property type="member count" value="{i + 1}"/>
<property type="common taxon" value="Taxon x={i}"/>
<property type="common taxon ID" value="{10 + i}"/>
<representativeMember>
<dbReference type="UniProtKB ID" id="Q{i}_HUMAN"><property type="NCBI taxonomy" value="9606"/></dbReference>
<sequence length="{61 + i}" checksum="428270C7C0D6A56C">
{"A" * 60}
{"C" * (i + 1)}
  </sequence>
</representativeMember>
<member><dbReference type="UniParc ID" id="UPI1"/><sequence length="1">W</sequence></member>
</entry>
"""
    return text + "</UniRef50>\n"


PROTEINS = make_proteins()
WRITERS = {"fasta": fasta, "dat": flat, "xml": xml}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records_of_the_fasta_file(name: str, zipped: bool, write: Write):
    content = WRITERS[name](PROTEINS).encode()
    source = write("anything.txt", gzip.compress(content) if zipped else content)
    expected = read_records(write("x.fasta", fasta(PROTEINS)))
    found = list(read_proteins(source))
    assert [(r.identifier, r.description, r.sequence) for r in found] == [
        (r.identifier, r.description, r.sequence) for r in expected
    ]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
def test_every_format_is_prepared_as_the_fasta_file_is(zipped: bool, write: Write, tmp_path: Path):
    corpora = {}
    for name, text in WRITERS.items():
        content = text(PROTEINS).encode()
        source = write(f"{name}.txt", gzip.compress(content) if zipped else content)
        settings = {"format": "fasta", "valid_fraction": 0.2, "test_fraction": 0.2}
        settings |= {"ood_taxids": [9606], "exclude_taxids": [11706]}
        manifest, _ = prepare(config([source], tmp_path / name, **settings))
        corpora[name] = (manifest.fingerprint, found(tmp_path / name))
    rows = {key: row for split in corpora["fasta"][1].values() for key, row in split.items()}
    assert rows == {
        f"{'sp' if p.reviewed else 'tr'}|{p.accession}|{p.entry}": (p.sequence, p.taxid)
        for p in PROTEINS
        if p.taxid != 11706
    }
    assert {taxid for _, taxid in corpora["fasta"][1]["ood"].values()} == {9606}
    assert corpora["dat"] == corpora["fasta"]
    assert corpora["xml"] == corpora["fasta"]


@pytest.mark.parametrize(("name", "biopython"), [("dat", "swiss"), ("xml", "uniprot-xml")])
def test_sequences_accessions_and_taxids_are_those_of_biopython(name: str, biopython: str, write: Write):
    from Bio import SeqIO

    source = write(f"a.{name}", WRITERS[name](PROTEINS))
    records = list(read_proteins(source))
    expected = list(SeqIO.parse(source, biopython))
    assert [parse_header(r.description).identifier for r in records] == [e.id for e in expected]
    assert [parse_header(r.description).entry for r in records] == [e.name for e in expected]
    assert [r.sequence for r in records] == [str(e.seq) for e in expected]
    if name == "dat":
        taxids = [int(e.annotations["ncbi_taxid"][0]) for e in expected]
    else:
        taxids = [
            next(int(x[14:]) for x in e.dbxrefs if x.startswith("NCBI Taxonomy:") and x[14:] != "9913")
            for e in expected
        ]
    assert [parse_header(r.description).taxid for r in records] == taxids == [p.taxid for p in PROTEINS]


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_the_line_of_a_record_is_where_its_entry_begins(name: str, write: Write):
    text = "\n" * (name == "dat") + WRITERS[name](PROTEINS)
    starts = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith(("ID  ", "<entry"))]
    assert [r.line for r in read_proteins(write("a", text))] == starts


def test_formats_by_url(http_address: str, write: Write):
    write("a.bin", gzip.compress(xml(PROTEINS).encode()))
    write("b.bin", flat(PROTEINS))
    assert [r.sequence for r in read_proteins(f"{http_address}/a.bin")] == [p.sequence for p in PROTEINS]
    assert [r.sequence for r in read_proteins(f"{http_address}/b.bin")] == [p.sequence for p in PROTEINS]


def test_uniref_xml_gives_uniref_headers(write: Write):
    records = list(read_proteins(write("a.xml", uniref_xml())))
    assert [r.description for r in records] == [
        f"UniRef50_Q{i} protein <{i}> n={i + 1} Tax=Taxon x={i} TaxID={10 + i} RepID=Q{i}_HUMAN" for i in range(7)
    ]
    assert [r.sequence for r in records] == ["A" * 60 + "C" * (i + 1) for i in range(7)]


def test_entries_of_the_first_releases_are_read(write: Write):
    text = """ID   104K_THEPA     STANDARD;      PRT;     4 AA.
AC   P15711;
DT   01-APR-1990 (Rel. 14, Created)
DT   01-APR-1990 (Rel. 14, Last sequence update)
DT   01-AUG-1992 (Rel. 23, Last annotation update)
DE   104 KD MICRONEME-RHOPTRY ANTIGEN.
OS   THEILERIA PARVA.
SQ   SEQUENCE   4 AA;  103625 MW;  289B4B554A61870E CRC64;
     MKFL
//
"""
    (record,) = read_proteins(write("a.dat", text))
    assert record.description.startswith("sp|P15711|104K_THEPA 104 KD MICRONEME-RHOPTRY ANTIGEN OS=THEILERIA PARVA")
    assert parse_header(record.description).taxid is None


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


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_any_piece_size_reads_the_same(name: str, write: Write, monkeypatch: pytest.MonkeyPatch):
    source = write("a", WRITERS[name](PROTEINS))
    expected = list(read_proteins(source))
    for size in (1, 2, 7, 61, 1000):
        monkeypatch.setattr(uniprot_xml, "READ", size)
        assert list(read_proteins(source)) == expected


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_a_letter_without_an_id_is_reported_at_its_entry(name: str, write: Write):
    text = WRITERS[name]([PROTEINS[1], Protein("Q1", "Q1_X", "a, with b", "Homo sapiens", 9606, "ACJD")])
    encoder = Encoder(strict=False)
    records = list(read_proteins(write("a", text)))
    for record in records:
        encoder.encode(record)
    assert encoder.unknown == {"J": 1}


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_memory_does_not_grow_with_the_file(name: str, write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uniprot_xml, "READ", 1 << 14)

    def peak(copies: int) -> int:
        """Bytes, at most, while ``copies`` times 23 entries are read."""
        body = WRITERS[name](PROTEINS)
        start, end = (0, len(body)) if name == "dat" else (body.index("<entry"), body.index("<copyright"))
        source = write("large", body[:start] + body[start:end] * copies + body[end:])
        tracemalloc.start()
        assert sum(1 for _ in read_proteins(source)) == copies * len(PROTEINS)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(20)  # what is imported and cached for good
    assert peak(240) < peak(40) + 50_000  # 5,520 and 920 entries; Biopython's reader of XML takes 370,000 bytes more


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
