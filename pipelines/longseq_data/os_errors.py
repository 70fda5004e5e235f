"""What the operating system refuses, in a sentence: path, reason, what to do. The one place that tells errnos apart."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

Notice = Callable[[str], object]  # gets a sentence about something that was dealt with

_log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a server, a disk or a network between, which may be back: to try again later is worth it.
PASSING = frozenset(
    {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ESHUTDOWN}
)
# What flock says of a file system without locks, Lustre without the mount option "flock" for instance.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

_REMEDIES = {
    errno.ENOSPC: "make room, or choose another disk",
    errno.EDQUOT: "remove what is no longer needed, have the quota raised, or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another disk",
    errno.EROFS: "this file system is mounted read-only; choose a folder on another one",
    errno.EACCES: "have its owner give this user the right (chmod, chown), or choose another path",
    errno.EPERM: "its owner, its attributes (lsattr) or the mount forbid it; choose another path",
    errno.ENOLCK: "this file system, or its server, gives no locks; mount it with them, or choose another folder",
    errno.ENOSYS: "this file system cannot do that; choose a folder on another one",
    errno.EOPNOTSUPP: "this file system cannot do that; choose a folder on another one",
    errno.EMFILE: "this process has as many files open as it may; raise the limit (ulimit -n)",
    errno.ENFILE: "this machine has as many files open as it may; end other programs, or raise fs.file-max",
    errno.ESTALE: "the server of this network file system has replaced or removed it; mount it anew if that stays so",
    errno.EIO: "the disk or its server fails; see the system's log (dmesg), or choose another disk",
    errno.EREMOTEIO: "the server of this file system fails; wait until it is back",
    errno.ETIMEDOUT: "the server of this file system does not answer; wait until it does",
    errno.EHOSTDOWN: "the server of this file system does not answer; wait until it does",
    errno.ENOTCONN: "the file system is no longer connected; mount it anew",
    errno.ESHUTDOWN: "the file system is no longer connected; mount it anew",
    errno.ENODEV: "the device is no longer there; mount it anew",
    errno.ENXIO: "the device is no longer there; mount it anew",
    errno.ENAMETOOLONG: "choose a shorter name, or a folder less deep",
    errno.ELOOP: "its links lead back to themselves; correct or remove them",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENOTDIR: "a part of this path is a file; correct the path",
    errno.ENOENT: "correct the path",
    errno.EEXIST: "choose another name, or remove it",
    errno.ENOTEMPTY: "choose another name, or empty it",
    errno.EBUSY: "another program uses it; wait for its end",
    errno.ETXTBSY: "another program uses it; wait for its end",
    errno.EMLINK: "this folder is as full as it may be; choose another one",
    errno.EXDEV: "both ends must lie on one file system; choose another folder",
    errno.ENOMEM: "the machine has not enough memory; end other programs, or use fewer processes",
    errno.EAGAIN: "there are as many processes as there may be; end others, or raise the limit (ulimit -u)",
    errno.EPIPE: "the program that reads it has ended",
    errno.ENOEXEC: "it is no program of this machine; install it again",
}
_OF_RUST = re.compile(r"\(os error (\d+)\)")


def said(error: BaseException) -> str:
    """The operating system's own words, in one line; of an exception that is not its own, the first line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else type(error).__name__


def remedy(error: OSError) -> str:
    """What to do about it, as the end of a sentence."""
    return _REMEDIES.get(error.errno or 0, "correct that")


def explained(error: OSError, path: Path | str | None = None, what: str = "") -> str:
    """``PATH: WHAT (REASON); REMEDY``, without a full stop.

    Args:
        path: what the user calls it; default: the file that the error names.
        what: what could not be done, e.g. "cannot be written".
    """
    where = error.filename if path is None else path
    reason = f"{what} ({said(error)})" if what else said(error)
    return f"{'input or output' if where is None else os.fsdecode(where)}: {reason}; {remedy(error)}"


def of_library(error: Exception, path: Path | str) -> OSError | None:
    """The OSError behind the exception of a library written in Rust, which has only words for it; None where it is
    about something else."""
    found = _OF_RUST.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) if found else None


def is_full(error: OSError) -> bool:
    """Whether room is what was missing: on the disk, in the quota, or in the file."""
    return error.errno in FULL


def may_pass(error: BaseException | None) -> bool:
    """Whether the same may work a while later, with nobody doing anything about it."""
    return isinstance(error, OSError) and error.errno in PASSING


def lock(file: IO[str] | IO[bytes], path: Path, notice: Notice = _log.warning, *, wait: bool = False) -> None:
    """Take the lock of an open file; it ends with the process, however that ends.

    The filelock package would put a file in its place where the file system has no locks, which outlives a process
    that is killed.

    Where the file system has no locks there is none, and ``notice`` says so.

    wait: until the process that has it lets it go.

    Raises:
        BlockingIOError: if another process has it, without ``wait``.
        OSError: for anything else.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        notice(f"{path}: no locks on this file system ({said(error)}); see to it that no second process does the same.")
