"""Training that begins with the weights of another model."""

from __future__ import annotations

import json
import os
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

    other = ("attention.kernel=relu", "trainer.devices=2", "trainer.zero_stage=3", "optim.lr=0", "trainer.max_steps=2")
    more = "attention.layers=[{learned_decay: true}, {forget_gate: true}]"
    new = fit("transferred", "model.init_from=exported", more, *other)
    trained = load_file(checkpoint(new, 2) / "model.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in whole.items())  # at a learning rate of 0
    assert {name.rpartition("attention.")[2] for name in trained.keys() - whole.keys()} == {
        "log_decay", "gate.weight", "gate.bias",
    }  # fmt: skip


def test_an_experiment_trains_scores_and_transfers(folder: Path) -> None:
    (folder / "transfer.yaml").write_text(
        """
config: tiny.yaml
groups: {UNI: [model.objective=causal]}
variants:
  Transformer: [attention.kind=exact]
  Performer: {set: [attention.kind=favor, attention.kernel=relu], from: Transformer, steps: 0.5}
splits: [test, ood]
curve: true
"""
    )
    short = ("--steps", "20", "--sequences", "20", "--out", "two", "trainer.strategy=single", "data.test_fraction=0.2")
    ended = longseq("experiment", "transfer.yaml", *short, folder=folder)
    assert ended.code == 0, ended.err
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "two" / "results").glob("*.json")}
    teacher, student = found["uni-transformer-seed0"], found["uni-performer-seed0"]
    # Other attention than the weights were trained with costs something, and training on wins it back.
    assert teacher["splits"]["test"]["loss"] < student["before"]["test"]["loss"] > student["splits"]["test"]["loss"]
    assert teacher["splits"]["test"]["targets"] == student["splits"]["test"]["targets"] > 0
    assert list(map(int, student["curve"])) == list(range(1, 11))
    table = (folder / "two" / "table.md").read_text()
    assert "Performer, before training" in table
    assert "20 steps of 512 tokens" in table


# Run by every Python that starts with its folder in PYTHONPATH: notes which process opens what, as Python tells.
_AUDIT = """
import os, sys
def note(event, arguments):
    if event == "open" and str(arguments[0]) == os.environ["MOMENTS"]:
        who = os.environ.get("RANK", "parent")
        fd = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{who}\\n".encode())
        os.close(fd)
sys.addaudithook(note)
"""


def test_the_checksums_of_the_model_begun_with_are_taken_once(folder: Path, one_process: Path, tmp_path: Path) -> None:
    """The moments of its optimiser are opened for nothing else."""
    moments = checkpoint(one_process, 20) / "training" / "rank-00000.safetensors"
    assert moments.is_file()
    (tmp_path / "sitecustomize.py").write_text(_AUDIT)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    ended = longseq(
        *("fit", "tiny.yaml", "run.name=summed-once", f"model.init_from={one_process}", "trainer.devices=2"),
        *("optim.lr=0", "trainer.max_steps=1", "trainer.valid_every=0"),
        folder=folder,
        environment={"PYTHONPATH": path, "OPENED": str(tmp_path / "opened"), "MOMENTS": str(moments)},
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "opened").read_text() == "parent\n"
    whole, begun = (
        load_file(checkpoint(run, step) / "model.safetensors")
        for run, step in ((one_process, 20), (folder / "runs" / "summed-once", 1))
    )
    assert all(torch.equal(begun[name], tensor) for name, tensor in whole.items())  # at a learning rate of 0
