"""Copies of the training's last steps in the nodes' memory: each rank's part of a checkpoint, twice, on two nodes.

    /dev/shm/longseq-1000-4711/             of user 1000's job 4711, nobody else's to enter
      .lock                                 held by the ranks of this node
      00002/step-00000018.ckpt/             of the run's start 2
        training/rank-00001.safetensors     as in a checkpoint on the disk
        .part-1.json                        rank 1's part is whole: its files, their sums, the position

The files outlive the processes. All ranks copy a step at the same time, in threads, and exchange their parts over a
group of their own: each sends its part to the same rank of the next node. A step counts once its parts are in both
places on all nodes; only then the step before the last one goes. The job's next start makes a checkpoint of the newest
step (longseq.launch.slurm.recall).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longseq.measure.control_group import left_to_the_group
from longseq.runs.checkpoint import TrainingPosition, checkpoint_name, step_of
from longseq.runs.run import Run
from longseq.training.shards import Content, write
from longseq_data.os_errors import said

FOLDER = "LONGSEQ_MEMORY"  # a variable: where this node's ranks keep their copies; not set: nowhere
_OLD_SECONDS = 3600.0
_BLOCK = 16 << 20
_LETTERS = 256
_LAST_SECONDS = 60.0  # for the copy under way at the training's end, whose other rank may be lost


def folder_of(job: str) -> Path:
    """Of a job's copies. The job's script removes it by this name."""
    return Path("/dev/shm") / f"longseq-{os.geteuid()}-{job}"


def make_own(folder: Path) -> None:
    """Make a folder that nobody else can enter, or see that it is one.

    Raises:
        OSError: where something else is there, such as another user's folder or a link.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_own(folder):
        raise PermissionError(errno.EPERM, "is not a folder of this user's alone (mode 700)", str(folder))


def is_own(folder: Path) -> bool:
    """Whether it is a folder, no link, of this user's that nobody else can enter."""
    with suppress(OSError):
        facts = folder.lstat()
        return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
    return False


def parts_in(folder: Path, start: int) -> dict[int, dict[int, dict[str, Any]]]:
    """What a node has of a start: of each step the ranks whose parts are whole, with what they say of themselves."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    if is_own(folder):
        for note in (folder / f"{start:05d}").glob("step-*.ckpt/.part-*.json"):
            step = step_of(note.parent)
            with suppress(OSError, ValueError):
                if step is not None:
                    found.setdefault(step, {})[int(note.stem.removeprefix(".part-"))] = json.loads(note.read_text())
    return found


def remove_old(folder: Path) -> None:
    """What ended jobs of this user have left next to one's folder: an hour old, and no process has it."""
    for left in folder.parent.glob(f"longseq-{os.geteuid()}-*"):
        with suppress(OSError):
            if left != folder and is_own(left):
                newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
                if time.time() - newest > _OLD_SECONDS:
                    with _lock(left, fcntl.LOCK_EX):
                        shutil.rmtree(left)


def _lock(folder: Path, kind: int) -> Any:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(descriptor, "rb")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


