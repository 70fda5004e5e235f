"""A rank that hangs is named, and its start ends: a collective without it waits for half an hour, and blames nobody.

Every rank counts its signs of life (a batch begun, its backward pass, ...) and leaves the count in rank 0's store, from
a thread of its own. Rank 0 reads all of them; the others see whether rank 0 answers. Two things are told apart:

    silent   a process from which nothing comes any more: it is stopped, its machine hangs, or the network is cut
    stuck    no rank has given a new sign for so long: the one with the fewest keeps the others waiting

Time is counted while this process runs: a job that SLURM suspends stands still as a whole.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch._C._distributed_c10d import TCPStore

from longseq.errors import EXIT_CRASHED
from longseq.launch.slurm.place import Place

_BEAT_SECONDS, _LOOK_SECONDS = 5.0, 1.0
_WARN_SECONDS = 30.0
_DUMP_SECONDS = 10.0
_LEAVING = "leaving"  # set in the store when the start ends
_MUCH = 1 << 20  # bytes written between two beats: a checkpoint that is being written is a sign of life


@dataclass
class Pulse:
    """What is known of one rank."""

    signs: int = 0  # of life
    beat: int = -1  # how often its thread has written
    wrote: int = 0  # bytes
    silent: float = 0.0  # seconds without a new beat


class Heartbeats:
    """Judges by what the ranks have left in the store, as often as :meth:`look` is called."""

    def __init__(self, place: Place, seconds: float):
        self.place, self.seconds = place, seconds
        self.pulses = {rank: Pulse() for rank in (range(place.world) if place.rank == 0 else (0,))}
        self.still = 0.0  # seconds without a sign of any rank
        self.begun = False  # the first step may take long: libraries compile, data are read up to a place

    def hear(self, rank: int, text: str) -> None:
        """Take what a rank has written: "signs beat bytes"."""
        pulse = self.pulses[rank]
        signs, beat, wrote = map(int, text.split())
        if beat != pulse.beat:
            pulse.silent = 0.0
        if signs != pulse.signs or wrote - pulse.wrote > _MUCH:
            self.still = 0.0
        self.begun = self.begun or signs > 0
        pulse.signs, pulse.beat, pulse.wrote = signs, beat, wrote

    def look(self, elapsed: float) -> tuple[str, bool]:
        """What is to be said after so many more seconds (nothing, mostly), and whether the start ends by it."""
        for pulse in self.pulses.values():
            pulse.silent += elapsed
        if self.begun and self.place.rank == 0:
            self.still += elapsed
        silent = [rank for rank, pulse in self.pulses.items() if pulse.silent >= min(_WARN_SECONDS, self.seconds)]
        if silent:
            since = max(self.pulses[rank].silent for rank in silent)
            text = f"{self._named(silent)} not answered for {since:.0f} s"
            return text, since >= self.seconds
        if self.still < self.seconds:
            return "", False
        fewest = min(pulse.signs for pulse in self.pulses.values())
        behind = [rank for rank, pulse in self.pulses.items() if pulse.signs == fewest]
        if len(behind) == self.place.world:
            nodes = ", ".join(self.place.nodes)
            return f"{nodes}: no rank has gone on for {self.still:.0f} s, all at the same place", True
        return f"{self._named(behind)} kept the others waiting for {self.still:.0f} s", True

    def _named(self, ranks: Sequence[int]) -> str:
        """ "node2: rank 3, 4 has" """
        nodes = ", ".join(dict.fromkeys(map(self.place.node_of, ranks)))
        return f"{nodes}: rank {', '.join(map(str, ranks))} {'has' if len(ranks) == 1 else 'have'}"


class Watchdog(pl.Callback):
    """Counts this rank's signs of life, and watches the others' while the training runs.

    port: of rank 0's store. silent: a file that says which rank is silent, as long as one is. trace: where this rank
    leaves its last collectives when one of them has not ended. lost: gets the sentence that begins with the nodes to
    blame, before this process ends.
    """

    def __init__(self, place: Place, port: int, seconds: float, silent: Path, trace: Path, lost: Callable[[str], None]):
        self.place, self.port, self.seconds, self.silent, self.lost = place, port, seconds, silent, lost
        self.trace, self.leaving = trace, threading.Event()
        self.heartbeats = Heartbeats(place, seconds)
        self.signs = 0
        self.over = threading.Event()
        self.lock = threading.Lock()

    def setup(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        for name, work in (("beat", self._beat), ("judge", self._judge)):
            threading.Thread(target=work, name=f"watchdog-{name}", daemon=True).start()

    def teardown(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        self.over.set()

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self.over.set()

    def _sign(self, *_: Any, **__: Any) -> None:
        self.signs += 1

    on_train_batch_start = on_before_backward = on_after_backward = on_before_optimizer_step = _sign
    on_train_batch_end = on_validation_batch_start = on_validation_batch_end = on_validation_end = _sign

    def _beat(self) -> None:
        """Leave this rank's pulse in the store, and hear the others'; an answer that does not come is heard as none."""
        beat, there, awaited = 0, [], list(self.heartbeats.pulses)
        with suppress(RuntimeError):  # rank 0 is gone: srun ends this process, or the training has ended
            wait = timedelta(seconds=self.seconds)
            store = TCPStore(self.place.address, self.port, timeout=wait, wait_for_workers=False)
            while not self.over.is_set():
                store.set(f"beat/{self.place.rank}", f"{self.signs} {beat} {_written()}")
                there += [rank for rank in awaited if store.check([f"beat/{rank}"])]
                awaited = [rank for rank in awaited if rank not in there]
                texts = store.multi_get([f"beat/{rank}" for rank in there]) if there else []
                with self.lock:
                    for rank, text in zip(there, texts, strict=True):
                        self.heartbeats.hear(rank, bytes(text).decode())
                if self.leaving.is_set():
                    store.set(_LEAVING, "")
                elif store.check([_LEAVING]):
                    self.leaving.set()
                    leave_trace(self.trace)
                beat += 1
                self.over.wait(_BEAT_SECONDS)

    def _judge(self) -> None:
        before, said = time.monotonic(), ""
        while not self.over.wait(_LOOK_SECONDS):
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * _LOOK_SECONDS), now  # this process may have been stopped
            with self.lock:
                text, ends = self.heartbeats.look(elapsed)
            if ends:
                self._leave(text)
            if bool(text) != bool(said):
                said = text
                self._tell(text)

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # for people
            if text:
                self.silent.write_text(f"{text}\n")
                print(f"longseq: warning: {text}; the start ends after {self.seconds:g} s (hang_seconds).", flush=True)
            else:
                self.silent.unlink(missing_ok=True)
                print("longseq: all ranks answer again.", flush=True)

    def _leave(self, text: str) -> None:
        self.leaving.set()
        leave_trace(self.trace)
        time.sleep(2 * _BEAT_SECONDS)  # the others hear of it, and leave theirs
        self.lost(
            f"{text} (hang_seconds={self.seconds:g} of the site's profile: raise it where a step or a checkpoint "
            "takes so long)."
        )
        os._exit(EXIT_CRASHED)


def leave_trace(path: Path) -> None:
    """Write the last collectives of this process, those that wait included, for ``torchfrtrace``."""
    from torch._C import _distributed_c10d as native

    def dump() -> None:
        name = "_dump_nccl_trace" if hasattr(native, "_dump_nccl_trace") else "_dump_fr_trace"
        with suppress(OSError):  # for people
            path.write_bytes(getattr(native, name)())

    thread = threading.Thread(target=dump, daemon=True)
    thread.start()
    thread.join(_DUMP_SECONDS)  # whoever ends a process that hangs must not hang


def _written() -> int:
    """Bytes that this process has handed to file systems; 0 where the kernel does not count them."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("write_bytes:")).split()[1])
    return 0
