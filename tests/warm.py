"""Commands of ``longseq`` in processes that begin with its libraries imported, which is most of what a tiny run takes.

A seed imports them once, without starting a thread, and forks for each command and for each training process that a
command starts. Those have the environment, folder, files and session of a process that was started anew, and run what
it runs. ``LONGSEQ_TESTS_COLD=1`` starts every process anew.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

TESTS = Path(__file__).parent
WORKER = "longseq.training.worker"  # a program, which must not have been imported
IMPORTED = (
    *("lightning.pytorch", "longseq.cli", "longseq.commands.evaluate", "longseq.commands.fit"),
    *("longseq.commands.resume", "longseq.evaluation.split_scores", "longseq.launch.local", "longseq.training.fit"),
    *("longseq.training.rehearsal", "torch.distributed.checkpoint", "torch.utils.tensorboard"),
)
_HIGH = 512  # own descriptors lie above those that a process may be given by number
_MOST_FILES = 64
_SEED = "LONGSEQ_TESTS_SEED"


@cache
def seed() -> str | None:
    """The address of this process's seed; None: processes are started anew."""
    import torch

    if os.environ.get("LONGSEQ_TESTS_COLD") == "1" or sys.platform != "linux" or torch.cuda.is_available():
        return None
    address = f"longseq-tests-{os.getpid()}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # It ends when its standard input closes, with this process.
    program = subprocess.Popen(
        [sys.executable, __file__, address],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    return address


class Process:
    """What the tests and ``launch.local`` use of a ``subprocess.Popen``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None = None,
        stdin: int | None = None,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
        start_new_session: bool = True,
        pass_fds: Sequence[int] = (),
    ):
        assert start_new_session
        assert stdin in (None, subprocess.DEVNULL)
        self.returncode: int | None = None
        self._seed = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._seed.connect(f"\0{os.environ.get(_SEED) or seed()}")
        files = [stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2, *pass_fds]
        asked = {"command": list(command), "folder": str(cwd or Path.cwd()), "numbers": [1, 2, *pass_fds]}
        with tempfile.TemporaryFile() as text:  # a message has a largest size
            text.write(json.dumps(asked | {"environment": dict(env)}).encode())
            text.flush()
            ancillary = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [text.fileno(), *files]))
            self._seed.sendmsg([b"start"], [ancillary])
        self.pid = int(self._seed.recv(64))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._seed.settimeout(timeout)
            try:
                answer = self._seed.recv(64)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired("longseq", timeout or 0) from None
            assert answer, "the seed of warm processes is gone"
            self.returncode = int(answer)
            self._seed.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def install() -> None:
    """Have commands that are called in this process start their training processes warm."""
    from longseq.launch import local

    local.subprocess = SimpleNamespace(Popen=_start, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]


def _start(command: list[str], **options: Any) -> Process | subprocess.Popen[bytes]:
    assert command[1:3] == ["-m", WORKER]
    warm = os.environ.get(_SEED) or seed()
    return Process(command, **options) if warm else subprocess.Popen(command, **options)


def _serve(address: str) -> tuple[dict[str, Any], str]:
    """Fork for each request; in a process so made, return what it has to do."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{address}")
    listener.listen(64)
    woken, waker = socket.socketpair()
    own = [_raised(each) for each in (listener, woken, waker)]
    listener, woken, waker = own
    for each in (woken, waker):
        each.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    look = selectors.DefaultSelector()
    for watched in (listener, woken, sys.stdin):
        look.register(watched, selectors.EVENT_READ)
    waiting: dict[int, socket.socket] = {}
    os.write(1, b"ready\n")
    while True:
        for key, _ in look.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            if key.fileobj is woken:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                for pid in [*waiting]:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        with waiting.pop(pid) as asker, contextlib.suppress(OSError):
                            asker.send(str(os.waitstatus_to_exitcode(status)).encode())
                continue
            asker = _raised(listener.accept()[0])
            _, files, _, _ = socket.recv_fds(asker, 64, _MOST_FILES)
            files = [_above(number) for number in files]
            with os.fdopen(files[0], "rb") as text:
                text.seek(0)
                asked = json.loads(text.read())
            pid = os.fork()
            if pid:
                for number in files[1:]:
                    os.close(number)
                waiting[pid] = asker
                with contextlib.suppress(OSError):
                    asker.send(str(pid).encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            look.close()
            for each in (asker, *own, *waiting.values()):
                each.close()
            for number, file in zip(asked["numbers"], files[1:], strict=True):
                os.dup2(file, number, inheritable=True)
                os.close(file)
            return asked, address


def _raised(held: socket.socket) -> socket.socket:
    return socket.socket(fileno=_above(held.detach()))


def _above(number: int) -> int:
    """The same open file under a number that no process is given."""
    above = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(number)
    return above


def _become(asked: dict[str, Any], address: str) -> None:
    """The process that was asked for, up to its end."""
    os.setsid()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    command = asked["command"]
    if command[1:2] == ["-m"]:
        sys.argv = command[2:]
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        runpy.run_module(WORKER, run_name="__main__", alter_sys=True)
        return
    import longseq.cli

    os.environ[_SEED] = address
    install()
    sys.argv = command
    sys.exit(longseq.cli.main())


if __name__ == "__main__":
    sys.path.remove(str(TESTS))
    for name in IMPORTED:
        __import__(name)
    from longseq.training import strategy

    strategy._import_without_compiler()
    os.environ.pop("DS_ACCELERATOR")
    threads = len([*Path("/proc/self/task").iterdir()])
    assert threads == 1, f"{threads} threads: a fork would have one of them"
    gc.collect()
    gc.freeze()
    _become(*_serve(sys.argv[1]))
