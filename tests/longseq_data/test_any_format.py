"""What holds for proteins holds for every format: order, resume, shares of ranks and workers, document boundaries."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from every_format import TEXTS, every_format, modes
from longseq_data.errors import DataError
from longseq_data.ingest.survey import survey
from longseq_data.readers.fasta import read_records
from longseq_data.readers.reading import Reading
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.streaming import StreamSpec, evaluation_windows, target_counts
from longseq_data.splits import SplitRule, split_of
from longseq_data.vocabulary import BYTES, IGNORE, PROTEIN
from plain_samples import evaluation_samples, training_samples, training_windows


def documents(spec: StreamSpec) -> list[bytes]:
    """The tokens of every document, in file order."""
    encoder = spec.encoder
    records = [piece.record for w in evaluation_windows(spec_with(spec, length=10_000)) for piece in w.pieces]
    return [encoder.encode(record).tobytes() for record in records]


def spec_with(spec: StreamSpec, **changes) -> StreamSpec:
    from dataclasses import replace

    return replace(spec, **changes)


def equal(a, b) -> bool:
    segments = (a.segments is None) == (b.segments is None) and (a.segments is None or (a.segments == b.segments).all())
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets) and bool(segments)


@every_format
def test_a_crop_epoch_has_every_document_once(format, make):
    spec = make(format, length=10_000)
    expected = Counter(documents(spec))
    if format not in ("text", "images", "tokens", "wide"):
        written = [bytes(np.frombuffer(d, BYTES.dtype).tolist()).decode() for d in documents(spec)]
        assert Counter(written) == Counter(TEXTS)
    stream = training_samples(spec)
    orders = []
    for _ in range(2):
        epoch = [sample.targets for sample in islice(stream, expected.total())]
        found = [t[t < spec.vocabulary.ordinary].astype(spec.vocabulary.dtype).tobytes() for t in epoch]
        assert Counter(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]


@every_format
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_starting_late_equals_skipping(format, objective, make):
    for mode in modes(format):
        spec = make(format, objective=objective, split="train", **mode)
        everything = list(islice(training_samples(spec), 180))  # several epochs
        for start in (0, 1, 17, 60, 171):
            for late, sample in zip(training_samples(spec, start), everything[start : start + 5], strict=False):
                assert equal(late, sample), (mode, start)


@every_format
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_scored_targets_are_known_without_tokenising(format, objective, make):
    for mode in modes(format):
        spec = make(format, objective=objective, length=9, **mode)
        for windows, samples in [
            (islice(training_windows(spec, 3), 60), training_samples(spec, 3)),
            (evaluation_windows(spec), evaluation_samples(spec)),
        ]:
            for window, sample in zip(windows, samples, strict=False):
                assert spec.scored(window) == (sample.targets != IGNORE).sum()
                assert sample.tokens.dtype == spec.vocabulary.dtype
                assert sample.tokens.max() < spec.vocabulary.size


@every_format
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_evaluation_scores_every_token_once_and_counts_them(format, objective, make):
    for mode in modes(format):
        spec = make(format, objective=objective, **mode)
        samples = list(evaluation_samples(spec))
        if objective == "causal":
            scored = np.concatenate([sample.targets for sample in samples])
        else:
            shown = [np.where(s.targets == IGNORE, s.tokens.astype(np.int64), s.targets) for s in samples]
            scored = np.concatenate(shown)
            scored = scored[scored < spec.vocabulary.ordinary]
        counts = np.bincount(scored[scored != IGNORE], minlength=spec.vocabulary.size)
        assert target_counts(spec).tolist() == counts.tolist()
        if mode.get("crop") != "first":
            tokens = np.concatenate([np.frombuffer(d, spec.vocabulary.dtype) for d in documents(spec)])
            ordinary = slice(0, spec.vocabulary.ordinary)
            assert (counts[ordinary] == np.bincount(tokens, minlength=spec.vocabulary.size)[ordinary]).all()


@pytest.mark.parametrize("format", ["hub", "images", "tokens", "folder"])
def test_a_step_holds_the_same_samples_whatever_ranks_and_workers(format, make):
    spec = make(format, objective="masked")
    expected = [(s.tokens.tolist(), s.targets.tolist()) for s in islice(training_samples(spec), 24)]
    for world, workers in [(1, 0), (2, 0), (1, 2), (2, 3)]:
        found = {}
        for rank in range(world):
            batches = TrainingBatches(spec, batch_sequences=12 // world, accumulate=1, rank=rank, world=world)
            for step, batch in enumerate(islice(Loader(batches, workers), 2)):
                for row in range(12 // world):
                    real = batch["tokens"][row] != spec.vocabulary.pad
                    sample = batch["tokens"][row][real].tolist(), batch["targets"][row][real].tolist()
                    found[step * 12 + row * world + rank] = sample
        assert [found[g] for g in range(24)] == expected, (world, workers)


@every_format
def test_the_split_is_by_identifier_and_a_partition(format, make):
    whole = Counter(documents(make(format)))
    parts = Counter()
    for split in ("train", "valid", "test"):
        parts += Counter(documents(make(format, split=split)))
    assert parts == whole
    report = survey(make(format).reading, make(format).sources, strict=False, rule=SplitRule(0.2, 0.1))
    assert report.records == whole.total()
    assert report.splits["valid"] == len(documents(make(format, split="valid")))
    assert report.complete


def test_identifiers_of_a_folder_are_file_names(make):
    for split in ("train", "valid", "test"):
        for window in evaluation_windows(make("folder", split=split, length=100)):
            for piece in window.pieces:
                assert split_of(piece.record.identifier, 0.2, 0.1) == split
                assert piece.record.identifier.removesuffix(".txt").isdecimal()


# Boundaries


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("length", [3, 11, 64])
def test_reset_gives_whole_documents_with_bos_and_eos_and_segments(objective, length, make):
    spec = make("lines", packing="concat", reset=True, objective=objective, length=length)
    step = length
    stream = np.concatenate(
        [[BYTES.bos, *np.frombuffer(d, BYTES.dtype), BYTES.eos] for d in documents(spec)]
    )  # the documents one after the other
    borders = np.cumsum(stream == BYTES.bos)
    for number, sample in enumerate(evaluation_samples(spec)):
        at = slice(number * step, number * step + len(sample.tokens))
        if objective == "causal":
            assert (sample.tokens == stream[at]).all()
            following = stream[at.start + 1 : at.stop + 1]
            expected = np.where(following == BYTES.bos, IGNORE, following)
            assert (sample.targets == expected).all()
        assert (sample.segments == borders[at] - borders[at][0]).all()


def test_reset_trains_on_every_document_of_an_epoch(make):
    spec = make("lines", packing="concat", reset=True, length=13)
    tokens = sum(len(text) + 2 for text in TEXTS)
    stream = np.concatenate([s.tokens for s in islice(training_samples(spec), tokens // 13 + 1)])[:tokens]
    found = [bytes(part[1:-1].tolist()).decode() for part in np.split(stream, np.flatnonzero(stream == BYTES.bos))[1:]]
    assert Counter(found) == Counter(TEXTS)


def test_batches_carry_segments_and_pad_with_the_vocabulary(make):
    spec = make("lines", packing="concat", reset=True, length=9)
    for batches in (
        islice(TrainingBatches(spec, batch_sequences=3, accumulate=2, rank=0, world=1), 8),
        EvaluationBatches(spec, batch_sequences=3, rank=1, world=2, max_samples=7),
    ):
        for batch in batches:
            assert batch["segments"].shape == batch["tokens"].shape
            assert batch["segments"].dtype == torch.int64
            assert ((batch["segments"] == -1) == (batch["tokens"] == BYTES.pad)).all()
    plain = next(iter(TrainingBatches(make("lines"), batch_sequences=3, accumulate=1, rank=0, world=1)))
    assert set(plain) == {"tokens", "targets", "step_targets", "samples"}


def test_measured_batches_add_up_over_ranks_and_workers(make):
    for format in ("lines", "tokens"):
        spec = make(format, measured=True)
        for world, workers in [(1, 0), (3, 2)]:
            n_bytes = n_words = 0
            for rank in range(world):
                dataset = EvaluationBatches(spec, batch_sequences=2, rank=rank, world=world)
                for batch in Loader(dataset, workers):
                    n_bytes += int(batch["bytes"])
                    n_words += int(batch["words"])
            assert n_bytes == sum(len(text) for text in TEXTS)
            assert n_words == sum(len(text.split()) for text in TEXTS)


def test_cropped_first_is_the_beginning_in_training_and_evaluation(make):
    spec = make("lines", crop="first", length=5)
    beginnings = Counter(text[:5] for text in TEXTS)
    for samples in (islice(training_samples(spec), 37), evaluation_samples(spec)):
        found = Counter()
        for sample in samples:
            assert sample.tokens[0] == BYTES.bos
            found[bytes(t for t in sample.targets.tolist() if t < 256).decode()] += 1
        assert found == beginnings


@pytest.mark.parametrize("wrong", [{"crop": "last"}, {"reset": True, "packing": "crop"}])
def test_a_spec_rejects_what_makes_no_sense(wrong, make):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make("lines", **wrong)


def test_proteins_can_be_reset_too(make_spec):
    spec = make_spec(packing="concat", reset=True)
    sample = next(training_samples(spec))
    assert sample.tokens[0] == PROTEIN.bos
    assert sample.segments is not None


def test_a_survey_refuses_what_training_would(make, write):
    bad = write("bad.jsonl", '{"text": "a"}\n{}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        survey(Reading("auto", "bytes"), [bad], strict=False)
    latin = write("latin.txt", b"caf\xe9")
    tokens = make("tokens").reading.tokens
    with pytest.raises(DataError, match=r"latin\.txt, line 1: byte 0xe9"):
        survey(Reading("auto", tokens), [latin], strict=True)
    assert survey(Reading("auto", tokens), [latin], strict=False).residues == 4
    folder = write("a.png", b"no image").removesuffix("/a.png")
    with pytest.raises(DataError, match="cannot be read as an image"):
        survey(Reading("images", "pixels"), [folder], strict=False)


def test_a_survey_stops_at_its_budget(make, monkeypatch):
    monkeypatch.setattr("longseq_data.ingest.block.FIRST_BYTES", 1)
    spec = make("folder")
    report = survey(spec.reading, spec.sources, strict=False, total_bytes=100)
    assert not report.complete
    assert 100 <= report.residues < 160
    assert survey(spec.reading, spec.sources, strict=False).unit == "bytes of text"
    report = survey(make("lines").reading, make("lines").sources, strict=False, max_bytes=50)
    assert not report.complete
    assert report.residues < 100


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_proteins_in_a_table_give_the_samples_of_fasta(objective, make_spec, proteins, tmp_path):
    records = [record for source in proteins for record in read_records(source)]
    rows = [json.dumps({"id": record.identifier, "text": record.sequence}) for record in records]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    (tmp_path / "all.fasta").write_text("".join(f">{r.identifier}\n{r.sequence}\n" for r in records))
    fasta = make_spec(sources=(str(tmp_path / "all.fasta"),), objective=objective, split="train")
    table = make_spec(
        sources=(str(tmp_path / "all.jsonl"),), objective=objective, split="train", reading=Reading("auto", "protein")
    )
    for samples in (training_samples, evaluation_samples):
        pairs = islice(zip(samples(fasta), samples(table), strict=True), 60)
        assert all(equal(one, other) for one, other in pairs)
    assert target_counts(fasta).tolist() == target_counts(table).tolist()
