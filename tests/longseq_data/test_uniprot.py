"""Header lines of UniRef and UniProtKB."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_data.readers.fasta import read_records
from longseq_data.readers.uniprot import Header, parse_header, taxid_of
from real_files import folder_of

REAL = folder_of("proteins")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(
            "UniRef50_A0A5A9P0L4 peptidylprolyl isomerase n=1 Tax=Triplophysa tibetana TaxID=1572043 "
            "RepID=A0A5A9P0L4_9TELE",
            Header(
                "UniRef50_A0A5A9P0L4",
                "peptidylprolyl isomerase",
                "UniRef50",
                members=1,
                taxon="Triplophysa tibetana",
                taxid=1572043,
                representative="A0A5A9P0L4_9TELE",
            ),
            id="UniRef50",
        ),
        pytest.param(
            ">UniRef100_UPI0009BFC53B hypothetical protein, x=2 n=3 fold n=14 Tax=Influenza A virus (A/x/1=2/n=7 (H1)) "
            "TaxID=11320 RepID=UPI0009BFC53B",
            Header(
                "UniRef100_UPI0009BFC53B",
                "hypothetical protein, x=2 n=3 fold",
                "UniRef100",
                members=14,
                taxon="Influenza A virus (A/x/1=2/n=7 (H1))",
                taxid=11320,
                representative="UPI0009BFC53B",
            ),
            id="equals signs in names",
        ),
        pytest.param(
            "UniRef90_P12345-2 Isoform 2 of Titin (Fragment) n=2 Tax=root TaxID=-1 RepID=P12345-2",
            Header(
                "UniRef90_P12345-2",
                "Isoform 2 of Titin (Fragment)",
                "UniRef90",
                members=2,
                taxon="root",
                taxid=-1,
                representative="P12345-2",
            ),
            id="isoform, negative taxid",
        ),
        pytest.param(
            "UniRef50_Q1 Cluster: n=few Tax=unknown RepID=Q1_9VIRU",
            Header("UniRef50_Q1", "Cluster: n=few", "UniRef50", taxon="unknown", representative="Q1_9VIRU"),
            id="no count, no taxid",
        ),
        pytest.param(
            "UniRef50_Q1 n=5 Tax=A TaxID=N/A RepID=Q1_X extra",
            Header("UniRef50_Q1", "", "UniRef50", members=5, taxon="A", representative="Q1_X"),
            id="no description, no number",
        ),
        pytest.param("UniRef50_Q1", Header("UniRef50_Q1", "", "UniRef50"), id="identifier only"),
        pytest.param(
            "UniRef50_Q1\tfoo\tn=5 Tax= TaxID=99999999999999999999 RepID=",
            Header("UniRef50_Q1", "foo", "UniRef50", members=5),
            id="tabs, empty values, a taxid too large",
        ),
        pytest.param(
            "sp|P01308|INS_HUMAN Insulin OS=Homo sapiens OX=9606 GN=INS PE=1 SV=1",
            Header(
                "P01308",
                "Insulin",
                "sp",
                "INS_HUMAN",
                taxon="Homo sapiens",
                taxid=9606,
                gene="INS",
                existence=1,
                version=1,
            ),
            id="Swiss-Prot",
        ),
        pytest.param(
            "tr|A0A067C1|A0A067C1_9AGAR Laccase OS=Foo (strain A=B / C) OX=1 GN=Lacc1=POX4 x PE=3 SV=12",
            Header(
                "A0A067C1",
                "Laccase",
                "tr",
                "A0A067C1_9AGAR",
                taxon="Foo (strain A=B / C)",
                taxid=1,
                gene="Lacc1=POX4 x",
                existence=3,
                version=12,
            ),
            id="TrEMBL, equals signs",
        ),
        pytest.param(
            "sp|P1|A_B PE=2 like protein of GN=x OS=Some virus SV=4",
            Header("P1", "PE=2 like protein of GN=x", "sp", "A_B", taxon="Some virus", version=4),
            id="fields look-alike in the name, no OX, GN, PE",
        ),
        pytest.param("gi|5524211|gb|AAD44166.1| cytochrome b", Header("gi|5524211|gb|AAD44166.1|", "cytochrome b")),
        pytest.param("p1 of OX=5 OX=9606", Header("p1", "of OX=5", taxid=9606), id="one's own file, OX"),
        pytest.param("p1 of OX=5 TaxID=9606", Header("p1", "of OX=5", taxid=9606), id="one's own file, TaxID"),
        pytest.param("a|b|c x TaxID=7", Header("b", "x", "a", "c", taxid=7), id="one's own file, bars"),
        pytest.param("", Header(""), id="empty"),
        pytest.param("> ", Header(""), id="nothing but the mark"),
    ],
)
def test_the_fields_of_a_header(line: str, expected: Header):
    assert parse_header(line) == expected


def words(alphabet: str) -> st.SearchStrategy[str]:
    return st.lists(st.text(alphabet, min_size=1, max_size=8), min_size=1, max_size=4).map(" ".join)


WORDS = words("abXY19=()/,.'-_é")
NUMBERS = st.none() | st.integers(-(10**17), 10**17)


@given(
    st.builds(
        Header,
        st.from_regex(r"UniRef50_[A-Z0-9]{1,10}", fullmatch=True),
        WORDS,
        database=st.just("UniRef50"),
        members=st.none() | st.integers(1, 10**9),
        taxon=WORDS,
        taxid=NUMBERS,
        representative=st.none() | st.from_regex(r"[A-Z0-9_-]{1,12}", fullmatch=True),
    )
)
def test_a_uniref_line_reads_back_as_it_was_written(header: Header):
    assert parse_header(header.line()) == header


@given(
    st.builds(
        Header,
        st.from_regex(r"[A-Z0-9]{1,10}", fullmatch=True),
        WORDS,
        database=st.sampled_from(["sp", "tr"]),
        entry=st.from_regex(r"[A-Z0-9]{1,10}_[A-Z]{1,5}", fullmatch=True),
        taxon=WORDS,
        taxid=NUMBERS,
        gene=st.none() | WORDS,
        existence=st.none() | st.integers(1, 5),
        version=st.none() | st.integers(1, 900),
    )
)
def test_a_uniprotkb_line_reads_back_as_it_was_written(header: Header):
    assert parse_header(header.line()) == header


@given(st.text(max_size=60) | words("nTaxIDREepOSGNV= |>5"))
def test_any_text_is_a_header(line: str):
    header = parse_header(line)
    assert parse_header(header.line()).taxid == header.taxid


PIECES = [
    "x",
    "GN=a",
    "OX=5",
    "OX=9606",
    "PE=1",
    "SV=2",
    "OS=Homo sapiens",
    "Tax=y z",
    "TaxID=-1",
    "TaxID=7",
    "RepID=Q",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["UniRef50_X", "UniRef50_X|b|c", "sp|A|B", "x", ""]),
    st.lists(st.sampled_from([*PIECES, "GN=a b", "OX=", "TaxID=N/A", "n=1", "é"]), max_size=5),
    st.sampled_from(["", "OX=9606 PE=1 SV=2", "OX=9606 GN=b PE=1 SV=2", "TaxID=9606 RepID=P_Q"]),
    st.sampled_from([" ", " ", "\t"]),
)
def test_the_fast_road_to_a_taxid_is_that_of_the_whole_header(first: str, pieces: list[str], end: str, space: str):
    line = " ".join([first, space.join(pieces), end])
    assert taxid_of(line) == parse_header(line).taxid


@pytest.mark.parametrize("first", ["UniRef50_X", "sp|A|B", "x"])
def test_a_header_of_a_million_look_alikes_does_not_hang(first: str):
    header = parse_header(first + " n=x Tax= TaxID= RepID= OS= OX= GN= PE= SV=" * 120_000)
    assert (header.members, header.taxid) == (None, None)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real proteins here: set LONGSEQ_PROTEINS")
def test_every_header_of_real_files_is_understood():
    seen = 0
    for path in sorted(REAL.glob("*.fasta.gz")):
        with gzip.open(path, "rt") as handle:
            lines = [line[1:].rstrip("\n") for line in handle if line.startswith(">")]
        for line, record in zip(lines, read_records(str(path)), strict=True):
            header = parse_header(record.description)
            assert header.line() == " ".join(line.split())
            assert None not in (header.members, header.taxon, header.taxid, header.representative, header.database)
            seen += 1
    assert seen
