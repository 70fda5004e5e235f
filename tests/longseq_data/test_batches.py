"""Who gets which sample: independent of ranks, workers, micro-batches and restarts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longseq_data.errors import DataError
from longseq_data.ingest.survey import survey
from longseq_data.readers.reading import FASTA
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.vocabulary import IGNORE, PAD
from plain_samples import evaluation_samples, training_samples

Row = tuple[tuple[int, ...], tuple[int, ...]]


def rows(batch) -> list[Row]:
    """The samples of a batch without padding; filler rows left out."""
    found = []
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        real = tokens != PAD
        assert real[: real.sum()].all()  # padding at the end only
        assert (targets[~real] == IGNORE).all()
        if real.any():
            found.append((tuple(tokens[real].tolist()), tuple(targets[real].tolist())))
    return found


def as_rows(samples) -> list[Row]:
    return [(tuple(sample.tokens.tolist()), tuple(sample.targets.tolist())) for sample in samples]


def training_steps(spec, steps, *, world, accumulate, batch_sequences, start_step=0, workers=0):
    """For each step, for each rank, its micro-batches."""
    per_rank = []
    for rank in range(world):
        batches = TrainingBatches(
            spec,
            batch_sequences=batch_sequences,
            accumulate=accumulate,
            rank=rank,
            world=world,
            start=start_step * world * accumulate * batch_sequences,
        )
        stream = list(islice(Loader(batches, workers), steps * accumulate))
        per_rank.append([stream[i : i + accumulate] for i in range(0, len(stream), accumulate)])
    return list(zip(*per_rank, strict=True))


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_a_step_holds_the_same_samples_however_it_is_shared_out(packing, objective, make_spec):
    spec = make_spec(packing=packing, objective=objective)
    steps, group = 5, 12
    stream = as_rows(islice(training_samples(spec), steps * group))
    for world, accumulate in [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (3, 2), (4, 3), (12, 1)]:
        found = training_steps(
            spec, steps, world=world, accumulate=accumulate, batch_sequences=group // world // accumulate
        )
        for s, step in enumerate(found):
            expected = stream[s * group : (s + 1) * group]
            for rank, micro_batches in enumerate(step):
                assert [row for batch in micro_batches for row in rows(batch)] == expected[rank::world]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_does_not_depend_on_workers(workers, make_spec):
    spec = make_spec(objective="masked")
    shape = {"world": 2, "accumulate": 2, "batch_sequences": 3}
    for step, expected in zip(
        training_steps(spec, 3, **shape, workers=workers), training_steps(spec, 3, **shape), strict=True
    ):
        for mine, theirs in zip(step, expected, strict=True):
            for batch, other in zip(mine, theirs, strict=True):
                assert all(torch.equal(batch[key], other[key]) for key in other)


def test_workers_can_read_a_url_that_the_main_process_has_read_before(make_spec, proteins, http_address):
    local = make_spec()
    remote = make_spec(sources=tuple(f"{http_address}/{Path(source).name}" for source in proteins))
    # leaves a network thread behind, which a fork does not copy
    assert survey(FASTA, remote.sources, strict=True).records == 37
    shape = {"batch_sequences": 4, "rank": 0, "world": 1}
    found = [rows(batch) for batch in Loader(EvaluationBatches(remote, **shape), workers=2)]
    assert found == [rows(batch) for batch in EvaluationBatches(local, **shape)]


@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_starting_at_a_step_equals_skipping_the_steps_before(packing, make_spec):
    spec = make_spec(packing=packing)
    shape = {"world": 2, "accumulate": 2, "batch_sequences": 3}
    whole = training_steps(spec, 9, **shape)
    for start in (1, 4, 8):
        (step,) = training_steps(spec, 1, **shape, start_step=start)
        for mine, theirs in zip(step, whole[start], strict=True):
            assert [rows(batch) for batch in mine] == [rows(batch) for batch in theirs]


def test_a_run_goes_on_with_another_world_size(make_spec):
    spec = make_spec()
    steps = training_steps(spec, 2, world=3, accumulate=1, batch_sequences=2, start_step=2)
    found = sorted(row for step in steps for rank in step for batch in rank for row in rows(batch))
    assert found == sorted(as_rows(islice(training_samples(spec, 12), 12)))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_step_targets_count_the_scored_targets_of_the_rank_in_the_step(objective, make_spec):
    for step in training_steps(make_spec(objective=objective), 4, world=2, accumulate=3, batch_sequences=2):
        for micro_batches in step:
            scored = sum(int((batch["targets"] != IGNORE).sum()) for batch in micro_batches)
            assert [int(batch["step_targets"]) for batch in micro_batches] == [scored] * 3


def test_each_batch_says_how_many_samples_are_consumed_after_its_step(make_spec):
    batches = TrainingBatches(make_spec(), batch_sequences=2, accumulate=3, rank=1, world=2, start=24)
    assert [int(batch["samples"]) for batch in islice(batches, 7)] == [36] * 3 + [48] * 3 + [60]


def test_batches_are_int64_and_padded_to_their_longest_sample(make_spec):
    batches = TrainingBatches(make_spec(length=50), batch_sequences=5, accumulate=1, rank=0, world=1)
    for batch in islice(batches, 6):
        assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
        assert batch["step_targets"].shape == ()
        assert batch["tokens"].shape == batch["targets"].shape == (5, max(len(tokens) for tokens, _ in rows(batch)))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 1), (2, 3)])
def test_evaluation_has_every_sample_once_and_equally_many_batches_a_rank(world, workers, make_spec):
    spec = make_spec()
    per_rank = [
        list(Loader(EvaluationBatches(spec, batch_sequences=3, rank=rank, world=world), workers))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = sorted(row for batches in per_rank for batch in batches for row in rows(batch))
    assert found == sorted(as_rows(evaluation_samples(spec)))
    for batches in per_rank:
        assert all(batch["tokens"].shape[0] == 3 for batch in batches)
        assert all("step_targets" not in batch for batch in batches)


def test_ranks_without_samples_get_filler_rows(make_spec):
    batches = [
        list(EvaluationBatches(make_spec(), batch_sequences=2, rank=r, world=4, max_samples=9)) for r in range(4)
    ]
    assert [len(b) for b in batches] == [2, 2, 2, 2]
    assert [sum(len(rows(batch)) for batch in b) for b in batches] == [3, 2, 2, 2]
    filler = batches[3][1]
    assert (filler["tokens"] == PAD).all()
    assert (filler["targets"] == IGNORE).all()
    assert filler["tokens"].numel()


def test_only_the_first_worker_of_the_first_rank_warns_of_unknown_letters(make_spec, write, caplog, monkeypatch):
    spec = make_spec(sources=(write("a.fasta", ">a\nAJ\n"),), split=None)
    for rank, worker, warnings in [(0, (0, 1), 1), (0, (0, 2), 1), (0, (1, 2), 0), (1, (0, 1), 0)]:
        info = SimpleNamespace(id=worker[0], num_workers=worker[1])
        monkeypatch.setattr("longseq_data.samples.batches.get_worker_info", lambda info=info: info)
        caplog.clear()
        batches = TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=rank, world=2)
        list(islice(batches, 3))
        assert len(caplog.messages) == warnings
    assert list(EvaluationBatches(spec, batch_sequences=1, rank=0, world=1))
    assert not caplog.messages


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_data_error_reaches_the_main_process_as_its_one_sentence(workers, evaluate, make_spec, write):
    source = write("bad.fasta", ">a\nACD\n>b\n")
    spec = make_spec(sources=(source,))
    if evaluate:
        dataset = EvaluationBatches(spec, batch_sequences=1, rank=0, world=1)
    else:
        dataset = TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=0, world=1)
    with pytest.raises(DataError) as caught:
        list(Loader(dataset, workers))
    expected = f"{source}, line 3: record 'b' has no residues; remove it, or restore its sequence."
    assert type(caught.value) is DataError
    assert str(caught.value) == expected


def test_a_loader_has_no_length_and_can_be_read_again(make_spec):
    batches = Loader(EvaluationBatches(make_spec(), batch_sequences=3, rank=0, world=1), 0)
    assert not hasattr(batches, "__len__")
    assert [rows(batch) for batch in batches] == [rows(batch) for batch in batches]


@pytest.mark.parametrize(
    "wrong", [{"batch_sequences": 0}, {"accumulate": 0}, {"world": 0}, {"rank": 2}, {"rank": -1}], ids=str
)
def test_impossible_sizes_are_refused(wrong, make_spec):
    with pytest.raises(ValueError, match="rank < world"):
        TrainingBatches(make_spec(), **{"batch_sequences": 1, "accumulate": 1, "rank": 0, "world": 2, **wrong})
