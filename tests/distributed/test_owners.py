"""Two starts of one run on one machine: the second is refused while the first lives, also where locks do not work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from command_line import Command, alive, checkpoints, longseq

pytestmark = pytest.mark.distributed


def test_a_living_process_is_not_overtaken_and_a_killed_one_is(folder: Path) -> None:
    given = ("trainer.max_steps=5000", "trainer.checkpoint_every=5", "trainer.valid_every=0", "data.batch_tokens=4096")
    first = Command("fit", "tiny.yaml", "run.name=owned", *given, folder=folder)
    first.wait_for("step 7/")
    run, workers = folder / "runs/owned", first.workers()
    beside = folder / "beside"
    beside.mkdir()

    (run / ".lock").unlink()  # as on a file system that forgets locks, or has none
    for words in ((), ("--take-over",)):
        refused = longseq("resume", run, *words, folder=beside)
        assert refused.code == 1
        assert f"process {first.process.pid} of " in refused.sentence
        assert "trains this run" in refused.sentence
    state = json.loads(longseq("status", run, "--json", folder=beside).out)
    assert state["state"] == "RUNNING"
    assert [path.name for path in sorted((run / "starts").glob("*.start"))] == ["00001.start"]

    first.kill(first.process.pid)
    first.process.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    at = checkpoints(run)[-1]
    assert json.loads(longseq("status", run, "--json", folder=beside).out)["state"] == "ENDED"
    second = longseq("resume", run, f"trainer.max_steps={at + 2}", folder=beside)
    assert second.code == 0, second.err
    assert checkpoints(run)[-1] == at + 2
    assert (run / "starts/00002.end").read_text() == "finished\n"
