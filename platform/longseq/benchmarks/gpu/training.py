"""Trainings of a small model as `longseq fit` runs them: their losses against those of this machine's CPU in fp32."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from longseq.benchmarks.gpu.parts import CPU_PATIENCE
from longseq.benchmarks.gpu.rows import Rows, first_line
from longseq.config.training import TrainerConfig
from longseq.runs.checkpoint import checkpoints_in
from longseq.runs.curves import Curve, read_curves
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

STEPS = 20
# Nats. A record in another place, or a step more or less, moves a loss by about 1e-2. fp32 has room for TF32; on a CPU,
# weights in bf16 made 6e-3.
SAME, SAME_16_BITS, SAME_AGAIN = 2e-3, 2e-2, 1e-3
# Everything that attention has: a window, features beyond it, shares and decays that are learned, two draws.
_MODEL = """
model: {dim: 128, depth: 2, heads: 2, ffn_dim: 256}
attention: {features: 64, window: 16, learned_share: true, learned_decay: true, qk_norm: true, redraw_every: 7}
data: {train: proteins.fasta, length: 256, batch_tokens: 2048}
optim: {lr: 0.001, warmup_steps: 5, schedule: constant}
trainer: {max_steps: 20, valid_every: 0, checkpoint_every: 0, log_every: 1, probe_every: 0, peak_tflops: 1}
"""
_SECONDS, _SECONDS_COMPILED = 100.0, 200.0  # for one training
_CORES_A_TRAINING = 3


class Failed(Exception):
    """A command that did not end as it should, and why."""


def strategies(rows: Rows, device: str, folder: Path) -> None:
    """Every way to train, in fp32."""
    asked = {"single": ("trainer.strategy=single",), "ddp": ("trainer.strategy=ddp", _devices(device))}
    asked |= {f"ZeRO-{stage}": (f"trainer.zero_stage={stage}", _devices(device)) for stage in range(4)}
    _compare(rows, device, folder, asked, SAME)


def precisions(rows: Rows, device: str, folder: Path) -> None:
    """In 16 bits, by DeepSpeed and by one process."""
    asked = {
        f"{precision}, {name}": (f"trainer.precision={precision}", way)
        for precision in ("bf16", "fp16")
        for name, way in (("ZeRO-2", "trainer.zero_stage=2"), ("single", "trainer.strategy=single"))
        if precision == "bf16" or device == "cuda"
    }
    if device == "cpu":
        rows.skipped("fp16", "trainer.precision=fp16 needs a GPU")
    _compare(rows, device, folder, asked, SAME_16_BITS)


def compiled(rows: Rows, device: str, folder: Path) -> None:
    """With the key for it."""
    if "compile" not in {field.name for field in fields(TrainerConfig)}:
        rows.skipped("trainer.compile", "this version has no such key")
        return
    ways = {"single": "trainer.strategy=single", "ZeRO-2": "trainer.zero_stage=2"}
    asked = {name: ("trainer.compile=true", way) for name, way in ways.items()}
    _compare(rows, device, folder, asked, SAME, _SECONDS_COMPILED)


def resume(rows: Rows, device: str, folder: Path) -> None:
    """A training that is killed between two checkpoints goes on as one that was not."""
    place, last = _place(folder, "resume"), 80
    often = ("trainer.checkpoint_every=20", "trainer.zero_stage=2")
    unbroken = fit(place, "unbroken", device, *often, f"trainer.max_steps={last}")
    run = place / "runs" / "killed"
    # It has far more steps to go, so that it cannot end before it is killed.
    victim = _command("fit", "small.yaml", "run.name=killed", *_on(device), *often, "trainer.max_steps=100000")
    with _started(victim, place, "killed") as (process, log):
        _wait_for_step(process, log, 30, _SECONDS * _patience(device))
        process.kill()  # its own processes end with it
        process.wait()
    at = max((checkpoint.step for checkpoint in checkpoints_in(run / "checkpoints")), default=0)
    if not 0 < at < last:
        raise Failed(f"killed behind step 30, the newest checkpoint is that of step {at}")
    _done(
        "resume",
        "runs/killed",
        f"trainer.max_steps={last}",
        place=place,
        name="resumed",
        seconds=_SECONDS * _patience(device),
    )
    losses = {step: loss for step, loss in losses_of(run).items() if step > at}
    if list(losses) != list(range(at + 1, last + 1)):
        raise Failed(f"it went on from step {at}, and has losses of the steps {list(losses)}")
    difference = max(abs(loss - unbroken[step]) for step, loss in losses.items())
    how = "to the last bit" if difference == 0 else "not to the last bit"
    what = f"killed behind step {at}: {last - at} steps after it against a run that was not killed"
    rows.add(what, difference, "nats", most=SAME_AGAIN, note=how)


def preflight(rows: Rows, device: str, folder: Path) -> None:
    """Would it train here, and does a task of a job find its device and its group?"""
    place = _place(folder, "preflight")
    began = time.perf_counter()
    said = _done(
        "check",
        "small.yaml",
        *_on(device),
        _devices(device),
        place=place,
        name="check",
        seconds=_SECONDS * _patience(device),
    )
    rows.add("longseq check", time.perf_counter() - began, "s", note=said.strip().splitlines()[-1])
    began = time.perf_counter()
    losses = _job(place, device)
    rows.add("a job of one task: its steps", len(losses), "steps", least=3)
    rows.add("its seconds", time.perf_counter() - began, "s")


def fit(place: Path, name: str, device: str, *overrides: str, seconds: float = _SECONDS) -> Curve:
    """Train to the last step: the loss of each."""
    _done(
        "fit",
        "small.yaml",
        f"run.name={name}",
        *_on(device),
        *overrides,
        place=place,
        name=name,
        seconds=seconds * _patience(device),
    )
    return losses_of(place / "runs" / name)


def reference(folder: Path) -> Curve:
    """20 steps of one process on this machine's CPU in fp32: trained once, by whichever part needs it first."""
    path = folder / "reference.json"
    with (folder / "reference.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            losses = fit(_place(folder, "reference"), "reference", "cpu", "trainer.strategy=single")
            path.write_text(json.dumps(list(losses.items())))
    return {int(step): loss for step, loss in json.loads(path.read_text())}


def losses_of(run: Path) -> Curve:
    """Of every step that was trained."""
    return read_curves(run / "tensorboard")["train/loss"]


def _compare(
    rows: Rows,
    device: str,
    folder: Path,
    asked: Mapping[str, Sequence[str]],
    most: float,
    seconds: float = _SECONDS,
) -> None:
    """Train in each of these ways, several at a time, and hold every step's loss against the CPU's."""
    expected = reference(folder)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // (2 * _CORES_A_TRAINING))) as pool:
        started = {
            pool.submit(_difference, folder, name, device, how, expected, seconds): name for name, how in asked.items()
        }
        for training in as_completed(started):  # one that hangs holds up no row of another
            name, failure = started[training], training.exception()
            if failure is None:
                rows.add(f"{name}: the loss of {len(expected)} steps", training.result(), "nats", most=most)
            else:
                rows.failed(name, first_line(failure))


def _difference(
    folder: Path, name: str, device: str, overrides: Sequence[str], expected: Curve, seconds: float
) -> float:
    run = re.sub(r"\W+", "-", name)
    place = _place(folder, run)
    losses = fit(place, run, device, *overrides, seconds=seconds)
    if losses.keys() != expected.keys():
        raise Failed(f"it has losses of the steps {list(losses)}, not of {list(expected)}")
    return max(abs(loss - expected[step]) if math.isfinite(loss) else math.inf for step, loss in losses.items())


def _job(place: Path, device: str) -> Curve:
    """Three steps of a run as the one task of a job on this machine would train them, told so by SLURM's variables."""
    from longseq.config.loading import load_config
    from longseq.data import identities
    from longseq.runs.run import Run

    overrides = [*_on(device), "run.name=job", f"run.dir={place / 'runs'}", "trainer.max_steps=3"]
    config = load_config(place / "small.yaml", [*overrides, f"data.train={place / 'proteins.fasta'}"])
    run = Run.create(config, default_name="job")
    run.record_data(identities(config))
    run = run.begin("a task that is tried")
    task = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    task |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
    module = [sys.executable, "-m", "longseq.launch.slurm.task", str(run.path), "--start", str(run.start)]
    _wait(module, place, "job", _SECONDS * _patience(device), task)
    return losses_of(run.path)


def _devices(device: str) -> str:
    """Two GPUs where there are two; two processes cannot share one under NCCL."""
    if device == "cpu":
        return "trainer.devices=1"
    import torch

    return f"trainer.devices={min(2, torch.cuda.device_count())}"


def _patience(device: str) -> float:
    return CPU_PATIENCE if device == "cpu" else 1.0


def _on(device: str) -> tuple[str, ...]:
    return (f"trainer.accelerator={device}",)


def _place(folder: Path, name: str) -> Path:
    """A folder with the configuration and the data, for runs."""
    place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    (place / "small.yaml").write_text(_MODEL)
    write_fasta(SyntheticSpec(families=4, records=400, seed=0, mean_length=120), place / "proteins.fasta")
    return place


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "longseq.cli", *words]


