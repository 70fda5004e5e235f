"""A place for what is computed: standard output, or a file that has its name once it is whole. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from longseq.errors import LongseqError, place_of_errors
from longseq.runs import starts
from longseq_data.files import aside, resolved

_DEVICES = (Path("/dev"), Path("/dev/fd"))


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
        SupersededError: in a job that has started anew elsewhere meanwhile; nothing is left then.
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
        starts.check_own()


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


def shards_of(path: Path) -> Path:
    """Where what is finished of a file is kept until it is whole."""
    return path.with_name(f".{path.name}.shards")
