"""Short sequences first: by the step alone, and with the right mean over the targets that are left."""

from __future__ import annotations

import itertools

import pytest
import torch

from longseq.config.loading import load_config
from longseq.config.training import TrainerConfig
from longseq.errors import ConfigError
from longseq.training.callbacks.length_warmup import Shortened, length_at

LENGTH = 24


def batches(first: int, accumulate: int, seed: int = 0):
    """Endless micro-batches, each a function of its number."""
    for number in itertools.count(first):
        torch.manual_seed(number)
        tokens, targets = torch.randint(25, (2, 3, LENGTH - number % 3))
        targets[torch.rand(targets.shape) < 0.5] = -100
        yield {"tokens": tokens, "targets": targets, "step_targets": torch.tensor(-1), "number": torch.tensor(number)}


@pytest.fixture
def config(folder):
    def config(*overrides):
        warm = ("trainer.length_warmup_steps=7", "trainer.length_warmup_start=5", f"data.length={LENGTH}")
        return load_config(
            "small.yaml", ["data.train=proteins.fasta", f"data.batch_tokens={8 * LENGTH}", *warm, *overrides]
        )

    return config


def test_the_length_rises_from_start_to_full_in_multiples_of_the_start():
    config = TrainerConfig(length_warmup_steps=100, length_warmup_start=64)
    lengths = [length_at(step, config, 512) for step in range(200)]
    assert lengths[0] == 64
    assert lengths == sorted(lengths)
    assert set(lengths) == set(range(64, 513, 64))
    assert lengths[100:] == [512] * 100
    assert lengths.count(64) in (14, 15)  # evenly: 7 lengths share the 100 steps


@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_batch_is_told_the_targets_that_are_left_in_the_whole_step(config, accumulate):
    config = config(f"trainer.accumulate={accumulate}")
    cut = itertools.islice(Shortened(batches(0, accumulate), config, 0), 10 * accumulate)
    whole = batches(0, accumulate)
    for step in range(10):
        length = length_at(step, config.trainer, LENGTH)
        rows = [next(cut) for _ in range(accumulate)]
        originals = [next(whole) for _ in range(accumulate)]
        for row, original in zip(rows, originals, strict=True):
            assert torch.equal(row["tokens"], original["tokens"][:, :length])
            assert torch.equal(row["targets"], original["targets"][:, :length])
            assert row["number"] == original["number"]
        if step < 7:
            assert length < LENGTH
            left = sum(int((original["targets"][:, :length] != -100).sum()) for original in originals)
            assert all(row["step_targets"] == left for row in rows)
        else:
            assert all(row["step_targets"] == -1 for row in rows)  # as the data give them


@pytest.mark.parametrize("start", [3, 7, 9])
def test_a_resumed_run_goes_on_with_the_length_of_its_step(config, start):
    config = config("trainer.accumulate=2")
    whole = itertools.islice(Shortened(batches(0, 2), config, 0), 2 * start, 2 * start + 10)
    resumed = Shortened(batches(2 * start, 2), config, start)
    for expected, got in zip(whole, resumed, strict=False):
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_start_beyond_the_length_is_refused(config):
    with pytest.raises(ConfigError, match=r"trainer\.length_warmup_start=25 is more than data\.length=24"):
        config("trainer.length_warmup_start=25")
