"""data.reverse: a share of the training samples has its records from their last residue to their first."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import BOS, EOS, LETTERS, PROTEIN, backwards
from plain_samples import evaluation_samples, training_samples

MARKS = {BOS: "<", EOS: ">"}
RECORDS = ["".join(np.random.default_rng(n).choice(list(LETTERS[:20]), 11 + 7 * n % 40)) for n in range(60)]


@pytest.fixture
def proteins(tmp_path) -> str:
    (tmp_path / "a.fasta").write_text("".join(f">r{n}\n{record}\n" for n, record in enumerate(RECORDS)))
    return str(tmp_path / "a.fasta")


def spec(source: str, **how) -> StreamSpec:
    given = {"length": 24, "packing": "concat", "objective": "causal", "seed": 3, **how}
    return StreamSpec((source,), "train", 0.1, 0.0, shuffle_buffer=9, **given)


def ids(text: str) -> np.ndarray:
    marks = {letter: token for token, letter in MARKS.items()}
    return np.array([marks.get(letter, LETTERS.find(letter)) for letter in text], dtype=np.uint8)


def letters(tokens) -> str:
    return "".join(MARKS.get(token, LETTERS[token] if token < len(LETTERS) else "_") for token in map(int, tokens))


@pytest.mark.parametrize(
    ("marks", "text", "turned"),
    [
        ("joined", "VK>ACD>MA", "AM>DCA>KV"),
        ("joined", "<VK>AC", "CA>KV>"),
        ("joined", ">ACD>", ">DCA>"),
        ("documents", "VK><ACD><MA", "AM><DCA><KV"),
        ("documents", "><ACD>", "<DCA><"),
        ("ends", "<ACD>", "<DCA>"),
        ("ends", "<ACD", "DCA>"),
        ("ends", "ACD>", "<DCA"),
        ("ends", "<ACD>MK>", "<KM>DCA>"),
    ],
)
def test_marks_stand_where_they_would_had_the_records_been_read_backwards(marks, text, turned):
    assert letters(backwards(PROTEIN, marks, ids(text))) == turned


WAYS = {"concat": {}, "reset": {"reset": True}, "crop": {"packing": "crop"}}


@pytest.mark.parametrize("way", WAYS)
def test_a_share_of_the_samples_is_reversed_whoever_makes_them(proteins, way):
    turning = spec(proteins, reverse=0.3, **WAYS[way])
    plain, samples = training_samples(replace(turning, reverse=0.0)), training_samples(turning)
    before, after = (list(islice(each, 400)) for each in (plain, samples))
    changed = sum(one.tokens.tolist() != other.tokens.tolist() for one, other in zip(before, after, strict=True))
    assert 80 < changed < 160
    for world, workers, start in ((1, 1, 0), (3, 0, 12)):
        found = {}
        for rank in range(world):
            batches = TrainingBatches(
                turning, batch_sequences=12 // world, accumulate=1, rank=rank, world=world, start=start
            )
            for step, batch in enumerate(islice(Loader(batches, workers), 4)):
                for row in range(len(batch["tokens"])):
                    found[start + step * 12 + row * world + rank] = {
                        name: array[row] for name, array in batch.items() if array.ndim
                    }
        for number, row in found.items():
            expected = after[number]
            size = len(expected.tokens)
            assert row["tokens"][:size].tolist() == expected.tokens.tolist(), number
            assert row["targets"][:size].tolist() == expected.targets.tolist(), number
            if way == "reset":
                assert row["segments"][:size].tolist() == expected.segments.tolist(), number


def test_whole_records_come_in_both_directions(proteins):
    turning = spec(proteins, reverse=0.5, packing="crop", length=64)
    rows = {letters([*sample.tokens, sample.targets[-1]]) for sample in islice(training_samples(turning), 600)}
    both = {f"<{record[::way]}>" for record in RECORDS for way in (1, -1)}
    assert rows <= both
    assert sum(f"<{record}>" in rows and f"<{record[::-1]}>" in rows for record in RECORDS) > 40


def test_nothing_is_reversed_in_an_evaluation(proteins):
    plain, turning = (list(evaluation_samples(spec(proteins, reverse=share))) for share in (0.0, 0.9))
    assert [sample.tokens.tolist() for sample in plain] == [sample.tokens.tolist() for sample in turning]


@pytest.mark.parametrize("packing", ["concat", "crop", "bucket"])
def test_samples_of_a_prepared_corpus_are_reversed(proteins, tmp_path, packing):
    prepare(PrepareConfig([proteins], str(tmp_path / "c"), valid_fraction=0.1, workers=1))
    given = {"length": 64, "objective": "causal", "seed": 3, "batch_tokens": 256, "packing": packing}
    plain = CorpusSpec(str(tmp_path / "c"), "train", **given)

    def rows(spec: CorpusSpec) -> list[str]:
        found: list[str] = []
        for batch in TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=0, world=1, start=0):
            for tokens, targets in zip(batch["tokens"].numpy(), batch["targets"].numpy(), strict=True):
                size = int((targets >= 0).sum())
                found.append(letters([*tokens[:size], targets[size - 1]]))
            if len(found) >= 200:
                return found[:200]
        raise AssertionError

    swap = str.maketrans("<>", ">>" if packing == "concat" else "><")
    turned = 0
    for one, other in zip(rows(plain), rows(replace(plain, reverse=0.4)), strict=True):
        assert other in (one, one[::-1].translate(swap))
        turned += other != one
    assert 50 < turned < 110
    scored = [
        [batch["tokens"].tolist() for batch in EvaluationBatches(each, batch_sequences=4, rank=0, world=1)]
        for each in (replace(plain, split="valid"), replace(plain, split="valid", reverse=0.9))
    ]
    assert scored[0] == scored[1]
