"""``longseq check`` on real processes: devices, collectives, a step at full length, and its memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import longseq

pytestmark = pytest.mark.distributed

# Large enough for activations and weights to matter, and a second's work.
SIZED = ("model.dim=128", "model.ffn_dim=512", "data.length=256", "data.batch_tokens=2048")


def lines(out: str) -> dict[str, tuple[str, str]]:
    split = [line.split(maxsplit=2) for line in out.splitlines()]
    return {name: (verdict, text) for verdict, name, text in split}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("trainer.zero_stage=2",), marks=pytest.mark.long),
        ("trainer.zero_stage=3", "trainer.activation_checkpointing=true", "trainer.precision=bf16"),
        # Large beside a bucket of gradients: whether one is on its way at the peak is a matter of time.
        ("trainer.strategy=ddp", "trainer.accumulate=2", "data.batch_tokens=8192"),
    ],
    ids=" ".join,
)
def test_two_processes_are_tried_and_the_memory_is_as_estimated(folder: Path, overrides: tuple[str, ...]) -> None:
    before = sorted(folder.rglob("*"))
    ended = longseq("check", "tiny.yaml", "trainer.devices=2", *SIZED, *overrides, folder=folder)
    assert ended.code == 0, ended.err + ended.out
    found = lines(ended.out)
    assert [name for name in found if name != "cores"] == [
        *("config", "data", "disk", "memory", "devices", "collectives", "step", "time")
    ]
    assert all(verdict == "ok" for name, (verdict, _) in found.items() if name != "cores")
    assert "2 × CPU" in found["devices"][1]
    rate = re.search(r"gloo: an all-reduce of 64 MiB runs at ([\d.]+) GB/s", found["collectives"][1])
    assert rate
    assert float(rate[1]) > 0
    share = re.search(r"\((\d+)% of the estimate\)", found["step"][1])
    assert share
    assert 100 / 1.2 <= int(share[1]) <= 120, ended.out
    assert {path for path in folder.rglob("*") if path.name not in (".out", ".err")} == {
        path for path in before if path.name not in (".out", ".err")
    }, "nothing is left behind"


def test_one_process_has_no_collectives(folder: Path) -> None:
    ended = longseq("check", "tiny.yaml", "trainer.max_steps=1", "trainer.probe_every=1", folder=folder)
    assert ended.code == 0, ended.err + ended.out
    assert "collectives" not in lines(ended.out)
    assert "64 ×" not in lines(ended.out)["config"][1]


def test_what_the_machine_cannot_do_is_a_failed_line(folder: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    for override, words in (
        ("trainer.accelerator=cuda", "GPUs here"),
        ("data.batch_tokens=6400000000", "raise trainer.accumulate"),
    ):
        ended = longseq("check", "tiny.yaml", override, folder=folder, environment=environment)
        assert ended.code == 1
        verdict, text = lines(ended.out)["step"]
        assert verdict == "FAILED"
        assert words in text
        assert "Traceback" not in ended.err
