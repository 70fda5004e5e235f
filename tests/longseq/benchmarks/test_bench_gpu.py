"""`longseq bench gpu`: what is wrong, hangs or dies is said, and hides nothing else; on a CPU its parts are real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from command_line import Command, alive, longseq
from longseq.attention import favor_attention
from longseq.benchmarks.gpu import blocks, kernels, speed, worker
from longseq.benchmarks.gpu.parts import PARTS, Part
from longseq.benchmarks.gpu.rows import Row, Rows, read_rows
from longseq.benchmarks.gpu.running import Found, Runner

CASES = [
    kernels.Case("scan", 70, 8, 8, 16, hidden=True, documents=True, decay=True),
    kernels.Case("both directions", 70, 8, 8, 16, causal=False, window=20, share=True, std=2),
    kernels.Case("carried", 70, 8, 8, 16, window=9, tile=30, decay=True),
]
# What stands for a part: it finds one thing, and then ends in its own way. Its worker's arguments are PART ROWS ...
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from longseq.benchmarks.gpu.rows import Rows
from longseq.benchmarks.gpu.worker import end_with_parent

end_with_parent(int(sys.argv[sys.argv.index("--parent-pipe") + 1]))
rows = Rows(Path(sys.argv[2]))
rows.add("error", 0.1, most=0.5)
name = sys.argv[1]
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
if name == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "is-wrong":
    rows.add("error", 0.7, most=0.5)
if name == "is-slow":
    rows.add("speed", 1.0, "×", least=5)
if name == "is-nan":
    rows.add("error", float("nan"), most=0.5)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that parts of this test run."""
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "stand_in"


def run(tmp_path: Path, *parts: Part, seconds: float = 300.0) -> dict[str, Found]:
    folder = tmp_path / "work"
    folder.mkdir()
    kept: list[int] = []
    runner = Runner(
        parts,
        "cpu",
        seconds=seconds,
        jobs=2,
        folder=folder,
        keep=lambda found: kept.append(len(found)),
        say=lambda found: None,
    )
    runner.run()
    assert len(kept) > len(parts)
    return {found.part.name: found for found in runner.found}


def test_a_part_that_hangs_dies_or_finds_nothing_leaves_the_others_alone(tmp_path, stand_in):
    limits = {"hangs": 40.0}  # by then it has written on a busy machine, too
    names = ("passes", "hangs", "dies", "is-wrong", "is-nan", "is-slow")
    parts = [
        Part(name, "", limits.get(name, 100.0), correct=name != "is-slow", alone=name == "is-slow", program=stand_in)
        for name in names
    ]
    parts.append(Part("missing", "", 100.0, program="a_module_that_is_not_there"))
    found = run(tmp_path, *parts)
    states = {name: (part.state, part.bad) for name, part in found.items()}
    assert states == {
        "passes": ("passed", False),
        "hangs": ("cut", True),
        "dies": ("crashed", True),
        "is-wrong": ("failed", True),
        "is-nan": ("failed", True),
        "is-slow": ("measured", False),
        "missing": ("crashed", True),
    }
    first = Row("error", 0.1, "", "≤ 0.5", True)
    assert all(part.rows[0] == first for name, part in found.items() if name != "missing")
    assert "SIGSEGV" in found["dies"].why
    assert "No module named a_module_that_is_not_there" in found["missing"].output
    assert found["is-nan"].rows[1] == Row("error", None, "", "≤ 0.5", False, "nan ")
    child = int(found["hangs"].output.split()[1])
    assert not alive(child)


def test_a_part_for_which_there_is_no_time_is_not_a_part_that_passed(tmp_path, stand_in):
    found = run(tmp_path, Part("passes", "", 100.0, program=stand_in), seconds=5.0)["passes"]
    assert (found.state, found.bad) == ("no time", True)


def test_every_part_has_work_and_only_parts_of_times_are_no_proofs():
    assert PARTS.keys() == worker.WORK.keys()
    assert all(part.alone for part in PARTS.values() if not part.correct)


