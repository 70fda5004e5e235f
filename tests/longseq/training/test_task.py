"""The loss of packed documents, for every objective and kind of attention."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from longseq.config.loading import load_config
from longseq.data import resolve_sources, split_spec
from longseq.evaluation.split_scores import score
from longseq.training.rehearsal import _Watch
from longseq.training.task import LanguageModelling
from longseq_data.samples.batches import EvaluationBatches, unpack
from longseq_data.samples.transport import pack
from longseq_data.vocabulary import BYTES, IGNORE
from plain_samples import Sample, collate, evaluation_samples

LINES = [f"document {i} says {'abc' * (i % 4)}" for i in range(9)]


@pytest.fixture
def make(folder: Path):
    """make(override, ...): a configuration over lines of text, and its task in evaluation mode, in float64."""

    def make(*overrides: str):
        (folder / "lines.txt").write_text("\n".join(LINES))
        sizes = ["model.dim=24", "model.heads=2", "model.depth=2", "model.ffn_dim=32", "attention.features=16"]
        data = ["data.train=lines.txt", "data.format=lines", "data.valid_fraction=0.01", "data.test=lines.txt"]
        config = load_config("small.yaml", [*data, *sizes, *overrides])
        resolve_sources(config)
        return config, LanguageModelling(config).double().eval()

    return make


def alone(task: LanguageModelling, sample: Sample, segment: int) -> torch.Tensor:
    """The summed loss of one document of a packed sample, given to the model by itself."""
    chosen = sample.segments == segment
    tokens = torch.from_numpy(sample.tokens[chosen].astype("int64"))[None]
    targets = torch.from_numpy(sample.targets[chosen].astype("int64"))
    return F.cross_entropy(task.model(tokens)[0], targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", ["favor", "exact"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_reset_row_has_the_loss_of_its_documents_one_by_one(make, kind, objective):
    config, task = make("data.reset=true", f"attention.kind={kind}", f"model.objective={objective}")
    config.data.length = 50
    samples = list(evaluation_samples(split_spec(config, "test")))
    assert max(int(sample.segments.max()) for sample in samples) >= 2
    expected = sum(alone(task, sample, k) for sample in samples for k in range(int(sample.segments.max()) + 1))
    rows = unpack(pack(collate(samples, len(samples) + 1, BYTES)))  # a filler row, and padding
    batch = task.on_before_batch_transfer(rows, 0)
    assert task._score(batch, task.valid_sums).item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_reset_documents_see_each_other(make):
    config, task = make()
    config.data.length = 50
    samples = list(evaluation_samples(split_spec(config, "test")))
    assert all(sample.segments is None for sample in samples)
    config, reset = make("data.reset=true")
    config.data.length = 50
    packed = next(evaluation_samples(split_spec(config, "test")))
    row = torch.from_numpy(packed.tokens.astype("int64"))[None]
    segments = torch.from_numpy(packed.segments.astype("int64"))[None]
    assert not torch.allclose(task.model(row), reset.model(row, None, segments))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_evaluation_scores_packed_documents_as_training_does(make, objective):
    config, task = make("data.reset=true", f"model.objective={objective}")
    config.data.length = 21
    spec = split_spec(config, "test")
    scores = score(task.model, spec, batch_sequences=3)
    total = targets = 0
    for batch in EvaluationBatches(spec, batch_sequences=2, rank=0, world=1):
        batch = task.on_before_batch_transfer(batch, 0)
        total += task._score(batch, task.valid_sums).item()
        targets += int((batch["targets"] != IGNORE).sum())
    assert scores.loss.sum() / scores.targets.sum() == pytest.approx(total / targets, rel=1e-5)
    if objective == "masked":
        assert not scores.extent.any()
    else:
        assert scores.extent[:2].tolist() == [sum(map(len, LINES)), sum(len(line.split()) for line in LINES)]


def test_the_loss_of_all_documents_is_that_of_whole_ones_however_they_are_packed(make):
    """Windows longer than every document: reset rows and single documents add up to the same."""
    losses = []
    for overrides in (["data.reset=true"], ["data.packing=crop"]):
        config, task = make(*overrides)
        config.data.length = 10_000
        scores = score(task.model, split_spec(config, "test"), batch_sequences=4)
        losses.append((scores.loss.sum(), int(scores.targets.sum()), scores.extent[:2].tolist()))
    assert losses[0][1:] == losses[1][1:]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_a_rehearsal_packs_documents_where_the_training_does(make):
    """They cost memory of their own."""
    for overrides, documents in (((), None), (("data.reset=true",), 3)):
        config, task = make("data.length=800", "data.batch_tokens=1600", *overrides)
        batch = {"samples": torch.tensor(7)}
        trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1)
        _Watch(None, config, None, config.data.length).on_train_batch_start(trainer, task, batch, 0)
        assert batch["tokens"].shape == (2, 800)
        assert ("segments" in batch) == (documents is not None)
        if documents:
            assert [len(row.unique()) for row in batch["segments"]] == [documents] * 2
        assert task._score(batch, task.valid_sums).isfinite()
