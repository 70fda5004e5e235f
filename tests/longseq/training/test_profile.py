"""``trainer.profile_steps``: the trace holds attention's operators, of these steps and no others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

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
ALONE = (
    *("trainer.strategy=single", "trainer.max_steps=5", "trainer.valid_every=0"),
    *("trainer.probe_every=0", "trainer.peak_tflops=1"),
)


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


def outermost(events: list[dict]) -> list[dict]:
    """Without those inside another one: an operator calls itself for the next dispatch key."""
    found: list[dict] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if not found or event["ts"] >= found[-1]["ts"] + found[-1]["dur"]:
            found.append(event)
    return found


def test_a_trace_has_attentions_operators_in_exactly_the_steps_asked_for(train, monkeypatch):
    run = train("profiled", "trainer.profile_steps=[2, 3]")
    (path,) = run.profiles_dir.iterdir()
    assert path.name == "steps-2-3.rank-0.pt.trace.json.gz"
    events = [event for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "dur" in event]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events}
    steps = {name: span for name, span in spans.items() if name.startswith("ProfilerStep")}
    assert set(steps) == {"ProfilerStep#2", "ProfilerStep#3"}
    scans = outermost([event for event in events if (event["name"], event["cat"]) == ("longseq::scan", "cpu_op")])
    inside = {name: sum(begin <= scan["ts"] < end for scan in scans) for name, (begin, end) in steps.items()}
    assert inside == dict.fromkeys(steps, 3 * 2)  # layers × batches
    assert len(scans) == 2 * 3 * 2
    assert scans[0]["args"]["Input Dims"]
    monkeypatch.setattr(profiles, "profile", lambda **_: pytest.fail("the profiler was started"))
    plain = train("plain")
    assert not plain.profiles_dir.exists()
    assert weights(run) == weights(plain)


def test_other_ranks_and_steps_are_not_profiled(run, config):
    config.trainer.profile_steps, config.trainer.profile_ranks = [4, 6], [2]
    callback = profiles.Profile(run, config, SimpleNamespace(paused=nullcontext))
    task = SimpleNamespace(device=torch.device("cpu"))

    def profiled(rank: int, step: int) -> bool:
        trainer = SimpleNamespace(global_rank=rank, global_step=step - 1, accumulate_grad_batches=1)
        callback.on_train_batch_start(trainer, task, None, 0)
        return callback.profiler is not None

    assert not any(profiled(*place) for place in [(0, 4), (1, 5), (2, 3), (2, 7)])
    assert profiled(2, 4)
    callback.step.close()
    callback.profiler.stop()


@pytest.mark.parametrize(("step", "said"), [(5, False), (6, True), (40, True)])
def test_steps_that_were_before_a_resume_are_said(run, config, capsys, step, said):
    config.trainer.profile_steps = [4, 6]
    callback = profiles.Profile(run, config, SimpleNamespace(paused=nullcontext))
    callback.on_train_start(SimpleNamespace(global_step=step, is_global_zero=True), None)
    sentence = f"longseq: trainer.profile_steps=[4, 6] lie behind step {step}, where this start begins: nothing is "
    assert capsys.readouterr().err.startswith(sentence) == said


def test_a_training_that_ends_in_between_leaves_what_there_is_on_a_gpu_with_the_memory(train, monkeypatch):
    """Without a GPU: what PyTorch is asked for, and when."""
    asked: list[object] = []
    memory, began, wrote = torch.cuda.memory, profiles.Profile._begin, profiles.Profile._write
    monkeypatch.setattr(memory, "_record_memory_history", lambda **given: asked.append(given))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: asked.append(path) or Path(path).write_bytes(b"blocks"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(profiles.Profile, "_begin", lambda self, _, step: began(self, gpu, step))
    monkeypatch.setattr(profiles.Profile, "_write", lambda self, profiler, _, name: wrote(self, profiler, gpu, name))
    run = train("short", "trainer.profile_steps=[5, 90]")
    name = "steps-5-5.rank-0"
    assert {path.name for path in run.profiles_dir.iterdir()} == {f"{name}.pt.trace.json.gz", f"{name}.memory.pickle"}
    assert (run.profiles_dir / f"{name}.memory.pickle").read_bytes() == b"blocks"
    aside = str(run.profiles_dir / f".partial-{name}.memory.pickle")
    assert asked == [{"max_entries": 1_000_000}, aside, {"enabled": None}]


def test_what_cannot_be_written_is_said_and_the_training_goes_on(train, monkeypatch, capsys):
    monkeypatch.setattr(Run, "profiles_dir", property(lambda run: run.config_path))
    run = train("full", "trainer.profile_steps=[1, 1]", "trainer.max_steps=1")
    assert run.finished
    said = capsys.readouterr().err
    assert f"longseq: warning: {run.config_path}/steps-1-1.rank-0: cannot be written (File exists);" in said


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.profile_steps=[3]"], r"trainer\.profile_steps=\[3\]: the first and the last step, e\.g\. \[10"),
        (["trainer.profile_steps=[0, 3]"], r"trainer\.profile_steps=\[0, 3\]: the first and the last step"),
        (["trainer.profile_steps=[5, 3]"], r"trainer\.profile_steps=\[5, 3\]: the first and the last step"),
        (
            ["trainer.profile_steps=[1, 3]", "trainer.profile_ranks=[0, -1]"],
            r"trainer\.profile_ranks=\[0, -1\]: numbers of processes, from 0 on",
        ),
        (
            ["trainer.profile_steps=[8, 9]", "trainer.max_steps=7"],
            r"trainer\.profile_steps=\[8, 9\]: the training ends before, at trainer\.max_steps=7",
        ),
        (["trainer.profile_steps=[1, 3]", "trainer.profile_ranks=[]"], r"trainer\.profile_ranks=\[\]: numbers of proc"),
    ],
)
def test_steps_and_ranks_that_there_are_not_are_refused(folder, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("small.yaml", ["data.train=a.fasta", *overrides])
