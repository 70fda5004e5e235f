"""``trainer.profile_steps``: the trace holds attention's operators, of these steps and no others."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longseq.config.loading import load_config
from longseq.errors import ConfigError
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run
from longseq.training.callbacks import profile as profiles
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit

TINY = ("model.dim=16", "model.depth=3", "model.heads=2", "model.ffn_dim=16", "attention.features=8")
ALONE = ("trainer.strategy=single", "trainer.max_steps=5", "trainer.valid_every=0", "trainer.probe_every=0")


@pytest.fixture
def train(folder: Path) -> Callable[..., Run]:
    """train(name, *overrides): a run of 5 steps of 2 batches through 3 layers."""

    def train(name: str, *overrides: str) -> Run:
        given = [f"data.train={folder}/proteins.fasta", *TINY, *ALONE, "trainer.accumulate=2", *overrides]
        config = load_config("small.yaml", given)
        run = Run.create(config, default_name=name)
        assert fit(run, config, None, StopFlag())
        return run

    return train


def weights(run: Run) -> bytes:
    newest = run.last_good()
    assert isinstance(newest, Checkpoint)
    return newest.weights_path.read_bytes()


def test_a_trace_has_attentions_operators_in_exactly_the_steps_asked_for(train):
    run = train("profiled", "trainer.profile_steps=[2, 3]")
    (path,) = run.profiles_dir.iterdir()
    assert path.name == "steps-2-3.rank-0.pt.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert set(steps) == {"ProfilerStep#2", "ProfilerStep#3"}
    scans = [event for event in events if event.get("name") == "longseq::scan" and event["cat"] == "cpu_op"]
    inside = {name: sum(begin <= scan["ts"] < end for scan in scans) for name, (begin, end) in steps.items()}
    assert inside == dict.fromkeys(steps, 3 * 2)  # layers × batches
    assert len(scans) == 2 * 3 * 2
    assert any("Input Dims" in scan["args"] for scan in scans)
    assert weights(run) == weights(train("plain"))


def test_other_ranks_are_not_profiled(train):
    run = train("other", "trainer.profile_steps=[1, 5]", "trainer.nodes=1")
    assert [path.name for path in run.profiles_dir.iterdir()] == ["steps-1-5.rank-0.pt.trace.json.gz"]


def test_a_training_that_ends_in_between_leaves_what_there_is(train):
    run = train("short", "trainer.profile_steps=[4, 90]")
    assert [path.name for path in run.profiles_dir.iterdir()] == ["steps-4-5.rank-0.pt.trace.json.gz"]


def test_nothing_is_there_where_nothing_was_asked_for(train, monkeypatch):
    monkeypatch.setattr(profiles, "profile", lambda **_: pytest.fail("the profiler was started"))
    assert not train("plain").profiles_dir.exists()
    assert not train("later", "trainer.profile_steps=[6, 7]").profiles_dir.exists()


def test_what_cannot_be_written_is_said_and_the_training_goes_on(train, monkeypatch, capsys):
    monkeypatch.setattr(Run, "profiles_dir", property(lambda run: run.config_path))
    run = train("full", "trainer.profile_steps=[2, 2]")
    assert run.finished
    assert re.search(r"longseq: warning: .*steps-2-2.rank-0: cannot be written \(.*\); the training goes on\.", capsys.readouterr().err)


def test_on_a_gpu_the_memory_is_kept_as_well(train, monkeypatch):
    """Without one: what PyTorch is asked for, and when."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: asked.append(k))
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: asked.append("dump") or Path(path).write_bytes(b"snapshot")
    )
    begin, write = profiles.Profile._begin, profiles.Profile._write
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(profiles.Profile, "_begin", lambda self, device, step: begin(self, cuda, step))
    monkeypatch.setattr(profiles.Profile, "_write", lambda self, profiler, device, name: write(self, profiler, cuda, name))
    run = train("cuda", "trainer.profile_steps=[2, 2]")
    assert asked == [{"max_entries": 1_000_000}, "dump", {"enabled": None}]
    assert (run.profiles_dir / "steps-2-2.rank-0.memory.pickle").read_bytes() == b"snapshot"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.profile_steps=[3]"], r"trainer\.profile_steps=\[3\]: the first and the last step, e\.g\. \[10, 13\]"),
        (["trainer.profile_steps=[0, 3]"], r"trainer\.profile_steps=\[0, 3\]: the first and the last step"),
        (["trainer.profile_steps=[5, 3]"], r"trainer\.profile_steps=\[5, 3\]: the first and the last step"),
        (
            ["trainer.profile_steps=[1, 3]", "trainer.profile_ranks=[0, 1]"],
            r"trainer\.profile_ranks=\[0, 1\]: numbers from 0 to 0, as there are 1 processes \(trainer\.devices\)",
        ),
        (["trainer.profile_steps=[1, 3]", "trainer.profile_ranks=[]"], r"trainer\.profile_ranks=\[\]: numbers from 0"),
    ],
)
def test_steps_and_ranks_that_there_are_not_are_refused(folder, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("small.yaml", ["data.train=a.fasta", *overrides])
