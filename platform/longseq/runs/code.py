"""The code of a run: a copy of both packages in its folder, made when it is submitted. No torch here.

    code/3f2a9c01b7d4/longseq, longseq_data   the packages, as they were
    code/3f2a9c01b7d4/snapshot.json           when and of which commit they were copied, and what was installed then
    code/used                                 which one the run goes on with

A job that comes back days later runs what was submitted, whatever the checkout holds by then. Jobs of other verbs keep
theirs next to the run's, or in a folder of their own (see longseq.launch.submission), and ``used`` is a training's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import longseq
import longseq_data
from longseq.errors import RunError
from longseq.runs.run import Run
from longseq_data.files import write_text

TOLD = "LONGSEQ_CODE"  # a variable: the snapshot that a job's processes are to run
_FACTS = "snapshot.json"
_DIGITS = 12
_DAY = 86400.0


@cache
def current() -> str:
    """The hash of the code that this process runs: of the names and contents of all files of both packages."""
    return _hash(_packages())


def _hash(packages: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for package in packages:
        for path in _files(package):
            content = path.read_bytes()
            digest.update(f"{package.name}/{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_DIGITS]


def kept(run: Run) -> str:
    """The hash of the code that a run goes on with; empty where none was kept.

    Raises:
        RunError: if it cannot be read.
    """
    # With any other error a run would go on with other code, unsaid.
    with _as_sentence(_folder(run), "read"), suppress(FileNotFoundError, NotADirectoryError):
        name = (_folder(run) / "used").read_text(errors="replace").strip()
        if name and folder_of(run, name).is_dir():
            return name
    return ""


def folder_of(run: Run, name: str) -> Path:
    """What a process that is to run a snapshot finds first on its path."""
    return _folder(run) / name


def keep(run: Run) -> None:
    """Keep the code of this process in the run's folder, and go on with it from now on.

    Raises:
        RunError: if it cannot be written.
    """
    keep_in(_folder(run))
    with _as_sentence(_folder(run), "kept"):
        write_text(_folder(run) / "used", f"{current()}\n")


def keep_in(folder: Path) -> None:
    """Keep the code of this process as one of the snapshots in a folder, for a job that is no training.

    Raises:
        RunError: if it cannot be written.
    """
    with _as_sentence(folder, "kept"):
        if not (folder / current()).is_dir():
            _copy(folder / current())


@contextmanager
def _as_sentence(folder: Path, done: str) -> Iterator[None]:
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise RunError(f"{folder}: the code of the run cannot be {done}: {error}.") from None


def _copy(target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    for left in target.parent.glob(".*"):  # by a copy that was killed
        if time.time() - left.stat().st_mtime > _DAY:
            shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        for package in _packages():
            # With their times: what Python has compiled stays valid, and no rank compiles it again.
            shutil.copytree(package, aside / package.name)
        if _hash(aside / package.name for package in _packages()) != target.name:  # no node would run it
            raise RunError(
                f"{_packages()[0].parent}: a file was changed while the code was copied from there: try again."
            )
        facts = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "git_commit": git_commit(), "packages": installed()}
        (aside / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        aside.chmod(0o777 & ~_umask())
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # another submission was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def facts_of_this_process() -> dict[str, object]:
    """What was noted when the code that this process runs was copied; empty for a checkout or an installed package."""
    with suppress(OSError, ValueError):
        return dict(json.loads((_packages()[0].with_name(_FACTS)).read_text()))
    return {}


def check_told() -> None:
    """Refuse to run other code than the job's script has told, as on a node that does not see its folder.

    Raises:
        RunError: naming the node and both.
    """
    if problem := other_than_told():
        raise RunError(f"{socket.gethostname()}: {problem}")


def other_than_told() -> str:
    """What is wrong where this process runs other code than the job's script has told; empty where it does not."""
    told, here = os.environ.get(TOLD), _packages()[0].parent
    if not told:
        return ""
    if here.resolve() != Path(told).resolve():
        return f"the job's code is {told}, and {here} would run: does the node see that folder?"
    try:
        found = current()
    except OSError as error:
        return f"{told} cannot be read there: {error}."
    if found != Path(told).name:  # which its content has given it
        return f"{told} is not as it was submitted: a file of it was changed, or does not come whole to this node."
    return ""


def changed_packages() -> list[str]:
    """What is installed in another version than when this process's code was copied: "numpy 2.1.0 → 2.2.0"."""
    before = facts_of_this_process().get("packages")
    if not isinstance(before, dict):
        return []
    now = installed()
    names = sorted(name for name in before if name in now and before[name] != now[name])
    return [f"{name} {before[name]} → {now[name]}" for name in names]


def installed() -> dict[str, str]:
    """The version of every package of this interpreter, but our own."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name != "longseq":
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def git_commit() -> str | None:
    """The commit of the code's checkout, with ``-dirty`` where files differ from it; None outside one."""
    facts = facts_of_this_process()
    if facts:
        commit = facts.get("git_commit")
        return commit if isinstance(commit, str) else None
    folder = os.fspath(_packages()[0])
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _folder(run: Run) -> Path:
    return run.path / "code"


def _packages() -> tuple[Path, Path]:
    return Path(str(longseq.__file__)).parent, Path(str(longseq_data.__file__)).parent


def _files(package: Path) -> Iterator[Path]:
    for path in sorted(package.rglob("*")):
        # NFS calls a file so that was removed while it was open.
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".nfs"):
            yield path


def _umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before