def _done(*words: str, place: Path, name: str, seconds: float) -> str:
    """Run a verb to its end; what it has printed."""
    return _wait(_command(*words), place, name, seconds)


def _wait(
    command: Sequence[str], place: Path, name: str, seconds: float, environment: Mapping[str, str] | None = None
) -> str:
    with _started(command, place, name, environment) as (process, log):
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name} was not done after {seconds:g} s; {_last_words(log)}") from None
    if code:
        raise Failed(f"{name} ended with exit code {code}: {_last_words(log)}")
    return log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _started(
    command: Sequence[str], place: Path, name: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process and its log; killed at the end, if it has not ended. It shares the group of the part."""
    log = place / f"{name}.log"
    # One thread a process: sums are added in one order, and the processes of other parts have cores, too.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=place, env=settings, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process, log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_for_step(process: subprocess.Popen[bytes], log: Path, step: int, seconds: float) -> None:
    """Until a training has said that it is beyond a step."""
    deadline = time.monotonic() + seconds
    while max(map(int, re.findall(r"\bstep (\d+)/", log.read_text(errors="replace"))), default=0) < step:
        if process.poll() is not None:
            raise Failed(f"it ended before step {step}: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise Failed(f"it has not come to step {step} after {seconds:g} s; {_last_words(log)}")
        time.sleep(0.01)


def _last_words(log: Path) -> str:
    """The error that a command has ended with, or the last line of its output."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "longseq: error: " in line or re.match(r"[\w.]*Error\b", line)]
    causes = [line for line in errors if "the process of rank" not in line]  # that it has failed is known
    return (causes or errors or lines or ["it said nothing"])[-1][:400]