def test_what_a_block_fuses_is_held_against_float64_and_a_wrong_one_is_found(tmp_path, monkeypatch):
    blocks.check(Rows(tmp_path / "right"), "cpu", tmp_path)
    right = read_rows(tmp_path / "right")
    assert len(right) == 10
    assert all(row.met and row.seen > 0 for row in right if "float16" in row.what)
    split = blocks.split_heads
    monkeypatch.setattr(blocks, "split_heads", lambda x, *args: tuple(1.01 * t for t in split(x, *args)))
    blocks.check(Rows(tmp_path / "wrong"), "cpu", tmp_path)
    assert [row.met for row in read_rows(tmp_path / "wrong")] == ["heads" not in row.what for row in right]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_held_against_float64_and_a_wrong_one_is_found(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(kernels, "cases", lambda large, seed: CASES)
    monkeypatch.setattr(kernels, "backends_of", lambda rows, device: ("torch",))
    kernels.check(Rows(tmp_path / "right"), "cpu", dtype)
    right = read_rows(tmp_path / "right")
    assert [row.met for row in right] == [True] * 3
    assert all(0 < (row.seen or 0) < kernels.TOLERANCE[dtype] for row in right)

    def wrong(*rows: torch.Tensor, **options: object) -> torch.Tensor:
        return 1.02 * favor_attention(*rows, **options)

    monkeypatch.setattr(kernels, "favor_attention", wrong)
    kernels.check(Rows(tmp_path / "wrong"), "cpu", dtype)
    rows = read_rows(tmp_path / "wrong")
    assert [row.met for row in rows] == [False, False, True]  # the last one has another door
    assert all(row.seen == pytest.approx(0.02, rel=0.2) for row in rows[:2])


def test_an_output_that_was_never_written_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "cases", lambda large, seed: CASES[:1])
    monkeypatch.setattr(kernels, "backends_of", lambda rows, device: ("torch",))

    def half(*rows: torch.Tensor, **options: object) -> torch.Tensor:
        out = favor_attention(*rows, **options)
        written = torch.arange(out.shape[2])[:, None] < 35
        return torch.where(written, out, torch.empty_like(out))

    monkeypatch.setattr(kernels, "favor_attention", half)
    kernels.check(Rows(tmp_path / "rows"), "cpu", torch.float32)
    (row,) = read_rows(tmp_path / "rows")
    assert row.met is False
    assert row.note.startswith("nan ")


def test_an_output_that_knows_of_later_keys_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "backends_of", lambda rows, device: ("torch",))

    def leaks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        out = favor_attention(q, k, v, **options)
        return torch.where(v[:, :, -1:] == -7.0, torch.nextafter(out, torch.zeros_like(out)), out)

    monkeypatch.setattr(kernels, "favor_attention", leaks)
    kernels.later_keys(Rows(tmp_path / "rows"), "cpu", tmp_path)
    rows = read_rows(tmp_path / "rows")
    assert len(rows) == 9
    assert all(row.met is False and (row.seen or 0) >= 1 for row in rows)


def test_speeds_are_those_that_were_measured(tmp_path, monkeypatch):
    """On a CPU at tiny sizes: the figures mean nothing, but the rows are those of a GPU."""
    monkeypatch.setattr(speed, "TOKENS", 512)
    monkeypatch.setattr(speed, "TILE", 256)
    monkeypatch.setattr(speed, "GEMM_SIZE", 64)
    monkeypatch.setattr(speed, "AGAINST_SDPA", {256: 0.0, 512: 1e9})
    monkeypatch.setattr(speed, "STEP_LENGTHS", (128, 256))
    monkeypatch.setattr(speed, "PRESET", "tiny")
    monkeypatch.setattr(speed, "SHORT", 128)
    monkeypatch.setattr(speed, "MILLION", 512)
    for part in (speed.attention, speed.step, speed.million):
        part(Rows(tmp_path / part.__name__), "cpu", tmp_path)
    rows = {row.what: row for part in ("attention", "step", "million") for row in read_rows(tmp_path / part)}
    assert rows["SDPA over FAVOR+ at 256"].met is True
    assert rows["SDPA over FAVOR+ at 512"].met is False
    assert "not installed" in rows["fla over FAVOR+ at 256"].note
    assert (rows["share of the matrix product's rate at 512"].seen or 0) > 0
    steps = [rows[f"{name}'s step over OPT's at {at}"] for name in ("favor", "window") for at in (128, 256)]
    assert all((row.seen or 0) > 0 and row.bar == "≤ 1.35" for row in steps)
    short, million = (rows[f"{batch} × {length} tokens, a step"].seen or 0 for batch, length in ((2, 128), (1, 512)))
    assert rows["tokens/s at 512 over those at 128"].seen == pytest.approx(million / short)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_script_that_collects_wheels():
    script = Path(__file__).parents[3] / "tests/gpu/wheels.sh"
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Attention that is wrong from the model on: decoding does not take this way.
WRONG = """
from longseq.attention.module import FavorAttention
right = FavorAttention.mix
FavorAttention.mix = lambda self, *rows: 2 * right(self, *rows)
"""


