"""Files that are whole or not there: written under another name, and renamed when they are on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longseq_data.errors import DataError


def user_path(name: str | Path) -> Path:
    """A path with ``~`` and ``~user`` filled in.

    Raises:
        DataError: where there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = Path(name).parts[0]
        raise DataError(
            f"{name} does not exist: this machine has no user {user}; correct the name, or write ./{name}."
        ) from None


def resolved(path: str | Path) -> Path:
    """Without links and ``..``. Links that lead back to themselves stay, and say so when they are opened: Path.resolve
    raises a RuntimeError of its own until Python 3.13."""
    return Path(os.path.realpath(path))


@contextmanager
def aside(path: Path, name: str = "") -> Iterator[Path]:
    """A name of its own next to ``path`` to write to, which becomes ``path`` when the block ends well.

    No two writers share it, and it ends in ``.partial``. After a failure, a full disk say, nothing is left. The file
    gets the mode that the umask gives, whatever wrote it: safetensors keeps its files to their owner.

    name: what it begins with instead of ``path``'s, where other programs take any file with a name like that.
    """
    partial = path.with_name(f".{(name or path.name)[:60]}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            if not os.fstat(file.fileno()).st_mode & 0o077:
                partial.chmod(_plain_mode(partial))
        partial.replace(path)
    finally:
        with suppress(OSError):  # the failure itself says more
            partial.unlink(missing_ok=True)


def _plain_mode(beside: Path) -> int:
    """Of a file that is simply opened there. Asking for the umask would change it for all threads meanwhile."""
    probe = beside.with_name(f"{beside.name}.partial")
    try:
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def own_folder(path: Path) -> Path:
    """A folder of this user's that nobody else can write into, made if need be: others may write next to it.

    Raises:
        OSError: also where somebody else has the name, or has laid a link there.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            errno.EPERM, "it is a link, belongs to another user, or others may write into it", str(path)
        )
    return path


def sync_folder(folder: Path) -> None:
    """Put names on the disk: a rename is there when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
