"""Signs of life: where this training process is, told once a second to the process that watches it.

The watcher (see longseq.launch.watchdog) is another process of the same machine, at the other end of a socket: what it
hears depends on no file and no network, and a process that was stopped says nothing. Marks cost the training two
additions; a thread sends the last one.
"""

from __future__ import annotations

import json
import os
import select
import socket
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longseq_data import children

BEAT_SECONDS = 1.0
TRACE = b"trace"  # what the watcher asks for: the last collectives
# How much longer than a step something may take: what lies between steps (data, validations, checkpoints, probes) has
# no usual time, and the first steps and compilers take their own.
BETWEEN, START = 10.0, 30.0
LEAST = 5.0  # seconds: signs are counted once a second, and a busy machine may miss some
_STEPS = 10.0  # median steps that a step may take
_REMEMBERED = 32
_DUMP_SECONDS = 10.0


@dataclass(frozen=True)
class Sign:
    """What a process says of itself."""

    beat: int = 0  # how often it has said something
    batch: int = 0  # batches begun
    mark: int = 0  # how many things it has begun or ended since the batch began: where in it this process is
    doing: str = "starting"  # in the words of Lightning's profiler
    waits_for_data: bool = False
    limit: float = 60.0 * START  # seconds that this may take
    silence: float = 60.0  # seconds without a sign after which it counts as hanging; 0: never
    device: str = "cpu"
    traced: bool = False  # whether its last collectives were left, as the watcher has asked
    hub: str = ""  # where the guards of a job meet, ADDRESS:PORT, once the ranks have met


class Vitals:
    """Counts marks in the training's thread, and sends the last one from a thread of its own.

    channel: to the watcher; without one nothing is sent. trace: where the last collectives are left when it asks.
    """

    def __init__(self, channel: socket.socket | None = None, trace: Path | None = None):
        self.channel, self.trace = channel, trace
        self.hang_seconds = 60.0  # trainer.hang_seconds
        self.batch = self.mark = self.compiling = 0
        self.doing, self.device, self.hub = "starting", "cpu", ""
        self.within: float | None = None  # seconds that something with a limit of its own may take
        self.in_step = self.in_data = self.traced = False
        self._began = 0.0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._beat = self._storage = self._looks = 0
        if channel is not None:
            channel.setblocking(False)
            threading.Thread(target=self._tell, name="vitals", daemon=True).start()

    @property
    def seconds(self) -> float:
        """Without a sign, or of a step, after which it counts as hanging; 0: never."""
        return max(LEAST, self.hang_seconds) if self.hang_seconds else 0.0

    def at(self, doing: str) -> None:
        """Something else has begun."""
        self.mark += 1
        self.doing = doing

    def begin_batch(self) -> None:
        self.batch += 1
        self.mark = 0
        self.in_step, self._began = True, time.monotonic()

    def end_batch(self) -> None:
        self.in_step = False
        if self.batch > 2:  # the first ones compile
            self._steps.append(time.monotonic() - self._began)

    def limit(self) -> float:
        """Seconds that what goes on now may take."""
        step = max(self.seconds, _STEPS * statistics.median(list(self._steps) or [0.0]))
        if self.within is not None:
            return self.within
        if self.batch <= 2 or self.compiling:
            return START * step
        return step if self.in_step else BETWEEN * step

    def sign(self) -> Sign:
        """As of now."""
        self._beat += 1
        return Sign(
            beat=self._beat,
            batch=self.batch,
            mark=self.mark,
            doing=self.doing,
            waits_for_data=self.in_data,
            limit=self.limit(),
            silence=self.seconds,
            device=self.device,
            traced=self.traced,
            hub=self.hub,
        )

    def take_storage_share(self) -> float:
        """Of the looks since this was last asked, the share that found this process or its loader's in storage."""
        share = self._storage / self._looks if self._looks else 0.0
        self._storage = self._looks = 0
        return share

    def watch_compiler(self) -> None:
        """Tell when torch compiles, which it may do again for batches of another shape."""
        from torch._dynamo.callback import callback_handler

        def begin(*_: object) -> None:
            self.compiling += 1
            self.at("compiling")

        def end(*_: object) -> None:
            self.compiling -= 1
            self.at("compiled")

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)

    def _tell(self) -> None:
        assert self.channel is not None
        while self.channel.fileno() >= 0:
            self._looks += 1
            self._storage += _in_storage()
            with suppress(OSError):  # the watcher is slow, or gone: it will hear the next one
                self.channel.send(json.dumps(asdict(self.sign())).encode())
            try:
                asked, _, _ = select.select([self.channel], [], [], BEAT_SECONDS)
                if asked and self.channel.recv(64) == TRACE:
                    if self.trace is not None:
                        leave_trace(self.trace)
                    self.traced = True
            except (OSError, ValueError):  # closed meanwhile
                time.sleep(BEAT_SECONDS)


def _in_storage() -> bool:
    """Whether the main thread, or that of a process that it has started, is in an uninterruptible sleep."""
    pid = os.getpid()
    with suppress(OSError, IndexError):  # one of them has ended
        pids = [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return "D" in [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] for each in pids]
    return False


def stacks_on_request(file: int) -> None:
    """Write the Python stacks of all threads to the open file on SIGQUIT, here and in the loader's processes."""
    os.environ[children.STACKS] = f"/proc/{os.getpid()}/fd/{file}"
    children.stacks_on_request()


def leave_trace(path: Path) -> None:
    """Write the last collectives of this process, those that wait included, for ``torchfrtrace``."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist
    from torch._C import _distributed_c10d as native

    if not dist.is_initialized():
        return

    def dump() -> None:
        name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
        with suppress(OSError):  # for people
            path.write_bytes(getattr(native, name)())

    thread = threading.Thread(target=dump, daemon=True)
    thread.start()
    thread.join(_DUMP_SECONDS)  # whoever ends a process that hangs must not hang