def test_the_command_fails_where_a_part_that_proves_something_does(tmp_path):
    arguments = ("bench", "gpu", "--device", "cpu", "--parts", "decode", "--out", tmp_path / "out")
    done = longseq(*arguments, folder=tmp_path)
    assert done.code == 0, done.out + done.err
    assert "nothing is wrong" in done.out
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = longseq(*arguments, folder=tmp_path, environment={"PYTHONPATH": path})
    assert done.code == 1, done.out + done.err
    assert "wrong or not proved: decode" in done.out
    (part,) = json.loads((tmp_path / "out/gpu.json").read_text())["parts"]
    assert (part["name"], part["state"]) == ("decode", "failed")
    assert part["rows"][0]["seen"] > 1e-2


def test_killed_it_leaves_a_whole_file_and_no_process(tmp_path):
    out = tmp_path / "out"
    arguments = ("bench", "gpu", "--device", "cpu", "--parts", "kernels-fp32,later-keys", "--jobs", 1, "--out", out)
    command = Command(*arguments, folder=tmp_path)
    deadline = time.monotonic() + 120
    rows: list[object] = []
    while not rows:
        assert command.process.poll() is None, command.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if (out / "gpu.json").exists():
            rows = json.loads((out / "gpu.json").read_text())["parts"][0]["rows"]
    (worker_pid,) = command.workers()
    command.kill(command.process.pid)
    command.process.wait()
    numbers = json.loads((out / "gpu.json").read_text())
    first, second = numbers["parts"]
    assert (first["name"], first["state"], second["state"]) == ("kernels-fp32", "running", "waiting")
    assert first["rows"][0]["met"] is True
    while alive(worker_pid):
        assert time.monotonic() < deadline, "the part outlived the command"
        time.sleep(0.05)


def test_stopped_by_sigterm_it_still_prints_its_table(tmp_path):
    out = tmp_path / "out"
    arguments = ("bench", "gpu", "--device", "cpu", "--parts", "kernels-fp32,later-keys", "--jobs", 1, "--out", out)
    command = Command(*arguments, folder=tmp_path)
    deadline = time.monotonic() + 120
    state = ""
    while state != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if (out / "gpu.json").exists():
            state = json.loads((out / "gpu.json").read_text())["parts"][0]["state"]
    command.process.terminate()
    ended = command.end()
    assert ended.code == 130
    assert "the benchmark was stopped" in ended.out
    states = [part["state"] for part in json.loads((out / "gpu.json").read_text())["parts"]]
    assert states[1:] == ["waiting"]


@pytest.mark.distributed
def test_on_a_cpu_kernels_and_a_run_that_is_killed_are_tried(tmp_path):
    parts = "kernels-bf16,resume,decode"
    arguments = ("--parts", parts, "--jobs", 2, "--minutes", 20, "--out", "out")
    done = longseq("bench", "gpu", "--device", "cpu", *arguments, folder=tmp_path, timeout=1300)
    assert done.code == 0, done.out + done.err
    found = {part["name"]: part for part in json.loads((tmp_path / "out/gpu.json").read_text())["parts"]}
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(parts.split(","), "passed")
    assert found["resume"]["rows"][0]["seen"] == 0.0  # on the CPU to the last bit
    assert {row["what"].rpartition(", ")[2] for row in found["kernels-bf16"]["rows"]} >= {"torch", "triton"}
    assert all(row["seen"] < 5e-3 for row in found["kernels-bf16"]["rows"] if row["met"])


@pytest.mark.distributed
@pytest.mark.long
def test_on_a_cpu_every_way_to_train_has_the_losses_of_one(tmp_path):
    parts = "strategies,precisions,preflight"
    arguments = ("--parts", parts, "--minutes", 20, "--out", "out")
    done = longseq("bench", "gpu", "--device", "cpu", *arguments, folder=tmp_path, timeout=1300)
    assert done.code == 0, done.out + done.err
    found = {part["name"]: part for part in json.loads((tmp_path / "out/gpu.json").read_text())["parts"]}
    assert len(found["strategies"]["rows"]) == 6
    assert all(row["seen"] < 1e-4 for row in found["strategies"]["rows"])
