"""Training that begins with the weights of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import checkpoint, longseq

pytestmark = pytest.mark.distributed


def test_a_performer_is_trained_from_the_export_of_a_zero_3_run(
    folder: Path, two_processes: Callable[[int], Path], fit: Callable[..., Path]
) -> None:
    run = two_processes(3)
    ended = longseq("export", run, "exported", folder=folder)
    assert ended.code == 0, ended.err
    whole = load_file(checkpoint(run, 20) / "model.safetensors")
    exported = load_file(folder / "exported" / "model.safetensors")
    assert {name.removeprefix("model.") for name in exported} == whole.keys()
    assert all(torch.equal(exported[f"model.{name}"], tensor) for name, tensor in whole.items())

    other = ("attention.kernel=relu", "attention.learned_decay=true", "trainer.devices=2", "trainer.zero_stage=3")
    new = fit("transferred", "model.init_from=exported", *other, "optim.lr=0", "trainer.max_steps=2")
    trained = load_file(checkpoint(new, 2) / "model.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in whole.items())  # at a learning rate of 0
    assert any(name.endswith("log_decay") for name in trained)
