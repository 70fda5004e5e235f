"""Types of options that several verbs take, and a place for what they write."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from longseq.opening import TARGET_HELP


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights are meant."""
    parser.add_argument("target", metavar="RUN|CHECKPOINT|FOLDER", type=Path, help=TARGET_HELP)
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """key=value on top of the model's configuration; the last of the positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.accelerator=cpu")


def at_least(least: int) -> Callable[[str], int]:
    """An option's whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def share(text: str) -> float:
    """An option's number in (0, 1]."""
    value = real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def real(text: str) -> float:
    """An option's number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Where results go: standard output, or a file that has its name once it is whole."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    from longseq.evaluation.keeping import aside

    with aside(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
    print(f"longseq: written to {path}", file=sys.stderr)


def ready() -> None:
    """Settings of a process that computes on its own. At SIGTERM it removes what it has half written, and ends."""
    import torch

    from longseq.allocator import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
