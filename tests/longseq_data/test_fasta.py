"""Records, and one clear sentence for each way in which a file can be wrong."""

import gzip
import random
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from longseq_data.errors import DataError
from longseq_data.ingest.survey import survey
from longseq_data.prepare.inspection import count, raw_lines
from longseq_data.readers.fasta import Encoder, Record, read_records
from longseq_data.readers.reading import Reading
from longseq_data.samples.rank_share import Share
from longseq_data.samples.streaming import StreamSpec
from longseq_data.splits import SplitRule, split_of
from longseq_data.vocabulary import LETTERS, X, decode
from real_files import folder_of

REAL = folder_of("proteins")

MANY = b"".join(b">r%d\nACDEFGHIKLMNPQRSTVWY\n" % i for i in range(40_000))
NOISE = bytes(random.Random(1).choices(b"ACDEFGHIKLMNPQRSTVWY", k=400_000))
LONG_GZIP = gzip.compress(b"".join(b">r\n%s\n" % NOISE[i : i + 100] for i in range(0, len(NOISE), 100)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", " is empty; give a file with", id="empty file"),
        pytest.param(gzip.compress(b""), " is empty; give a file with", id="gzip of nothing"),
        pytest.param(b"\n \n", ", line 2: nothing but blank lines to the end; give", id="blank lines"),
        pytest.param(b"ACD\nEFG\n", ", line 1: text before the first header ('>identifier')", id="no header"),
        pytest.param(b"\nold\n>a\nAC\n", ", line 2: text before the first header", id="text before header"),
        pytest.param(b"\n; old\n>a\nAC\n", ", line 2: ';' in a sequence: comments are no", id="comment before header"),
        pytest.param(b">a\n; old\nAC\n", ", line 2: ';' in a sequence: comments are", id="comment after header"),
        pytest.param(b">a\nAC\n\n;old\n>b\nAC\n", ", line 4: ';' in a sequence: comm", id="comment between records"),
        pytest.param(
            b">a\nAC\nAC>b c\nAC\n", ", line 3: '>' inside a sequence: a line break before it is missing", id="glued"
        ),
        pytest.param(b">a\nAC\n >b\nAC\n", ", line 3: '>' inside a sequence: a line break bef", id="indented header"),
        pytest.param(b" >a\nAC\n", ", line 1: '>' inside a sequence: a line break", id="indented first header"),
        pytest.param(b">a\nAC\n>\nAC\n", ", line 3: the header has no identifier; write one", id="no identifier"),
        pytest.param(b">a b\n\n>b\nAC\n", ", line 1: record 'a b' has no residues; remove it", id="zero length"),
        pytest.param(b">a\nAC\n>b\n", ", line 3: record 'b' has no residues", id="zero length at the end"),
        pytest.param(b">a\nAC\n>b\n*\n", ", line 3: record 'b' has no residues", id="nothing but a stop"),
        pytest.param(LONG_GZIP[:-30], "LINE: the gzip data ends too early, so the file is truncated", id="truncated"),
        pytest.param(gzip.compress(b">a\nAC\n")[:-9], ", after line 2: the gzip data ends", id="truncated, small"),
        pytest.param(LONG_GZIP[:-8] + bytes(8), "LINE: the gzip data is damaged (", id="wrong checksum"),
        pytest.param(LONG_GZIP[:10] + b"\xff" * 20, ": the gzip data is damaged (error: ", id="damaged deflate"),
        pytest.param(
            gzip.compress(b">a\nAC\n") + b"junk", ", after line 2: the gzip data is dam", id="junk after gzip"
        ),
        pytest.param(MANY + b">z\nAC\n\nA\0C\n", ", line 80004: the control character U+0000 in a", id="NUL, far"),
        pytest.param(b">a\nA\x1b[0mC\n", ", line 2: the control character U+001B in a sequence", id="escape"),
        pytest.param(">a\nAC\n\nD E\té\n".encode(), ", line 4: 'é' in a sequence, so this is not", id="UTF-8"),
        pytest.param(b">a\nAC\nA\xe9\n", ", line 3: a byte that is neither ASCII nor UTF-8", id="Latin-1"),
        pytest.param(">a\nAC\n".encode("utf-16"), " is UTF-16 text, not FASTA; convert it", id="UTF-16"),
        pytest.param(">a\nAC\n".encode("utf-16-le"), " is a binary file, not FASTA", id="UTF-16 without mark"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0", " is a binary file, not FASTA; give", id="picture"),
        pytest.param(b"PK\x03\x04rest", " is a zip archive, not FASTA; convert it", id="zip"),
        pytest.param(b"BZh91AY", ": the bzip2 data ends too early, so the file is truncated;", id="bzip2"),
    ],
)
def test_a_bad_file_is_refused_with_one_sentence(content: bytes, message: str, write):
    source = write("bad.fasta", content)
    with pytest.raises(DataError) as caught:
        list(read_records(source))
    said = str(caught.value)
    assert said.startswith(source)
    said = said.removeprefix(source)
    if message.startswith("LINE"):
        assert said.startswith(", after line ")
        line, said = said.removeprefix(", after line ").split(":", 1)
        assert 1000 < int(line) <= 8000
        message = message.removeprefix("LINE:")
    assert said.startswith(message)
    assert said.endswith(".")
    assert "\n" not in said
    assert "; " in said  # what to do


def test_a_file_without_permission(write, monkeypatch):
    source = write("a.fasta", ">a\nAC\n")

    def deny(*_: object, **__: object) -> None:  # root may read everything, so the refusal itself is played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(DataError, match=r"a\.fasta: cannot be read \(Permission denied\); have its owner give"):
        list(read_records(source))


@pytest.mark.parametrize(
    "content",
    [
        b">a\nACDE\n>b c\nFGH\n",
        b">a\nACDE\n>b c\nFGH",
        b">a\r\nACDE\r\n>b c\r\nFGH\r\n",
        b">a\rACDE\r>b c\rFGH\r",
        b"\n\n>a\n\nAC\n\nDE\n\n>b c\nFGH\n\n",
        b"\xef\xbb\xbf>a\nACDE\n>b c\nFGH\n",
        b">a  \nAC DE  \n>b c\nF\tGH*\n",
    ],
    ids=["plain", "no final newline", "CRLF", "CR", "blank lines", "byte order mark", "white space and stop"],
)
def test_the_ways_to_write_the_same_records(content: bytes, write):
    records = list(read_records(write("a.fasta", content)))
    assert [(r.identifier, r.description, r.sequence) for r in records] == [("a", "a", "ACDE"), ("b", "b c", "FGH")]


@pytest.mark.parametrize("change", ["{}*", "{}-{}", "{}J"], ids=["final stop", "gap", "unknown letter"])
def test_records_with_stops_and_gaps_are_read_nearly_as_fast_as_others(change: str, write):
    def seconds(sequence: str) -> float:
        source = write("a.fasta", f">a\n{sequence}\n" * 300)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for record in read_records(source):
                Encoder(strict=False).encode(record)
            times.append(time.perf_counter() - start)
        return min(times)

    # twice as long; a Python loop over the letters takes thirty times as long
    assert seconds(change.format("ACDEFGHIKL" * 200, "ACDEFGHIKL" * 200)) < 8 * seconds("ACDEFGHIKL" * 400)


def test_a_header_in_another_encoding_does_not_stop_reading(write):
    (record,) = read_records(write("a.fasta", b">caf\xe9 prot\xff\xfein\nAC\n"))
    assert record.sequence == "AC"
    record.description.encode()  # can be printed


def test_header_lines_count_from_one_over_blank_lines(write):
    records = list(read_records(write("a.fasta", "\n>a\nAC\n\nDE\n>b\nA\n>c\nA\n")))
    assert [record.line for record in records] == [2, 6, 8]


def test_unknown_letters_become_x_and_are_counted(write):
    source = write("a.fasta", ">a\nAC\n>b\nMKV\nM Kjx\nJ-.1\n")
    encoder = Encoder(strict=False)
    first, second = (encoder.encode(record) for record in read_records(source))
    assert decode(first) == "AC"
    assert decode(second) == "MKVMKXXXXXX"
    assert encoder.unknown == {"J": 2, "-": 1, ".": 1, "1": 1}


def test_a_warning_names_the_first_unknown_letter_of_each_source_once(write):
    sources = [write(f"{name}.fasta", ">a\nAC\n>b\nMKV\nMJ-\n>c\nJ\n") for name in ("one", "two")]
    records = [record for source in sources for record in read_records(source)]
    said: list[str] = []
    encoder = Encoder(strict=False, tell=said.append)
    for record in records * 2:
        encoder.encode(record)
    assert said == [
        f"{source}, line 3: 'J' in record 'b' is read as X; data.strict=true refuses it." for source in sources
    ]


def test_no_unknown_letters_no_report():
    encoder = Encoder(strict=True)
    record = Record("a", "a", "ACDBOUXZmk", "a.fasta", 1)
    assert decode(encoder.encode(record)) == "ACDBOUXZMK"
    assert not encoder.unknown


def test_encoding_a_part_of_a_record(write):
    (record,) = read_records(write("a.fasta", ">a\nMKVJA\nCDEJ\n"))
    encoder = Encoder(strict=False)
    assert encoder.encode(record, 5, 9).tolist() == [*map(LETTERS.index, "CDE"), X]
    assert encoder.unknown == {"J": 1}


def test_strict_refuses_the_first_unknown_letter(write):
    source = write("a.fasta", ">a\nAC\n>b x\nMKV\nAJ*\n")
    with pytest.raises(DataError) as caught:
        survey(Reading(), [source], strict=True)
    assert str(caught.value) == (
        f"{source}, line 5: character 'J' in record 'b' is not one of ACDEFGHIKLMNPQRSTVWYBOUXZ; correct it, or set "
        f"data.strict=false, which maps such characters to X."
    )


@pytest.mark.interfaces
def test_a_survey_counts_everything_within_its_budget(proteins):
    from Bio import SeqIO

    report = survey(Reading(), proteins, strict=True)
    lengths = [len(record) for source in proteins for record in SeqIO.parse(source, "fasta")]
    assert (report.records, report.residues, report.complete) == (len(lengths), sum(lengths), True)


def test_a_survey_reads_the_first_block_of_every_source(proteins, monkeypatch):
    monkeypatch.setattr("longseq_data.ingest.block.FIRST_BYTES", 1)
    for budgets in ({"max_bytes": 1}, {"total_bytes": 1}):
        report = survey(Reading(), proteins, strict=True, **budgets)
        assert (report.records, report.complete) == (2, False)


def test_a_survey_counts_the_records_of_each_split(proteins):
    found = [split_of(record.identifier, 0.2, 0.3) for source in proteins for record in read_records(source)]
    assert survey(Reading(), proteins, strict=True, rule=SplitRule(0.2, 0.3)).splits == Counter(found)
    assert set(found) == {"train", "valid", "test"}
    assert survey(Reading(), proteins, strict=True).splits == {"train": 37}
    assert survey(Reading(), proteins, strict=True, rule=SplitRule(1.0, 0.0)).splits["train"] == 0


def test_a_survey_of_single_blocks_over_the_budget_is_complete(write):
    sources = [write(f"{i}.fasta", ">a\nACDEFGH\n") for i in range(3)]
    report = survey(Reading(), sources, strict=True, max_bytes=1, total_bytes=1)
    assert (report.records, report.residues, report.complete) == (3, 21, True)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real proteins here: set LONGSEQ_PROTEINS")
def test_real_proteomes_are_counted_as_biopython_counts_them():
    from Bio import SeqIO

    sources = sorted(str(path) for path in REAL.glob("*.fasta.gz"))
    records = residues = 0
    for source in sources:
        with gzip.open(source, "rt") as handle:
            for record in SeqIO.parse(handle, "fasta"):
                records += 1
                residues += len(record.seq)
    report = survey(Reading(), sources, strict=False)
    assert (report.records, report.residues, report.complete) == (records, residues, True)


def test_a_record_that_says_it_is_empty_is_read_and_not_trained_on(write) -> None:
    whole = "".join(f">r{i}\n{'MKVLAACDEFGHIKW'[i % 7 :]}\n" for i in range(30))
    drawn = whole.replace(">r9\n", ">s1 seed=0 tokens=0 ended=eos\n>r9\n") + ">s2 tokens=0 ended=eos\n"
    hollow, plain = write("hollow.fasta", drawn), write("plain.fasta", whole)
    assert [record.identifier for record in read_records(hollow) if not record.length] == ["s1", "s2"]
    for packing, reset in (("crop", False), ("concat", False), ("concat", True)):
        specs = [
            StreamSpec((source,), "train", 0.1, 0.1, 8, packing, "masked", 0, reset=reset) for source in (hollow, plain)
        ]
        share = Share(4, 1, 0, 1)
        batches = [[make() for make in islice(spec.training(0, share), 20)] for spec in specs]
        for one, other in zip(*batches, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
        passes = [[make()["tokens"].tolist() for make in spec.evaluation(share)] for spec in specs]
        assert passes[0] == passes[1]


@pytest.mark.parametrize(
    ("sequences", "suspect"),
    [
        (["ACGTNACGTN", "acguacgu--"], True),
        (["GATTACA"], False),  # as short a peptide there may be
        (["ACGTACGTAC", "ACGTACGTACM"], False),
        (["ACGTRYACGTACGT"], False),
    ],
)
def test_nucleotides_are_told_from_proteins(write, sequences: list[str], suspect: bool) -> None:
    source = write("a.fasta", "".join(f">r{i}\n{letters}\n" for i, letters in enumerate(sequences)))
    report = survey(Reading(), [source], strict=False)
    assert (report.warning is not None) == suspect
    counts = count(Reading(), [source], show=0)
    assert any("probably nucleotides" in line for line in raw_lines(Reading(), counts)) == suspect
