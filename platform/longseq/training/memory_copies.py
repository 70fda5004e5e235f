"""Copies of the training's last steps in the nodes' memory: each rank's part of a checkpoint, twice, on two nodes.

    /dev/shm/longseq-3f2a9c01b7d4/00002/step-00000018.ckpt/    of start 2
      training/rank-00001.safetensors ...                      as in a checkpoint on the disk
      .part-1.json                                             rank 1's part is whole: its files, and the position

The files outlive the processes. A part goes to the node's memory first, then to that of the next node, by a connection
between the two ranks: a lost rank or node leaves one of the two. The next start of the job writes what is there to the
run's folder, as a checkpoint like any other (longseq.launch.slurm.recall), and goes on from that.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from longseq.runs.checkpoint import TrainingPosition, checkpoint_name, step_of
from longseq.runs.run import Run
from longseq.training.collectives import ControlGroup
from longseq.training.shards import Content, write

PLACE = "LONGSEQ_MEMORY"  # a variable: the address where this node's ranks hear the others, and the folder
_CONNECT_SECONDS, _OLD_SECONDS = 10.0, 86400.0
_BLOCK = 1 << 20


def parts_in(folder: Path, start: int) -> dict[int, dict[int, dict[str, Any]]]:
    """What a node has of a start: of each step the ranks whose parts are whole, with what they say of themselves."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for note in (folder / f"{start:05d}").glob("step-*.ckpt/.part-*.json"):
        step = step_of(note.parent)
        with suppress(OSError, ValueError):
            if step is not None:
                found.setdefault(step, {})[int(note.stem.removeprefix(".part-"))] = json.loads(note.read_text())
    return found


class MemoryCopies:
    """Keeps this rank's part of a step, and that of the rank that has this one for its partner. All ranks make it.

    Attributes:
        ready: whether the copy before is in both places. While one rank's is not, none may begin another: so every
            step's parts are whole everywhere before those of the step before go. Never again where there was no room.
        snapshot: the last one, whose memory the next may have.
    """

    def __init__(self, run: Run, rank: int, world: int, each: int, control: ControlGroup, place: str):
        """each: processes of a node. place: what :data:`PLACE` says."""
        address, folder = place.split(" ", 1)
        self.rank, self.run = rank, run
        self.folder = Path(folder) / f"{run.start:05d}"
        self.snapshot: Mapping[str, Content] = {}
        self._thread: threading.Thread | None = None
        self._partner: socket.socket | None = None
        self._failed = False
        listener = socket.create_server(("", 0)) if world > each else None
        own = f"{address} {listener.getsockname()[1] if listener else 0} {secrets.token_hex(16)}"
        places = [str(place).split() for place in control.gather(own)]
        if listener is None:
            return
        threading.Thread(target=self._hear, args=(listener, places[rank][2].encode()), daemon=True).start()
        host, port, token = places[(rank + each) % world]
        try:
            self._partner = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
            self._partner.settimeout(None)
            self._partner.sendall(token.encode())
        except OSError as error:
            self._say(f"no copies on rank {(rank + each) % world}'s node ({host}:{port}: {error.strerror or error})")

    @property
    def ready(self) -> bool:
        return not self._failed and not (self._thread and self._thread.is_alive())

    def start(self, files: Mapping[str, Content], position: TrainingPosition, made: Callable[[], None]) -> None:
        """Begin to copy ``files``, which must not change once ``made`` returns, until this is ready again."""
        assert self.ready
        self.snapshot = files
        self._thread = threading.Thread(target=self._copy, args=(files, position, made), daemon=True)
        self._thread.start()

    def _copy(self, files: Mapping[str, Content], position: TrainingPosition, made: Callable[[], None]) -> None:
        try:
            made()
            step = self._begin(position.step)
            written = {name: asdict(write(step / name, content)) for name, content in files.items()}
            note = {"rank": self.rank, "position": asdict(position), "files": written}
            _leave(step, note)
        except OSError as error:
            self._failed = True
            self._say(f"no more copies in {self.folder} ({error.strerror or error})")
            return
        if self._partner is None:
            return
        try:
            text = json.dumps(note).encode()
            self._partner.sendall(len(text).to_bytes(4, "little") + text)
            for name in written:
                with (step / name).open("rb") as file:
                    self._partner.sendfile(file)
            if not self._partner.recv(1):
                raise ConnectionResetError("it has closed the connection")
        except OSError as error:
            self._partner = None
            self._say(f"no more copies on the next node ({error.strerror or error})")

    def _hear(self, listener: socket.socket, token: bytes) -> None:
        """Keep what the rank before sends, as long as it does."""
        with listener, suppress(OSError):
            while True:
                connection = listener.accept()[0]
                connection.settimeout(_CONNECT_SECONDS)
                with suppress(OSError):
                    if secrets.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token):
                        break
                connection.close()  # of somebody who has found the port
            connection.settimeout(None)
            stream = connection.makefile("rb")
            while length := stream.read(4):
                note = json.loads(stream.read(int.from_bytes(length, "little")))
                step = self._begin(note["position"]["step"])
                for name, facts in note["files"].items():
                    _receive(stream, step / name, facts["size"])
                _leave(step, note)
                connection.sendall(b"k")

    def _begin(self, number: int) -> Path:
        """The folder of a step. Those before the newest go: it is whole everywhere, or no rank would copy another."""
        step = self.folder / checkpoint_name(number)
        step.mkdir(parents=True, exist_ok=True, mode=0o700)
        before = sorted(path for path in self.folder.iterdir() if path.name < step.name)
        for old in before[:-1]:
            shutil.rmtree(old, ignore_errors=True)
        return step

    def _say(self, text: str) -> None:
        then = "after a loss the run may have to go on from the newest checkpoint on the disk"
        print(f"longseq: warning: rank {self.rank}: {text}: {then}.", file=sys.stderr, flush=True)


def remove_old(folder: Path) -> None:
    """What other runs have left next to one's folder, whose jobs were ended by force."""
    for left in folder.parent.glob("longseq-????????????"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if left.stat().st_uid == os.getuid() and time.time() - newest > _OLD_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _leave(step: Path, note: Mapping[str, Any]) -> None:
    """Say that a part is whole: the note appears by its renaming."""
    aside = step / f".part-{note['rank']}.partial"
    aside.write_text(json.dumps(note))
    aside.rename(step / f".part-{note['rank']}.json")


def _receive(stream: BinaryIO, path: Path, size: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        while size:
            block = stream.read(min(size, _BLOCK))
            if not block:
                raise ConnectionResetError
            file.write(block)
            size -= len(block)
