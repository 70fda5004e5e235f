"""Before an expensive job: would this configuration train here?

Looks at the configuration, the data files, the disk and the memory; then starts the training's own processes for two
steps on sequences of the full length, and measures collectives, time and memory. Exit code 0 if all is well, else 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from longseq.commands.key_help import help_on_keys
from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.data import SPLITS, resolve_sources, vocabulary
from longseq.data_report import check_data
from longseq.devices import on_cuda
from longseq.errors import EXIT_ERROR, USER_ERRORS
from longseq.launch import local
from longseq.launch.before import check_benchmarks, check_disk, check_origin
from longseq.measure.memory import MemoryEstimate, estimate, gib
from longseq.runs.run import Run
from longseq.text_parts import fit_parts
from longseq_data.cores import cores
from longseq_data.files import resolved, user_path

_Result = TypeVar("_Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, or a name of `longseq configs`: protein/base")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.devices=8")
    parser.add_argument("--static", action="store_true", help="start no process: configuration, files, disk, memory")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    report = _Report()
    config = report.of("config", lambda: _config(args))
    if config is None:
        return EXIT_ERROR
    report.of("data", lambda: _data(config))
    report.of("disk", lambda: _disk(config))
    memory = report.of("memory", lambda: _memory(config))
    if memory is None or report.failed or args.static:
        if not args.static:
            report.line("skipped", "step", "fix what failed first")
        return EXIT_ERROR if report.failed else 0
    if config.trainer.nodes > 1:
        words = f"trainer.nodes={config.trainer.nodes}: `longseq submit` starts processes on other machines; try this"
        report.line("skipped", "step", f"{words} one's share with trainer.nodes=1 and a smaller data.batch_tokens")
        return 0
    seconds = report.of("step", lambda: _rehearse(config, memory, report))
    if seconds is not None:
        report.line("ok", "time", time_line(config, seconds))
    return EXIT_ERROR if report.failed else 0


class _Report:
    """One line a check, as soon as it is known."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, verdict: str, name: str, text: str) -> None:
        print(f"{verdict:<8} {name:<12} {text}", flush=True)

    def of(self, name: str, check: Callable[[], tuple[_Result, str]]) -> _Result | None:
        """Run a check that gives a result and a line of text; None if it fails, with the sentence that says why."""
        try:
            result, text = check()
        except USER_ERRORS as error:
            self.failed = True
            self.line("FAILED", name, str(error))
            return None
        self.line("ok", name, text)
        return result


def _config(args: argparse.Namespace) -> tuple[Config, str]:
    from longseq.training.deepspeed_settings import check_deepspeed

    config = load_config(args.config, args.overrides)
    check_deepspeed(config)
    data, trainer = config.data, config.trainer
    nodes = f" on {trainer.nodes} nodes" if trainer.nodes > 1 else ""
    return config, (
        f"{args.config}: {data.batch_tokens:,} tokens per step on {config.processes} process(es){nodes} × "
        f"{trainer.accumulate} batch(es) of {config.batch_sequences} × {config.slice_length}"
    )


def _data(config: Config) -> tuple[Config, str]:
    resolve_sources(config)
    fit_parts(config)
    check_data(config)
    check_origin(config)
    check_benchmarks(config)
    files = {split: len(config.data.files(split)) for split in SPLITS}
    return config, "the beginning of every file was read: " + ", ".join(f"{n} {s}" for s, n in files.items() if n)


def _disk(config: Config) -> tuple[Config, str]:
    folder = resolved(user_path(config.run.dir))
    check_disk(config, folder)
    return config, f"{folder} has room for the checkpoints"


def _memory(config: Config) -> tuple[MemoryEstimate, str]:
    needed = estimate(config, vocabulary(config).size, on_cuda=on_cuda(config))
    return needed, needed.line()


def time_line(config: Config, seconds: float) -> str:
    """How long the whole training takes at this speed."""
    trainer = config.trainer
    whole = trainer.max_steps * seconds
    all_of_them = _duration(whole * config.processes)
    per = "GPU" if on_cuda(config) else "process"
    return (
        f"about {_duration(whole)} for {trainer.max_steps:,} steps, {all_of_them} of one {per}; "
        "validation and checkpoints come on top"
    )


def _duration(seconds: float) -> str:
    size, unit = next(
        (size, unit) for size, unit in ((3600, "hours"), (60, "minutes"), (0, "seconds")) if seconds >= size
    )
    value = seconds / (size or 1)
    return f"{value:,.{0 if value >= 10 or not size else 1}f} {unit}"


def _rehearse(config: Config, memory: MemoryEstimate, report: _Report) -> tuple[float, str]:
    with tempfile.TemporaryDirectory(prefix="longseq-check-") as folder:
        run = Run.create(_short(config, folder), default_name="check")
        code = local.train(run, config.trainer.devices, checkpoint=None, rehearse=True)
        if code:
            raise KeyboardInterrupt
        found = json.loads((run.path / "check.json").read_text())
    trainer = config.trainer
    report.line("ok", "devices", f"{trainer.devices} × {found['device']}, {trainer.precision}")
    if not on_cuda(config) and trainer.devices > cores():
        report.line(
            "warning", "cores", f"{trainer.devices} processes on {cores()} core(s) take turns; lower trainer.devices"
        )
    if found["backend"]:
        rate = found["bytes_per_second"] / 1e9
        report.line("ok", "collectives", f"{found['backend']}: an all-reduce of 64 MiB runs at {rate:.2f} GB/s")
    return found["seconds"], (
        f"forward, backward and optimiser at full length: {found['seconds']:.2f} s, "
        f"{found['tokens'] / found['seconds']:,.0f} tokens/s, {gib(found['peak'])} of tensors "
        f"({found['peak'] / memory.peak:.0%} of the estimate)"
    )


def _short(config: Config, folder: str) -> Config:
    """The same training for two steps, without anything that needs more of them."""
    short = copy.deepcopy(config)
    short.run.dir, short.run.name = folder, "check"
    short.trainer.max_steps = 2
    for name in ("valid_every", "checkpoint_every", "keep_best", "keep_every", "probe_every", "histogram_every"):
        setattr(short.trainer, name, 0)
    short.trainer.noise_every = short.trainer.length_warmup_steps = 0
    short.trainer.ema_decay, short.trainer.time_limit = 0.0, None
    return short