class MemoryCopies:
    """Keeps this rank's part of a step, and that of the rank that has this one for its partner. All ranks make it.

    Attributes:
        ready: whether the copy before has come to its end. Never again once one rank's could not be made.
        snapshot: the last one, whose memory the next may have.
    """

    def __init__(self, run: Run, rank: int, world: int, each: int, group: ProcessGroup | None, folder: Path):
        """each: processes of a node. group: of all ranks, for the copies alone; None for one process."""
        self.run, self.rank, self.world, self.each, self.group = run, rank, world, each, group
        self.top, self.folder = folder, folder / f"{run.start:05d}"
        self.snapshot: Mapping[str, Content] = {}
        self.failed = False
        self._thread: threading.Thread | None = None
        self._before: list[Path] = []  # steps that are whole, oldest first
        self._held: Any = None  # the folder's lock, as long as this process lives

    @property
    def ready(self) -> bool:
        return not self.failed and not (self._thread and self._thread.is_alive())

    def start(self, files: Mapping[str, Content], position: TrainingPosition, made: Callable[[], None]) -> None:
        """Begin to copy ``files``, which must not change once ``made`` returns, until this is ready again."""
        assert self.ready
        self.snapshot = files
        self._thread = threading.Thread(target=self._copy, args=(files, position, made), daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Wait for the copy under way: whether it has come to its end."""
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)
        return not (self._thread and self._thread.is_alive())

    def _copy(self, files: Mapping[str, Content], position: TrainingPosition, made: Callable[[], None]) -> None:
        step = self.folder / checkpoint_name(position.step)
        whole = False
        for old in self._before[:-1]:  # first, so that there are never three
            shutil.rmtree(old, ignore_errors=True)
        del self._before[:-1]
        try:
            sizes = self._all(sum(map(_bytes, files.values())))
            needed = [rank for rank, size in enumerate(sizes) if size]
            note = {"rank": self.rank, "position": asdict(position), "needed": needed, "files": {}}
            # Whatever it is that one rank cannot do, the others must hear of it.
            if self._agreed(_problem(lambda: self._write(step, note, files, sizes, made))):
                other, problem = self._exchanged(step, note)
                if self._agreed(problem):
                    whole = self._agreed(_problem(lambda: _leave(step, note, other)))
        except Exception as error:  # the connection to a rank that is lost: the training finds that out, too
            print(f"longseq: warning: rank {self.rank}: no more copies in memory: {error}", file=sys.stderr, flush=True)
        if whole:
            if not self._before:  # of starts before, which went on from less
                for left in self.top.glob("[0-9]*"):
                    if left != self.folder:
                        shutil.rmtree(left, ignore_errors=True)
            self._before.append(step)
        else:
            self.failed, self.snapshot = True, {}
            if is_own(self.top):
                shutil.rmtree(step, ignore_errors=True)

    def _write(
        self,
        step: Path,
        note: dict[str, Any],
        files: Mapping[str, Content],
        sizes: list[int],
        made: Callable[[], None],
    ) -> None:
        made()
        if self._held is None:
            self._take_place(sizes)
        make_own(self.folder)
        make_own(step)
        note["files"] = {name: asdict(write(step / name, content)) for name, content in files.items()}

    def _take_place(self, sizes: list[int]) -> None:
        """Before the first copy: the folder, its lock, and whether two steps' parts have room there.

        Raises:
            OSError: where they have not, or the folder is not this user's alone.
        """
        make_own(self.top)
        self._held = _lock(self.top, fcntl.LOCK_SH)
        first = self.rank - self.rank % self.each
        ranks = range(first, first + self.each)
        own = sum(sizes[rank] for rank in ranks)
        others = sum(sizes[(rank - self.each) % self.world] for rank in ranks) if self.world > self.each else 0
        needed, room = 2 * (own + others), room_in(self.top)
        if needed > room:
            text = f"two steps need {needed / 2**30:.2f} GiB of memory, and {room / 2**30:.2f} GiB are free"
            raise OSError(errno.ENOSPC, text, str(self.top))

    def _exchanged(self, step: Path, note: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """Send this rank's part to the next node, and keep that of the one before: its note, and what went wrong."""
        if self.group is None or self.world <= self.each:
            return None, ""
        to, of = (self.rank + self.each) % self.world, (self.rank - self.each) % self.world
        text = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
        size = torch.zeros(1, dtype=torch.int64)
        self._pass(torch.tensor([len(text)]), to, size, of)
        told = torch.zeros(int(size), dtype=torch.uint8)
        self._pass(text, to, told, of)
        other = json.loads(told.numpy().tobytes())
        problem = ""
        blocks = _blocks_of(step, note["files"])
        for block, place in zip_longest(blocks, _places_of(other["files"])):
            if place is None:
                self._pass(block, to, None, of)
                continue
            name, at, count, digest = place
            came = torch.empty(count, dtype=torch.uint8)
            self._pass(block, to, came, of)
            digest.update(came.numpy())
            try:
                if not problem:
                    _put(step / name, came, at)
            except OSError as error:  # what the other rank sends must still be heard
                problem = _why(error)
            if at + count == other["files"][name]["size"] and digest.hexdigest() != other["files"][name]["sha256"]:
                problem = problem or f"{step / name}: came damaged from rank {of}"
        return other, problem

    def _pass(self, mine: Tensor | None, to: int, theirs: Tensor | None, of: int) -> None:
        assert self.group is not None
        sent = None if mine is None else self.group.send([mine], to, 0)
        if theirs is not None:
            self.group.recv([theirs], of, 0).wait()
        if sent is not None:
            sent.wait()

    def _all(self, number: int) -> list[int]:
        """Every rank's number."""
        if self.group is None:
            return [number]
        each = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self.group.allgather([each], [torch.tensor([number])]).wait()
        return [int(value) for value in each]

    def _agreed(self, problem: str) -> bool:
        """Whether no rank has a problem. Else rank 0 says what the first one is."""
        with_one = [rank for rank, bad in enumerate(self._all(int(bool(problem)))) if bad]
        if not with_one:
            return True
        text = torch.tensor(list(problem.encode()[:_LETTERS].ljust(_LETTERS)), dtype=torch.uint8)
        if self.group is not None:
            self.group.broadcast(text, with_one[0]).wait()
        if self.rank == 0:
            reason = text.numpy().tobytes().decode(errors="replace").strip()
            print(
                f"longseq: warning: no more copies in memory in this start (rank {with_one[0]}: {reason}): after a "
                "loss the run goes on from the newest checkpoint on the disk, or the copies until now.",
                file=sys.stderr,
                flush=True,
            )
        return False


def room_in(folder: Path) -> int:
    """Bytes that may be written there: what the file system has, and this job's limit of memory."""
    facts = os.statvfs(folder)
    return int(min(facts.f_bavail * facts.f_frsize, left_to_the_group()))


def _bytes(content: Content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(tensor.numel() * tensor.element_size() for tensor in content.values())


def _problem(work: Callable[[], None]) -> str:
    """Why it could not be done; empty if it was."""
    try:
        work()
    except Exception as error:
        return _why(error)
    return ""


def _why(error: Exception) -> str:
    return f"{getattr(error, 'filename', None) or ''} {said(error) if isinstance(error, OSError) else error}".strip()


def _blocks_of(step: Path, files: Mapping[str, Any]) -> Iterator[Tensor]:
    """A part's bytes as they are sent."""
    for name in files:
        with (step / name).open("rb", buffering=0) as file:
            while data := file.read(_BLOCK):
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _places_of(files: Mapping[str, Any]) -> Iterator[tuple[str, int, int, Any]]:
    """Where they go: file, offset, bytes, and what sums the file."""
    for name, facts in files.items():
        digest = hashlib.sha256()
        for at in range(0, facts["size"], _BLOCK):
            yield name, at, min(_BLOCK, facts["size"] - at), digest


def _put(path: Path, block: Tensor, at: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("r+b" if at else "wb", buffering=0) as file:
        file.seek(at)
        left = block.numpy().data
        while len(left):
            left = left[file.write(left) :]


def _leave(step: Path, *notes: Mapping[str, Any] | None) -> None:
    """Say that parts are whole: their notes appear by their renaming."""
    for note in notes:
        if note and note["files"]:
            aside = step / f".part-{note['rank']}.partial"
            aside.write_text(json.dumps(note))
            aside.rename(step / f".part-{note['rank']}.json")
