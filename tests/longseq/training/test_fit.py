"""What Lightning would do by itself in a training, and does not."""

from __future__ import annotations

import sys
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.distributed import HashStore

from gpu_streams import Streams
from longseq.config.loading import load_config
from longseq.data import identities
from longseq.errors import RunError
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit

TINY = ("model.dim=16", "model.depth=1", "model.heads=2", "model.ffn_dim=16", "attention.features=8")
ALONE = ("trainer.strategy=single", "trainer.max_steps=2", "trainer.valid_every=0", "trainer.probe_every=0")


@pytest.mark.parametrize("asked", [False, True])
def test_no_batch_waits_for_other_ranks_to_say_whether_they_are_stopped(folder, monkeypatch, asked):
    """Lightning broadcasts before each batch where there are several ranks; asked: with its own loop put back."""
    config = load_config("small.yaml", [f"data.train={folder}/proteins.fasta", *TINY, *ALONE, "trainer.accumulate=2"])
    several = property(lambda _: 2 if sys._getframe(1).f_code.co_name == "advance" else 1)  # for the loop's eyes
    monkeypatch.setattr(pl.Trainer, "world_size", several)
    if asked:
        own = _TrainingEpochLoop._broadcast_sigterm_tensor
        monkeypatch.setattr(
            _TrainingEpochLoop, "_broadcast_sigterm_tensor", property(lambda loop: lambda: own(loop), lambda *_: None)
        )
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with mock.patch("torch.distributed.broadcast", wraps=dist.broadcast) as broadcast:
            assert fit(Run.create(config, default_name="one"), config, None, StopFlag())
    finally:
        dist.destroy_process_group()
    assert broadcast.call_count == (4 if asked else 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_trains_in_each_precision_with_clipped_gradients(folder, precision):
    overrides = (*TINY, *ALONE, f"trainer.precision={precision}", "optim.clip=0.5")
    config = load_config("small.yaml", [f"data.train={folder}/proteins.fasta", *overrides])
    run = Run.create(config, default_name="one")
    assert fit(run, config, None, StopFlag())
    assert run.last_good().position.step == 2
    assert torch.isfinite(torch.tensor(run.last_good().position.unlogged)).all()


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_file_that_was_replaced_since_the_starts_look_is_no_data_to_train_on(folder, tmp_path, cache):
    source = tmp_path / "proteins.fasta"
    source.write_bytes((folder / "proteins.fasta").read_bytes())
    config = load_config("small.yaml", [f"data.train={source}", f"data.cache={cache}", *TINY, *ALONE])
    run = Run.create(config, default_name=f"replaced-{cache}")
    run.record_data(identities(config))
    source.write_bytes(source.read_bytes()[:-3] + b"MKV")  # of the same size
    with pytest.raises(RunError, match=r"proteins.fasta \(data.train\) has changed since the run was started"):
        fit(run, config, None, StopFlag())
    run.record_data(identities(config))
    assert fit(run, config, None, StopFlag())


def test_a_checkpoint_copied_beside_the_training_is_that_of_its_step(folder, monkeypatch):
    """Copies are made as late as a GPU could: when the next step's weights wait for them."""
    overrides = (*TINY, *ALONE, "trainer.max_steps=3", "trainer.checkpoint_every=1", "optim.warmup_steps=1")

    def written(name: str) -> list[bytes]:
        given = [f"data.train={folder}/proteins.fasta", f"run.name={name}", *overrides]
        config = load_config("small.yaml", given)
        run = Run.create(config, default_name="unused")
        assert fit(run, config, None, StopFlag())
        steps = [checkpoint.path for checkpoint in run.checkpoints()]
        files = ("model.safetensors", "training/rank-00000.safetensors")
        return [(step / file).read_bytes() for step in steps for file in files]

    expected = written("plain")
    assert len(set(expected)) == 6
    streams = Streams(monkeypatch)
    assert written("beside") == expected
    assert streams.notes.count("out on beside") > 3
    assert streams.notes.count("main waits for beside") == 2  # before the second and the third step
