"""Options that several verbs take, and a place for what they write."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from longseq.commands.numbers import positive
from longseq.errors import LongseqError, place_of_errors
from longseq.opening import TARGET_HELP
from longseq_data.files import aside, resolved

TAKE_OVER_HELP = (
    "start although what had the run cannot be asked whether it still trains: a process of another machine, or a job "
    "where SLURM does not answer"
)
_OVERRIDE = re.compile(r"[A-Za-z]\w*(\.[\w-]+)+=")
_DEVICES = (Path("/dev"), Path("/dev/fd"))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights are meant."""
    parser.add_argument("target", metavar="RUN|CHECKPOINT|FOLDER", type=Path, help=TARGET_HELP)
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def add_models(parser: argparse.ArgumentParser) -> None:
    """One model or several, then keys."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|CHECKPOINT|FOLDER [key=value ...]",
        help=f"{TARGET_HELP}, or several of them; then keys, e.g. trainer.accelerator=cpu",
    )
    parser.set_defaults(overrides=[])
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def models_and_keys(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The words of a verb with several models: models, and key=value.

    Raises:
        LongseqError: where there is no model.
    """
    keys = [word for word in args.words if _OVERRIDE.match(word) and not Path(word).exists()]
    targets = [Path(word) for word in args.words if word not in keys]
    if not targets:
        raise LongseqError(f"{args.verb}: no model; give {TARGET_HELP}.")
    return targets, [*keys, *args.overrides]


def add_devices(parser: argparse.ArgumentParser) -> None:
    """How many processes share the work."""
    parser.add_argument(
        "--devices",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the work, a GPU each where there are any; the results are the same (default 1)",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """key=value on top of the model's configuration; the last of the positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.accelerator=cpu")


@contextmanager
def output(path: Path | None, *read: str | Path | None) -> Iterator[TextIO]:
    """Where results go: standard output, or a file that has its name once it is whole; none of those that are read."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    check_output(path, *read)
    with output_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
    print(f"longseq: written to {path}", file=sys.stderr)


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A name of its own to write to; what was written gets the name ``path`` when it is whole and on the disk.

    A link keeps pointing to its file, which is the one that is replaced.

    Raises:
        LongseqError: where the folder is missing, or the name is that of a folder, a pipe or a device; before anything
            is computed for the file.
        OSError: where the folder cannot be written to, or the disk is full; nothing is left then.
    """
    check_output(path)
    if path.is_symlink():
        path = path.resolve()
    with place_of_errors(path), aside(path) as partial:
        try:
            partial.touch()
        except OSError as error:
            raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from None
        yield partial


def check_output(path: Path, *read: str | Path | None) -> None:
    """Refuse what :func:`output_file` cannot write to, as far as that can be seen.

    Args:
        read: files that it would replace before they have been read for the last time.

    Raises:
        LongseqError: where the folder is missing, or the name is that of a folder, a pipe, a device or such a file.
    """
    if path.is_file() and any(each and Path(each).is_file() and path.samefile(each) for each in read):
        raise LongseqError(f"{path}: the file that is read, and results would replace it; choose another name.")
    device = path.absolute().parent in _DEVICES  # /dev/stdout is a link to what may be a file
    if device or (path.exists() and not path.is_file()):
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise LongseqError(f"{path}: {what}, and a file is to be written there; choose another name.")
    if path.is_symlink():
        path = resolved(path)
    if not path.parent.is_dir():
        raise LongseqError(f"{path}: the folder {path.parent} does not exist; make it, or choose another.")


def ready() -> None:
    """Settings of a process that computes on its own. At SIGTERM it removes what it has half written, and ends."""
    import torch

    from longseq.allocator import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
