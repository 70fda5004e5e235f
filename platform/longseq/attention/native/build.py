"""Compile the C++ kernels on first use, and load them.

They are compiled here and not installed, so that they use every instruction this machine has and installing needs no
compiler. It takes some seconds, once for each version of the sources, the compiler and the processor; the result is
kept in $XDG_CACHE_HOME/longseq (~/.cache/longseq). Without GCC there are no native kernels, and "auto" goes on with
PyTorch's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
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
        return _loaded()
    except (BuildError, OSError) as error:
        _log.info("attention runs without native CPU kernels: %s", error)
        return str(error)


def _loaded() -> ctypes.CDLL:
    """The shared library, compiled if this is its first use."""
    compiler, flags = _compiler(), _flags()
    sources = sorted(_SOURCES.glob("*.[ch]pp"))
    parts = [_version(compiler), " ".join(flags), _processor(), *(path.read_text() for path in sources)]
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()
    name = f"attention-{digest}.so"
    try:
        target = _cache() / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, target)
        return ctypes.CDLL(str(target))
    except OSError as error:  # a home that cannot be written, or a full one
        _log.info("the native attention kernels cannot be kept (%s); they are compiled for this process alone", error)
    with tempfile.TemporaryDirectory(prefix="longseq-") as folder:
        _compile(compiler, flags, Path(folder, name))
        return ctypes.CDLL(str(Path(folder, name)))


def _flags() -> tuple[str, ...]:
    return _FLAGS + _X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else _FLAGS


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    _log.info("compiling the native attention kernels, once for this machine: %s", target)
    # Several processes may get here at once: each makes its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        _run([compiler, *flags, "-c", str(_SOURCES / _MAIN), "-o", str(compiled)])
        # Linked without an OpenMP library: its symbols are those of PyTorch's, so that both share one pool of threads.
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        with linked.open("rb") as written:
            os.fsync(written.fileno())  # loading half a library would kill the process
        linked.replace(target)


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


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
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


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(folder or Path.home() / ".cache") / "longseq"
    except RuntimeError as error:  # a container may have no home for this user
        raise OSError(str(error)) from error
