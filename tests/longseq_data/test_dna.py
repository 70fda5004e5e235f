"""Nucleotides as tokens: letters, strands, and what is said of files that were read as something else."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from Bio.Seq import Seq

from longseq.config.loading import load_config
from longseq.data import resolve_sources, split_spec
from longseq.errors import ConfigError
from longseq.interop.tokenizer_files import write_tokenizer
from longseq_data.ingest.survey import survey
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.fasta import read_records
from longseq_data.readers.reading import Reading
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import DNA, NUCLEIC_ACIDS, reverse_complement
from plain_samples import evaluation_samples, training_samples

WRITTEN = "ACGTNacgtnUuRyx"
READ = "ACGTNACGTNTTNNN"


@pytest.fixture
def genome(tmp_path: Path) -> str:
    rng = random.Random(5)
    rows = [(f"chr{i}", "".join(rng.choices("ACGTacgtN", k=rng.randrange(1, 400)))) for i in range(40)]
    (tmp_path / "g.fa").write_text("".join(f">{name} a\n{text[:70]}\n{text[70:]}\n" for name, text in rows))
    return str(tmp_path / "g.fa")


def spec(file: str, **changes) -> StreamSpec:
    given = {"split": None, "valid_fraction": 0.0, "test_fraction": 0.0, "length": 50, "packing": "concat"}
    reading = Reading(tokens="dna")
    return StreamSpec((file,), objective="causal", seed=3, reading=reading, **{**given, **changes})


def letters(tokens: np.ndarray) -> str:
    return NUCLEIC_ACIDS.decode(tokens.tolist())


def test_either_case_u_and_other_letters_are_read_as_bases(tmp_path):
    (tmp_path / "a.fa").write_text(f">a\n{WRITTEN}\n")
    reading = Reading(tokens="dna")
    (record,) = read_records(str(tmp_path / "a.fa"))
    encoder = reading.encoder(strict=False)
    assert letters(encoder.encode(record)) == READ
    assert dict(encoder.unknown) == {"R": 1, "Y": 1, "X": 1}
    report = survey(reading, [str(tmp_path / "a.fa")], strict=False)
    assert (report.unit, report.residues, report.other, report.warning) == ("bases", len(WRITTEN), "N", None)
    assert report.unknown == {"R": 1, "Y": 1, "X": 1}
    assert report.notes[0].startswith(f"{tmp_path / 'a.fa'}, line 1: 'R' in record 'a'")


def test_an_exported_tokenizer_reads_the_same_bases(tmp_path):
    from transformers import AutoTokenizer

    assert write_tokenizer(tmp_path, DNA, first=DNA.bos, causal=True)
    ids = AutoTokenizer.from_pretrained(tmp_path)(WRITTEN)["input_ids"]
    assert ids == [DNA.bos, *("ACGTN".index(letter) for letter in READ)]


def test_the_other_strand_is_biopythons_between_special_tokens():
    row = np.array([DNA.bos, 0, 1, 1, 4, DNA.eos, 3, 2, DNA.eos, DNA.bos, 0], dtype=np.uint8)
    turned = reverse_complement(row)
    assert turned[[0, 5, 8, 9]].tolist() == row[[0, 5, 8, 9]].tolist()
    for part in (slice(1, 5), slice(6, 8), slice(10, 11)):
        assert letters(turned[part]) == str(Seq(letters(row[part])).reverse_complement())
    assert reverse_complement(turned).tolist() == row.tolist()


@pytest.mark.parametrize("packing", ["concat", "crop"])
def test_half_of_the_training_samples_are_turned_as_seed_and_number_say(genome, packing):
    plain, turning = spec(genome, packing=packing), spec(genome, packing=packing, reverse_complement=True)

    def rows(which: StreamSpec, start: int, count: int) -> list[list[int]]:
        samples = training_samples(which, start)
        return [next(samples).tokens.tolist() for _ in range(count)]

    before, after = rows(plain, 0, 400), rows(turning, 0, 400)
    turned = [one != other for one, other in zip(before, after, strict=True)]
    assert 150 < sum(turned) < 250
    # the last base of a causal sample is its target alone, so that a turned one begins with what follows the tokens
    whole = [sample.targets.tolist() for _, sample in zip(range(400), training_samples(plain), strict=False)]
    for row, target, other, yes in zip(before, whole, after, turned, strict=True):
        tokens = np.array([row[0], *target], dtype=np.uint8)
        assert other == (reverse_complement(tokens) if yes else tokens)[:-1].tolist()
    assert rows(turning, 137, 50) == after[137:187]
    assert rows(replace(turning, seed=4), 0, 400) != after


def test_samples_of_any_number_of_processes_and_restarts_are_the_same(genome):
    turning = spec(genome, reverse_complement=True)
    samples = training_samples(turning)
    expected = [next(samples).tokens.tolist() for _ in range(24)]
    for world, workers, start in ((1, 2, 0), (2, 0, 0), (3, 0, 12)):
        found = {}
        for rank in range(world):
            size = {"batch_sequences": 12 // world, "accumulate": 1}
            batches = TrainingBatches(turning, **size, rank=rank, world=world, start=start)
            for step, batch in enumerate(islice(Loader(batches, workers), (24 - start) // 12)):
                for row, tokens in enumerate(batch["tokens"].tolist()):
                    found[start + step * 12 + row * world + rank] = tokens
        assert [found[g] for g in sorted(found)] == expected[start:], (world, workers)


def test_nothing_is_turned_in_an_evaluation(genome):
    plain, turning = (list(evaluation_samples(spec(genome, reverse_complement=on))) for on in (False, True))
    assert [sample.tokens.tolist() for sample in plain] == [sample.tokens.tolist() for sample in turning]


@pytest.mark.parametrize(
    "way", [{"packing": "concat"}, {"packing": "concat", "reset": True}, {"packing": "crop"}, {"packing": "bucket"}]
)
def test_a_prepared_corpus_turns_half_of_its_training_samples(genome, tmp_path, way):
    prepare(PrepareConfig([genome], str(tmp_path / "c"), tokenizer="dna", valid_fraction=0.2, workers=1))
    given = {"length": 50, "objective": "causal", "seed": 3, "batch_tokens": 200, **way}
    plain = CorpusSpec(str(tmp_path / "c"), "train", **given)
    turning = replace(plain, reverse_complement=True)

    def rows(spec: CorpusSpec, start: int = 0, count: int = 300) -> list[list[int]]:
        """Tokens with the last target, without padding."""
        found: list[list[int]] = []
        for batch in TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=0, world=1, start=start):
            for tokens, target in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
                real = [token for token in tokens if token != DNA.pad]
                found.append([*real, target[len(real) - 1]])
            if len(found) >= count:
                return found
        raise AssertionError

    before, after = rows(plain), rows(turning)
    assert len(before) == len(after)
    other = [reverse_complement(np.array(row, dtype=np.int16)).tolist() for row in before]
    if "reset" in way:  # a last target of the next document is not scored, and not seen here
        before, after, other = ([row[:-1] for row in each] for each in (before, after, other))
    same = sum(row == mine for row, mine in zip(before, after, strict=True))
    assert 100 < same < 200
    if "reset" not in way:
        assert all(mine in (row, turned) for row, turned, mine in zip(before, other, after, strict=True))
    if way["packing"] != "bucket":
        assert rows(turning, 137, 50) == rows(turning, 0, 187)[137:187]
    scored = [
        [batch["tokens"].tolist() for batch in EvaluationBatches(each, batch_sequences=4, rank=0, world=1)]
        for each in (replace(plain, split="valid"), replace(turning, split="valid"))
    ]
    assert scored[0] == scored[1]


def test_strands_of_anything_but_dna_are_refused(tmp_path, monkeypatch, genome):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model: {preset: tiny}\ndata: {length: 16, batch_tokens: 64}\n")
    words = [f"data.train={genome}", "data.reverse_complement=true"]
    with pytest.raises(ConfigError, match=r"data\.train is read as protein: set data\.tokenizer=dna"):
        resolve_sources(load_config("a.yaml", words))
    config = load_config("a.yaml", [*words, "data.tokenizer=dna"])
    resolve_sources(config)
    train = split_spec(config, "train")
    assert isinstance(train, StreamSpec)
    assert train.reverse_complement
    assert train.vocabulary == DNA
    assert "data.tokenizer=dna" in str(survey(Reading(), [genome], strict=False).warning)
