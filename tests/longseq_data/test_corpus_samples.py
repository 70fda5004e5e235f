"""Samples of a prepared corpus: what they hold, held against the rows of its files, and that nothing moves them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import tables, write_files
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.vocabulary import BOS, EOS, IGNORE, MASK, PAD, RESIDUES

PACKINGS = {
    "concat": {"packing": "concat"},
    "reset": {"packing": "concat", "reset": True},
    "crop": {"packing": "crop"},
    "first": {"packing": "crop", "crop": "first"},
    "bucket": {"packing": "bucket", "batch_tokens": 1500},
}

NEUTRAL = {"objective": "causal", "seed": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred proteins, prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    names = write_files(folder / "files", records=330, files=2)
    prepare(PrepareConfig(sources=names, output=str(folder / "corpus"), workers=1, valid_fraction=0.2))
    return folder / "corpus"


@pytest.fixture(scope="module")
def proteins(corpus: Path) -> dict[str, list[np.ndarray]]:
    """The records of each split as pyarrow reads them."""
    return {name: [np.array(row) for row in table["tokens"].to_pylist()] for name, table in tables(corpus).items()}


@pytest.fixture
def make_spec(corpus: Path):
    def make_spec(packing: str = "crop", objective: str = "causal", split: str = "train", **changes) -> CorpusSpec:
        settings = {"length": 37, "seed": 5, **PACKINGS[packing], **changes}
        return CorpusSpec(str(corpus), split, objective=objective, **settings)

    return make_spec


def training(spec: CorpusSpec, *, rows: int = 4, accumulate: int = 1, rank: int = 0, world: int = 1, start: int = 0):
    return TrainingBatches(spec, batch_sequences=rows, accumulate=accumulate, rank=rank, world=world, start=start)


def samples(batches) -> list[tuple[tuple[int, ...], ...]]:
    """(tokens, targets, segments) of every row, without padding; filler rows left out."""
    found = []
    for batch in batches:
        segments = batch.get("segments", torch.zeros_like(batch["tokens"]))
        for tokens, targets, documents in zip(batch["tokens"], batch["targets"], segments, strict=True):
            real = tokens != PAD
            assert real[: real.sum()].all(), "padding stands at the end"
            assert (targets[~real] == IGNORE).all()
            assert "segments" not in batch or (documents[~real] == -1).all()
            if real.any():
                found.append(tuple(tuple(values[real].tolist()) for values in (tokens, targets, documents)))
    return found


def stream_of(rows: list[np.ndarray], reset: bool) -> np.ndarray:
    begin = [[BOS]] if reset else []
    return np.concatenate([np.concatenate([*begin, row, [EOS]]) for row in rows])


@pytest.mark.parametrize("reset", [False, True])
def test_joined_windows_of_an_epoch_go_once_round_the_stream(make_spec, proteins, reset):
    spec = make_spec("reset" if reset else "concat", "masked")
    stream = stream_of(proteins["train"], reset)
    windows = -(-len(stream) // 37)
    assert spec.epoch_samples == windows
    offsets = set()
    for epoch in range(2):
        numbers = np.arange(epoch * windows, (epoch + 1) * windows)
        plan = spec.cut.plan(numbers)
        assert (plan.sizes == 37).all()
        seen = Counter(((plan.starts[:, None] + np.arange(37)) % len(stream)).ravel().tolist())
        assert set(seen) == set(range(len(stream)))
        assert sum(seen.values()) - len(stream) < 37  # the rest of the last window comes twice
        offsets.add(tuple(sorted(plan.starts.tolist())))
        assert plan.starts.tolist() != sorted(plan.starts.tolist())
        out, segments = plan.rows()
        assert (segments is None) != reset
        np.testing.assert_array_equal(out, np.resize(stream, 2 * len(stream))[plan.starts[:, None] + np.arange(37)])
    assert len(offsets) == 2, "each epoch has its own offset"


def test_causal_windows_predict_the_next_token_across_documents(make_spec):
    for tokens, targets, _ in samples(islice(training(make_spec("concat")), 9)):
        assert len(tokens) == 37
        assert tokens[1:] == targets[:-1]
        assert BOS not in tokens


def test_with_reset_each_document_has_bos_and_eos_and_its_own_number(make_spec):
    seen = 0
    for tokens, targets, segments in samples(islice(training(make_spec("reset")), 30)):
        assert segments[0] == 0
        for i in range(36):
            border = tokens[i] == EOS
            assert segments[i + 1] == segments[i] + border
            assert (tokens[i + 1] == BOS) == border
            assert targets[i] == (IGNORE if border else tokens[i + 1])
            seen += border
        assert targets[36] == IGNORE if tokens[36] == EOS else targets[36] != BOS
    assert seen > 20


def test_streaming_and_corpus_give_a_reset_document_the_same_tokens_targets_and_segments(make_spec, proteins, tmp_path):
    from longseq_data.samples.streaming import StreamSpec
    from longseq_data.vocabulary import decode
    from plain_samples import evaluation_samples

    path = tmp_path / "same.fasta"
    path.write_text("".join(f">r{i}\n{decode(row)}\n" for i, row in enumerate(proteins["valid"])))
    for packing in PACKINGS:
        for objective in ("causal", "masked"):
            spec = make_spec(packing, objective, "valid")
            settings = {key: value for key, value in PACKINGS[packing].items() if key in ("reset", "crop")}
            way = "concat" if packing in ("concat", "reset") else "crop"
            stream = StreamSpec((str(path),), None, 0, 0, 37, way, objective, 5, **settings)
            expected = [
                tuple(
                    tuple(values.tolist())
                    for values in (s.tokens, s.targets, np.zeros_like(s.tokens) if s.segments is None else s.segments)
                )
                for s in evaluation_samples(stream)
            ]
            assert samples(EvaluationBatches(spec, batch_sequences=5, rank=0, world=1)) == expected, (
                packing,
                objective,
            )
            np.testing.assert_array_equal(spec.target_counts(), stream.target_counts())


FEW = {"one": ["M"], "one long": ["MKVLA" * 20], "two": ["M", "MK"], "two long": ["MKVLA" * 20, "W"]}


def ways_to_read_few():
    """Of two objectives, packings and few records every pair; all three together are long."""
    for i, objective in enumerate(("causal", "masked")):
        for j, packing in enumerate(PACKINGS):
            for k, (name, records) in enumerate(FEW.items()):
                marks = pytest.mark.long if (i + j + k) % 2 else ()
                yield pytest.param(objective, packing, records, id=f"{objective}-{packing}-{name}", marks=marks)


@pytest.mark.parametrize(("objective", "packing", "records"), ways_to_read_few())
def test_a_split_of_one_or_two_records_is_read_as_it_is(tmp_path, packing, objective, records):
    from longseq_data.samples.streaming import StreamSpec
    from longseq_data.vocabulary import decode
    from plain_samples import evaluation_samples

    path, output = tmp_path / "few.fasta", tmp_path / "few"
    path.write_text("".join(f">r{i}\n{record}\n" for i, record in enumerate(records)))
    prepare(PrepareConfig([str(path)], str(output), workers=1, valid_fraction=0, test_fraction=0))
    rows = [np.array(row) for row in tables(output)["train"]["tokens"].to_pylist()]
    path.write_text("".join(f">r{i}\n{decode(row)}\n" for i, row in enumerate(rows)))  # in the corpus's order
    spec = CorpusSpec(str(output), "train", 37, objective=objective, seed=5, **PACKINGS[packing])

    settings = {key: value for key, value in PACKINGS[packing].items() if key in ("reset", "crop")}
    way = "concat" if packing in ("concat", "reset") else "crop"
    stream = StreamSpec((str(path),), None, 0, 0, 37, way, objective, 5, **settings)
    expected = [(tuple(s.tokens.tolist()), tuple(s.targets.tolist())) for s in evaluation_samples(stream)]
    assert [row[:2] for row in samples(EvaluationBatches(spec, batch_sequences=5, rank=0, world=1))] == expected
    np.testing.assert_array_equal(spec.target_counts(), stream.target_counts())

    # More ranks than records: each sample is on one of them, and is made of the records and nothing else.
    whole = stream_of(rows, packing == "reset") if way == "concat" else None
    places = [np.concatenate([[BOS], row, [EOS]]) for row in rows] if whole is None else [np.tile(whole, 40)]
    texts = ["".join(map(chr, place)) for place in places]
    ranks = [islice(training(spec, rows=1, rank=rank, world=5), 8) for rank in range(5)]
    found = [sorted(samples(parts)) for parts in zip(*ranks, strict=True)]
    assert found == [sorted(samples([batch])) for batch in islice(training(spec, rows=5), 8)]
    for tokens, targets, _ in (row for step in found for row in step):
        read = tokens if objective == "causal" else np.where(np.array(targets) == IGNORE, tokens, targets).tolist()
        assert any("".join(map(chr, read)) in text for text in texts)


@pytest.mark.parametrize("crop", ["crop", "first", "bucket"])
def test_crops_of_an_epoch_are_every_record_once(make_spec, proteins, crop):
    spec = make_spec(crop, "masked")
    n = len(proteins["train"])
    for epoch in range(2):
        plan = spec.cut.plan(np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(plan.records.tolist()) == list(range(n))
        out, _ = plan.rows()
        for row, record, start, size in zip(out, plan.records, plan.starts, plan.sizes, strict=True):
            whole = np.concatenate([[BOS], proteins["train"][record], [EOS]])
            assert size == min(len(whole), 37)
            assert start == 0 or crop != "first"
            np.testing.assert_array_equal(row[:size], whole[start : start + size])
            assert (row[size:] == IGNORE).all()


def test_a_random_crop_can_begin_anywhere(make_spec, proteins):
    spec, n = make_spec("crop", "masked"), len(proteins["train"])
    longest = int(np.argmax([len(row) for row in proteins["train"]]))
    plan = spec.cut.plan(np.arange(900 * n))
    starts = plan.starts[plan.records == longest]
    slack = len(proteins["train"][longest]) + 2 - 37
    assert len(starts) == 900
    assert starts.min() < slack * 0.02
    assert starts.max() > slack * 0.98
    assert abs(starts.mean() / slack - 0.5) < 0.05


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_step_holds_the_same_samples_however_it_is_shared_out(make_spec, packing, objective):
    spec = make_spec(packing, objective)
    expected = None
    for world, accumulate in [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (3, 2), (12, 1)]:
        per_rank = []
        for rank in range(world):
            batches = training(spec, rows=12 // world // accumulate, accumulate=accumulate, rank=rank, world=world)
            per_rank.append(list(islice(batches, 6 * accumulate)))
        steps = []
        for step in range(6):
            here = [batches[step * accumulate : (step + 1) * accumulate] for batches in per_rank]
            steps.append(sorted(row for mine in here for row in samples(mine)))
            for mine in here:
                scored = sum(int((batch["targets"] != IGNORE).sum()) for batch in mine)
                assert [int(batch["step_targets"]) for batch in mine] == [scored] * accumulate
            assert len({int(batch["samples"]) for mine in here for batch in mine}) == 1
        expected = expected or steps
        assert steps == expected, (world, accumulate)


@pytest.mark.parametrize("packing", PACKINGS)
def test_training_goes_on_from_the_samples_consumed(make_spec, packing):
    spec = make_spec(packing, "masked")
    whole = list(islice(training(spec), 90))
    for place in (0, 1, 30, 88):
        rest = training(spec, start=int(whole[place]["samples"]))
        assert samples(islice(rest, 90 - place - 1)) == samples(whole[place + 1 :])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("packing", ["reset", "bucket"])
def test_workers_do_not_change_the_order(make_spec, packing, workers):
    batches = training(make_spec(packing, "masked"), accumulate=2)
    found = list(islice(Loader(batches, workers), 11))
    for mine, theirs in zip(found, islice(batches, 11), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_buckets_keep_the_budget_and_waste_less_than_a_tenth(make_spec, proteins):
    spec = make_spec("bucket", length=200, batch_tokens=2000)
    real = tokens = samples_seen = 0
    seen: Counter[int] = Counter()
    for batch in islice(training(spec), 300):
        assert batch["tokens"].numel() <= 2000
        real += int((batch["tokens"] != PAD).sum())
        tokens += batch["tokens"].numel()
        samples_seen += len(batch["tokens"])
        assert int(batch["samples"]) == samples_seen
        seen.update(batch["tokens"].shape[1:])
    assert real / tokens > 0.9
    assert tokens / 300 > 1700, "steps are nearly full"
    assert len(seen) > 20, "lengths differ from step to step"


@pytest.mark.parametrize("world", [1, 3])
def test_a_start_inside_a_bucketed_step_gives_its_rest_and_goes_on(make_spec, world):
    spec = make_spec("bucket", "masked")

    def steps(start: int, count: int) -> list[tuple[int, list]]:
        ranks = [islice(training(spec, rank=rank, world=world, start=start), count) for rank in range(world)]
        return [(int(parts[0]["samples"]), sorted(samples(parts))) for parts in zip(*ranks, strict=True)]

    whole = steps(0, 9)
    first, second = whole[3][0], whole[4][0]
    for start in range(first + 1, second):
        (consumed, rest), *others = steps(start, 5)
        assert consumed == second
        assert len(rest) == second - start
        assert not Counter(map(repr, rest)) - Counter(map(repr, whole[4][1]))
        assert others == whole[5:]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1), (4, 0), (2, 3)])
def test_evaluation_has_every_sample_once_and_equally_many_batches_a_rank(make_spec, packing, world, workers):
    spec = make_spec(packing, "masked", "valid")
    per_rank = [
        list(Loader(EvaluationBatches(spec, batch_sequences=3, rank=rank, world=world), workers))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = sorted(row for batches in per_rank for row in samples(batches))
    assert found == sorted(samples(EvaluationBatches(spec, batch_sequences=1000, rank=0, world=1)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_sampled_evaluation_depends_on_no_seed_and_holds_no_sample_twice(make_spec, packing):
    shape = {"batch_sequences": 4, "rank": 0, "world": 1}
    few = samples(EvaluationBatches(make_spec(packing, seed=5), **shape, max_samples=10))
    assert len(few) == 10
    assert few == samples(EvaluationBatches(make_spec(packing, seed=6), **shape, max_samples=10))
    whole = Counter(samples(EvaluationBatches(make_spec(packing), **shape)))
    if packing == "concat":  # where a pass is cut does not depend on the sample
        assert not Counter(few) - whole
    assert few == samples(EvaluationBatches(make_spec(packing), **shape, max_samples=11))[:10]
    assert len(samples(EvaluationBatches(make_spec(packing), **shape, max_samples=10**6))) == whole.total()


def test_masks_hide_no_special_token_and_are_those_of_the_sample(make_spec):
    spec = make_spec("concat", "masked")
    for row, again in zip(samples(islice(training(spec), 9)), samples(islice(training(spec, rows=2), 18)), strict=True):
        assert row == again
        for token, target in zip(*row[:2], strict=True):
            assert target == IGNORE or target < RESIDUES
            assert token != MASK or target != IGNORE


def test_a_corpus_smaller_than_a_window_goes_round(tmp_path):
    (tmp_path / "tiny.fasta").write_text(">a\nACD\n>b\nWY\n")
    output = str(tmp_path / "tiny")
    prepare(PrepareConfig([str(tmp_path / "tiny.fasta")], output, workers=1, valid_fraction=0, test_fraction=0))
    for reset in (False, True):
        spec = CorpusSpec(output, "train", 40, "concat", "causal", 0, reset=reset)
        assert spec.epoch_samples == 1
        ((tokens, _, segments),) = samples(islice(training(spec, rows=1), 1))
        period = 5 + 2 * (1 + reset)
        assert len(tokens) == 40
        assert tokens[:-period] == tokens[period:]
        if reset:
            assert segments[-1] in (7, 8, 9)
    assert len(samples(EvaluationBatches(spec, batch_sequences=2, rank=0, world=1))) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"packing": "bags"},
        {"objective": "prefix"},
        {"crop": "last"},
        {"reset": True, "packing": "crop"},
        {"length": 1},
        {"batch_tokens": 36, "packing": "bucket"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CorpusSpec(**{"path": "x", "split": "train", "length": 37, "packing": "crop", **NEUTRAL, **wrong})
