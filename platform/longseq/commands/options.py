"""Options that several verbs take, and a place for what they write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from longseq.errors import LongseqError
from longseq.opening import TARGET_HELP
from longseq_data.files import aside


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights are meant."""
    parser.add_argument("target", metavar="RUN|CHECKPOINT|FOLDER", type=Path, help=TARGET_HELP)
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """key=value on top of the model's configuration; the last of the positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.accelerator=cpu")


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Where results go: standard output, or a file that has its name once it is whole."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    require_folder(path)
    with aside(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
    print(f"longseq: written to {path}", file=sys.stderr)


def require_folder(path: Path) -> None:
    """Refuse a file in a folder that there is not, before anything is computed for it.

    Raises:
        LongseqError: naming the folder.
    """
    if not path.parent.is_dir():
        raise LongseqError(f"{path}: the folder {path.parent} does not exist; make it, or choose another.")


def ready() -> None:
    """Settings of a process that computes on its own."""
    import torch

    from longseq.allocator import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()
