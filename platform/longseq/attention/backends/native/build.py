"""Compile the C++ kernels on first use, and load them.

They are compiled here and not installed, so that they use every instruction this machine has and installing needs no
compiler. It takes some seconds, once for each version of the sources, the compiler and the processor: processes that
start together wait for the first one. The result is kept in $XDG_CACHE_HOME/longseq (~/.cache/longseq), or in the
temporary folder where that cannot be written. Without GCC there are no native kernels, and "auto" continues with
PyTorch's own.

What is loaded runs as this user, so a library is only loaded if nobody else could have written it, and if its last
bytes are the checksum of the others: loading half of one would kill the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SOURCES = Path(__file__).parent
_MAIN = "kernels.cpp"
_FLAGS = (
    *("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden"),
    # what makes vectors of loops; NaN and infinity keep their meaning
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_X86_FLAGS = ("-mprefer-vector-width=512",)
_TIME_LIMIT = 300  # seconds; it takes about three
_CHECKSUM_BYTES = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger("longseq")


class BuildError(Exception):
    """Why there are no native kernels here: one clause for the end of a sentence."""


def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine; None if they can. Compiles them if need be."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The compiled kernels. RuntimeError where :func:`unavailable` says that there are none."""
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(f"there are no native kernels: {found}")
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    try:
        return _loaded(_Recipe.of_this_machine())
    except (BuildError, OSError) as error:
        return str(error)


@dataclass(frozen=True)
class _Recipe:
    """All that the compiled library depends on."""

    compiler: str
    flags: tuple[str, ...]
    name: str  # of the file, a hash of everything

    @classmethod
    def of_this_machine(cls) -> _Recipe:
        compiler, flags = _compiler(), _flags()
        sources = sorted(_SOURCES.glob("*.[ch]pp"))
        # Compilers of one version may have other defaults: the path counts too.
        parts = [os.path.realpath(compiler), _version(compiler), " ".join(flags), _processor()]
        text = "\0".join([*parts, *(path.read_text() for path in sources)])
        digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=10).hexdigest()
        return cls(compiler, flags, f"attention-{digest}.so")


def _loaded(recipe: _Recipe) -> ctypes.CDLL:
    """The shared library: from the first folder that can keep it, compiled if this is its first use."""
    problems: list[str] = []
    for folder in _folders():
        found = _from(folder, recipe)
        if isinstance(found, ctypes.CDLL):
            if problems:
                _log.warning("The native attention kernels are kept in %s (%s).", folder, "; ".join(problems))
            return found
        problems.append(found)
    with tempfile.TemporaryDirectory(prefix="longseq-") as private:
        library = Path(private, recipe.name)
        _compile(recipe.compiler, recipe.flags, library)
        loaded = ctypes.CDLL(str(library))
    _log.warning("The native attention kernels are compiled at every start (%s).", "; ".join(problems))
    return loaded


def _from(folder: Path, recipe: _Recipe) -> ctypes.CDLL | str:
    """The library of a folder, or why it can neither be read nor written there."""
    target = folder / recipe.name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.geteuid() and found.st_mode & _OTHERS_WRITE:  # an umask of 002 left it open
            folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)
        _refuse_if_others_write(folder.stat(), stat.S_ISDIR)
        if not _is_whole(target):
            with _only_one(folder):
                if not _is_whole(target):  # nobody compiled it while this process waited
                    _compile(recipe.compiler, recipe.flags, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


def _is_whole(library: Path) -> bool:
    """Whether it is a library of this user's, or root's, as it was written."""
    try:
        with os.fdopen(os.open(library, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            _refuse_if_others_write(os.fstat(file.fileno()), stat.S_ISREG)
            content = file.read()
    except OSError:
        return False
    return _checksum(content[:-_CHECKSUM_BYTES]) == content[-_CHECKSUM_BYTES:]


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()


def _refuse_if_others_write(of: os.stat_result, is_right_kind: Callable[[int], bool]) -> None:
    if not is_right_kind(of.st_mode):
        raise PermissionError(errno.EPERM, "it is neither a folder nor a file")
    if of.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"it belongs to another user ({of.st_uid})")
    if of.st_mode & _OTHERS_WRITE:
        raise PermissionError(errno.EPERM, "other users may write it (chmod go-w)")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; elsewhere each compiles, and the last rename wins."""
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "rb") as lock:
        with contextlib.suppress(OSError):  # no locks there
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flags() -> tuple[str, ...]:
    return _FLAGS + _X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else _FLAGS


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    _log.info("compiling the native attention kernels, once for this machine: %s", target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compiling-") as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        try:
            _run([compiler, *flags, "-c", str(_SOURCES / _MAIN), "-o", str(compiled)], folder)
            # Without an OpenMP library: its symbols are those of PyTorch's, so that both share one pool of threads.
            _run([compiler, "-shared", str(compiled), "-o", str(linked)], folder)
        except BuildError:
            _refuse_if_full(Path(folder))  # then it is not the compiler's fault
            raise
        with linked.open("ab") as file:
            file.write(_checksum(linked.read_bytes()))
            file.flush()
            os.fsync(file.fileno())
        linked.chmod(0o755)  # whatever the umask: others must not write it
        linked.replace(target)


def _refuse_if_full(folder: Path) -> None:
    """OSError where a file as large as the library cannot be written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4 * 1024**2))
        file.flush()


def _compiler() -> str:
    asked = os.environ.get("CXX")
    found = shutil.which(asked or "g++")
    if not found:
        raise BuildError(f"the compiler {asked} of $CXX was not found" if asked else "g++ was not found; install GCC")
    if "Free Software Foundation" not in _version(found):
        raise BuildError(f"{found} is not GCC, whose OpenMP is PyTorch's; set CXX to a g++")
    return found


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _run(command: list[str], temporary: str | None = None) -> str:
    environment = os.environ | ({"TMPDIR": temporary} if temporary else {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise BuildError(f"{' '.join(command[:1])} failed ({said.strip()})")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folders() -> Iterator[Path]:
    """Where the library may be kept, best first: the user's cache, else the machine's temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # a container may have no home for this user
        yield Path(home or Path.home() / ".cache") / "longseq"
    yield Path(tempfile.gettempdir(), f"longseq-{os.geteuid()}")
