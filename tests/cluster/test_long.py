"""Real time limits, a cut network, a crash that repeats itself: what takes minutes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import curve, largest_difference
from longseq.runs import starts

from .conftest import ENDED, Login

pytestmark = [pytest.mark.distributed, pytest.mark.long]


def test_a_run_of_three_time_limits_ends_with_the_losses_of_an_uninterrupted_one(
    login: Login, here: Callable[..., Path]
) -> None:
    """SLURM looks at its limits every 30 s, so the signal comes 30 to 60 s after the start of two minutes."""
    wide = ("data.batch_tokens=24576", "trainer.valid_every=0", "trainer.checkpoint_every=0")
    rate = curve(here("speed", "trainer.devices=2", "trainer.max_steps=30", *wide), "train/tokens_per_second")
    steps = int(130 * sum(list(rate.values())[10:]) / 20 / 24576)  # 130 s of training, here and now
    long = (*wide, f"trainer.max_steps={steps}", "trainer.valid_every=50")
    job, run = login.submit("limited", "--nodes=2", "--time=2m", *long)
    assert login.cluster.wait_for(job, *ENDED, timeout=500) == "COMPLETED", login.log(run)
    restarts = [int(number) for number in re.findall(r"restart (\d+), on", login.log(run))]
    assert max(restarts) >= 2
    assert "USR1: the training is asked to save" in login.log(run)
    one = here("unlimited", "trainer.devices=2", *long)
    for tag in ("train/loss", "valid/loss"):
        assert largest_difference(curve(run, tag), curve(one, tag)) == 0


def test_a_node_behind_a_cut_cable_writes_nothing_more(login: Login, here: Callable[..., Path]) -> None:
    cluster = login.cluster
    if not cluster.netns:
        pytest.skip("nodes share a machine without namespaces")
    long = ("data.batch_tokens=12288", "trainer.max_steps=150", "trainer.valid_every=50")
    job, run = login.submit("cut", "--nodes=1", "--tasks-per-node=2", *long)
    login.wait_for_step(run, 12)
    node = next(node for node in cluster.nodes if login.tasks(node))
    cluster.cut(node)
    try:
        login.wait_for_step(run, 20, start=2)
    finally:
        cluster.heal(node)
    assert cluster.wait_for(job, *ENDED, timeout=200) == "COMPLETED", login.log(run)
    one = here("uncut", "trainer.devices=2", *long)
    for tag in ("train/loss", "valid/loss"):
        assert largest_difference(curve(run, tag), curve(one, tag)) == 0
    cluster.wait_until_idle(60)


def test_a_crash_that_repeats_itself_stops_with_the_reason(login: Login) -> None:
    """A sitecustomize in the tasks' path makes every start fail in its seventh step."""
    broken = login.folder / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys, threading, time\n"
        "def look():\n"
        "    while True:\n"
        "        module = sys.modules.get('longseq.training.callbacks.progress')\n"
        "        if module is not None and hasattr(module, 'Progress'):\n"
        "            break\n"
        "        time.sleep(0.01)\n"
        "    before = module.Progress._note\n"
        "    def note(self, trainer):\n"
        "        before(self, trainer)\n"
        "        if trainer.global_step == 7:\n"
        "            raise ValueError('a bug')\n"
        "    module.Progress._note = note\n"
        "threading.Thread(target=look, daemon=True).start()\n"
    )
    site = (login.folder / "site.yaml").read_text()
    path = f"{broken}:{login.cluster.environment.get('PYTHONPATH', '')}"
    (login.folder / "broken.yaml").write_text(site.replace("'1'}", f"'1', PYTHONPATH: '{path}'}}"))
    job, run = login.submit("broken", "--site=broken.yaml", "trainer.max_steps=20")
    assert login.cluster.wait_for(job, *ENDED, timeout=200) == "FAILED"
    assert len(starts.numbers(run / "starts")) == 2
    assert "crashed twice after step 7" in (run / "STOPPED").read_text()
    assert "crashed twice after step 7" in login.type("status", run)
    assert "ValueError: a bug" in login.log(run)
