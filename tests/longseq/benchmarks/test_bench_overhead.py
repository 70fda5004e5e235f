"""``longseq bench overhead`` and ``longseq bench memory``, at a size that takes a second."""

from __future__ import annotations

import json

import pytest

from longseq import cli
from longseq.benchmarks.overhead import OverheadResults
from longseq.benchmarks.watching import WatchingResults


def test_overhead_keeps_every_turn_and_a_checkpoint_for_every_other(tmp_path, capsys):
    sizes = ["--preset", "tiny", "--length", "64", "--steps", "4", "--rounds", "3", "--out", str(tmp_path)]
    assert cli.main(["bench", "overhead", *sizes, "trainer.strategy=single"]) == 0
    kept = json.loads((tmp_path / "overhead.json").read_text())
    for name in ("ours", "bare", "with_checkpoint", "stalls", "copies"):
        assert len(kept[name]) == 3, name
        assert all(seconds > 0 for seconds in kept[name]), name
    weights = 4 * 400_000  # and AdamW's moments
    assert 2 * weights < kept["checkpoint_bytes"] < 5 * weights
    out = capsys.readouterr().out
    assert "in a bare PyTorch loop" in out
    assert "plain copy" in out


def test_ratios_are_medians_of_neighbours_in_time():
    """A machine that was slow for a while was slow for both."""
    results = OverheadResults(ours=[1.0, 5.0, 1.2], bare=[1.0, 5.0, 1.0], stalls=[1.0, 4.0], copies=[1.0, 2.0])
    assert results.step_ratio == 1.0
    assert results.stall_ratio == 1.5


def test_watching_adds_up_what_both_ranks_spend_on_it(tmp_path, capsys):
    sizes = ["--preset", "tiny", "--length", "64", "--batch", "2", "--steps", "20", "--copy-every", "5"]
    assert cli.main(["bench", "watching", *sizes, "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "watching.json").read_text())
    assert len(kept["ranks"]) == 2
    for rank in kept["ranks"]:
        assert rank["steps"] == 20
        assert 2 <= rank["calls"]["copies"] <= 4  # one that takes longer than five such steps leaves one out
        assert rank["calls"]["heartbeat"] > 20 * 5
        assert rank["calls"]["stragglers"] == 3  # every ten steps, and at the last
        assert rank["heartbeat_beside"] > 0
    for share in ("step_share", "cpu_share"):
        assert all(0 < kept[share][what] < 1 for what in ("heartbeat", "stragglers", "copies")), kept
    shown = capsys.readouterr().out
    assert "straggler statistics" in shown
    assert "a copy in memory every 5 steps" in shown


def test_shares_are_those_of_the_rank_that_spends_more():
    one = {"steps": 10, "seconds": 20.0, "cpu": 10.0, "heartbeat_beside": 0.1}
    rank = {**one, "training_thread": {"copies": 1.0}, "processor": {"copies": 0.5, "copies beside": 1.5}}
    results = WatchingResults([{**rank, "training_thread": {}, "processor": {"heartbeat": 0.1}}, rank])
    assert results.step == 2.0
    assert (results.share("copies"), results.cpu_share("copies")) == (0.05, 0.2)
    assert (results.share("heartbeat"), results.cpu_share("heartbeat")) == (0.0, pytest.approx(0.02))


def test_memory_measures_each_cell_beside_its_estimate(tmp_path, capsys):
    asked = ["--presets", "tiny", "--lengths", "256", "--attention", "favor", "--objectives", "causal"]
    assert cli.main(["bench", "memory", *asked, "--zero-stages", "single", "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "memory.json").read_text())["cells"]
    assert [cell["checkpointing"] for cell in cells] == [False, True]
    assert all(cell["ratio"] == pytest.approx(1, abs=0.2) for cell in cells)
    assert cells[0]["measured"] > cells[1]["measured"]
    assert "2 of 2 estimates within 20%" in capsys.readouterr().out
