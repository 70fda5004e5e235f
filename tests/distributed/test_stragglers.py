"""A rank that is slower than the others is named, with what it waits for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Ended, curve, longseq

pytestmark = pytest.mark.distributed

# The same work at a fifth of the speed: of the whole model, or of the batches.
SLOW = """
import importlib, os, time
if os.environ.get("RANK") == "1":
    owner = importlib.import_module("{module}")
    owner = getattr(owner, "{owner}", owner)
    real = owner.{method}
    def slow(*arguments, **named):
        began = time.perf_counter()
        result = real(*arguments, **named)
        time.sleep(4 * (time.perf_counter() - began) + 0.1)
        return result
    owner.{method} = slow
"""
FORWARD = {"module": "longseq.models.performer", "owner": "PerformerLM", "method": "forward"}
BATCHES = {"module": "longseq_data.samples.batches", "owner": "", "method": "unpack"}
STEPS = (
    "trainer.devices=2",
    "trainer.strategy=ddp",
    "trainer.max_steps=30",
    "trainer.log_every=5",
    "trainer.valid_every=0",
)


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Callable[..., tuple[Ended, Path]]:
    """trained(name, **what is slow): a run in which rank 1 is."""

    def trained(name: str, **slow: object) -> tuple[Ended, Path]:
        (tmp_path / "sitecustomize.py").write_text(SLOW.format(**slow) if slow else "")
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        words = ("fit", "tiny.yaml", f"run.name={name}", *STEPS)
        ended = longseq(*words, folder=folder, environment={"PYTHONPATH": path}, timeout=300)
        assert ended.code == 0, ended.err
        return ended, folder / "runs" / name

    return trained


@pytest.mark.parametrize(("slow", "cause"), [(FORWARD, "its device"), (BATCHES, "data")])
def test_a_rank_at_a_fifth_of_the_speed_is_named_with_what_it_waits_for(trained, slow, cause) -> None:
    ended, run = trained(f"slow-{cause.split()[-1]}", **slow)
    warning = (
        r"longseq: warning: \S+: rank 1 \(cpu\) is ([\d.]+) times as slow as the others.*: most of it is (.*) \(trainer"
    )
    ratio, why = re.findall(warning, ended.err)[0]
    assert float(ratio) > 2
    assert why == cause
    ranks, ratios = curve(run, "time/slowest_rank"), curve(run, "time/slowest_ratio")
    assert list(ranks) == list(ratios) == [5, 10, 15, 20, 25, 30]
    assert [ranks[step] for step in (10, 15, 20, 25, 30)] == [1] * 5
    assert min(ratios[step] for step in (10, 15, 20, 25, 30)) > 1.5


def test_ranks_are_not_compared_where_nobody_asks(folder: Path) -> None:
    ended = longseq("fit", "tiny.yaml", "run.name=uncompared", *STEPS, "trainer.slow_factor=0", folder=folder)
    assert ended.code == 0, ended.err
    assert not (folder / "runs/uncompared/tensorboard" / "time_slowest_rank").exists()
    with pytest.raises(KeyError):
        curve(folder / "runs/uncompared", "time/slowest_rank")
