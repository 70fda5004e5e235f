"""Proteins joined and cropped in bulk are those taken one by one; FASTA by the block is FASTA by the line."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from itertools import islice, product

import numpy as np
import pytest
from PIL import Image

from blocks import by_line, in_blocks
from longseq_data.errors import DataError
from longseq_data.randomness import generator
from longseq_data.readers.fasta_blocks import Piece, _one_plain, parse_piece, plain_ids
from longseq_data.readers.reading import Reading
from longseq_data.samples.rank_share import Share
from longseq_data.samples.shuffling import shuffled_documents
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import save_tokenizer, train_tokenizer
from longseq_data.vocabulary import IGNORE, PAD
from plain_samples import sample_of, training_samples, training_windows


def fasta(seed: int, records: int) -> str:
    """Proteins of very different lengths, some with unknown letters, gaps, lower case, blank lines and stops."""
    rng = random.Random(seed)
    text = ""
    for i in range(records):
        sequence = "".join(rng.choices("ACDEFGHIKLMNPQRSTVWYX", k=rng.choice([1, 2, 9, 30, 200])))
        if rng.random() < 0.2:
            sequence = rng.choice(["J", "-", "jj"]) + sequence + rng.choice(["*", "J", ""])
        width = rng.choice([7, 60])
        lines = [sequence[j : j + width] for j in range(0, len(sequence), width)]
        text += (
            f">p{seed}_{i}{rng.choice(['', ' protein', ' TaxID=1 é'])}\n" + "\n".join(lines) + "\n" * rng.choice([1, 2])
        )
    return text


@pytest.fixture
def sources(write) -> tuple[str, ...]:
    return tuple(write(f"{seed}.fasta", fasta(seed, records)) for seed, records in ((1, 40), (2, 7), (3, 25)))


@pytest.mark.parametrize("packing", ["concat", "crop", "first"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("length", [2, 5, 64, 700])
@pytest.mark.parametrize("start", [0, 1, 30, 777])
def test_in_bulk_as_one_by_one(sources, packing, objective, length, start):
    crop, packing = ("first", "crop") if packing == "first" else ("random", packing)
    spec = StreamSpec(sources, "train", 0.1, 0.1, length, packing, objective, 4, shuffle_buffer=9, crop=crop)
    windows = islice(enumerate(training_windows(spec, start), start), 48)
    expected = [(window, sample_of(spec, window, g, spec.encoder)) for g, window in windows]
    found = {}
    for rank in range(3):
        share = Share(batch_sequences=4, accumulate=2, rank=rank, world=3)
        for step, batches in enumerate(batched(spec.training(start, share), 2, 2)):
            mine = [g for g in range(start + step * 24, start + (step + 1) * 24) if g % 3 == rank]
            rows = [row for batch in batches for row in zip(batch["tokens"], batch["targets"], strict=True)]
            found.update(zip(mine, rows, strict=True))
            scored = sum(spec.scored(expected[g - start][0]) for g in mine)
            for batch in batches:
                assert batch["step_targets"] == scored
                assert batch["samples"] == start + (step + 1) * 24
    assert sorted(found) == list(range(start, start + 48))
    for g, (_, sample) in enumerate(expected, start):
        for values, real, fill in zip(found[g], (sample.tokens, sample.targets), (PAD, IGNORE), strict=True):
            np.testing.assert_array_equal(values[: len(real)], real)
            assert (values[len(real) :] == fill).all()


KINDS = [*product(["bytes", "tokenizer", "dna"], ["concat", "reset", "crop"]), ("pixels", "crop")]


def of_kind(kind: str, write, tmp_path) -> tuple[tuple[str, ...], Reading]:
    """Sources whose tokens are others than those of proteins, documents of one size among them."""
    rng = random.Random(8)
    if kind == "dna":
        text = "".join(f">{i}\n{''.join(rng.choices('ACGTN', k=rng.choice([1, 9, 9, 200])))}\n" for i in range(60))
        return (write("a.fasta", text),), Reading("fasta", "dna")
    if kind == "pixels":
        for i in range(9):
            Image.fromarray(np.full((3, 3, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        return (str(tmp_path),), Reading("images", "pixels", image_size=3)
    lines = [" ".join(rng.choices(["one", "two", "öre", "x"], k=rng.choice([1, 2, 2, 30]))) for _ in range(60)]
    source = write("a.txt", "\n".join(lines) + "\n")
    if kind == "bytes":
        return (source,), Reading("lines", "bytes")
    save_tokenizer(train_tokenizer(lines, "bpe", 300), tmp_path / "tokenizer.json")
    return (source,), Reading("lines", str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize(("kind", "packing"), KINDS)
def test_other_tokens_in_bulk_as_one_by_one(write, tmp_path, kind, objective, packing, cached):
    sources, reading = of_kind(kind, write, tmp_path)
    how = {"reset": packing == "reset", "reading": reading, "reverse_complement": kind == "dna", "shuffle_buffer": 7}
    if cached:
        how |= {"cache": str(tmp_path / "cache"), "later_epochs": "permutation"}
    spec = StreamSpec(sources, None, 0, 0, 12, "crop" if packing == "crop" else "concat", objective, 4, **how)
    for start in (0, 1, 83):
        expected = list(islice(training_samples(spec, start), 36))
        share = Share(batch_sequences=9, accumulate=2, rank=0, world=1)
        (batches,) = batched(spec.training(start, share), 4, 1)
        for names in ("tokens", "targets", *(["segments"] if packing == "reset" else [])):
            rows = [row for batch in batches for row in batch[names]]
            for row, sample in zip(rows, expected, strict=True):
                real = getattr(sample, names)
                np.testing.assert_array_equal(row[: len(real)], real)
                fill = {"tokens": spec.vocabulary.pad, "targets": IGNORE, "segments": -1}
                assert (row[len(real) :] == fill[names]).all()
        scored = [int((sample.targets != IGNORE).sum()) for sample in expected]
        assert [int(batch["step_targets"]) for batch in batches] == [sum(scored[:18])] * 2 + [sum(scored[18:])] * 2


@pytest.mark.parametrize("residues", [1, 900, 10**9])
@pytest.mark.parametrize("buffer", [2, 7, 40, 1000])
def test_draws_made_at_once_are_those_of_a_buffer_that_gives_one_for_one(sources, monkeypatch, buffer, residues):
    monkeypatch.setattr("longseq_data.samples.shuffling.BUFFER_RESIDUES", residues)
    spec = StreamSpec(sources, None, 0, 0, 9, "crop", "causal", 4, shuffle_buffer=buffer)
    plain = StreamSpec(sources, None, 0, 0, 9, "crop", "causal", 4, shuffle_buffer=2)
    monkeypatch.setattr("longseq_data.samples.shuffling._through_buffer", lambda spec, epoch, chunks: chunks)
    turns = list(shuffled_documents(plain, 1))
    monkeypatch.undo()
    monkeypatch.setattr("longseq_data.samples.shuffling.BUFFER_RESIDUES", residues)
    random, held, expected = generator(4, "shuffle", 1), [], []

    def leave() -> None:
        i = int(random.random() * len(held))
        expected.append(held[i])
        held[i] = held[-1]
        held.pop()

    for document in turns:
        held.append(document)
        while len(held) > buffer or (sum(each.length for each in held) > residues and len(held) > 1):
            leave()
    while held:
        leave()
    assert list(shuffled_documents(spec, 1)) == expected
    assert len(expected) == 72


def batched(batches, size: int, count: int):
    for _ in range(count):
        yield [make() for make in islice(batches, size)]


def test_a_strict_stream_names_the_line_of_the_first_letter_it_refuses(write):
    source = write("a.fasta", ">a\nACD\n>b\nACDEF\nGHJ\n")
    spec = StreamSpec((source,), None, 0, 0, 4, "concat", "causal", 0, strict=True)
    makes = spec.training(0, Share(2, 1, 0, 1))
    with pytest.raises(DataError, match=r"a\.fasta, line 5: character 'J' in record 'b'"):
        list(make() for make in islice(makes, 9))  # noqa: C400


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blocks_give_the_records_of_lines(write, monkeypatch, end, pack):
    text = "\ufeff" + fasta(5, 60).replace("\n", end)
    source = write("a.fasta", pack(text.encode()))
    expected = by_line(source)
    for size in (1 << 20, 1, 7, 64):
        monkeypatch.setattr("longseq_data.readers.fasta_blocks.READ_SIZE", size)
        assert in_blocks(source) == expected
    assert len(expected) == 60


@pytest.mark.parametrize(
    "content",
    [
        b">a\nACD\n>b\n>c\nACD\n",
        b">a\nACD\n>\nACD\n",
        b">a\nAC>D\n",
        b">a\nACD\n;comment\nACD\n",
        b"ACD\n>a\nACD\n",
        b"\n\n>a\nACD\n",
        b">a\nA\x00D\n>b\nACD\n",
        b">a\nACD\n> b\nACD\n",
        gzip.compress(b">a\nACD\n>b\nACDEFGH\n" * 300, mtime=0)[:-9],
        b">a\nAC\xffD\n",
        b"> \nACD\n",
        b">\xe9a\nACD\n",
        b">a",
        b"",
    ],
)
def test_blocks_refuse_what_lines_refuse_in_the_same_words_after_the_same_records(write, content):
    source = write("a.fasta", content)

    assert in_blocks(source) == by_line(source)


@pytest.mark.parametrize("header", [b">a", b">a\tb", b">a\xc3\xa9 b", b"> a", b">", b">a\x1fb", b">a\x85"])
@pytest.mark.parametrize(
    "body", [b"", b"\n", b"\n\n", b"\nMKV", b"\nMK\nv\n\n", b"\nMK V\n", b"\nMK*\n", b"\nM\tK", b"\nM\x00\xff"]
)
def test_one_record_alone_is_read_as_among_others(header, body):
    text = header + body
    piece = Piece(text, 1, [])
    found = _one_plain(piece)
    assert found == plain_ids(text)
    assert piece.text == (text if found is None else b"")


def test_a_record_of_a_chromosomes_size_is_in_memory_twice_at_most():
    size = 1 << 22
    tracemalloc.start()
    try:
        piece = Piece(b">a\n" + b"MKVLAAGI\n" * (size // 9), 1, [])
        tracemalloc.reset_peak()
        ((bulk, rest),) = parse_piece(piece, "a.fasta")
        assert tracemalloc.get_traced_memory()[1] < 2.1 * size
    finally:
        tracemalloc.stop()
    assert (bulk.headers, len(bulk.ids[0]), rest) == ([b"a"], size // 9 * 8, [])
