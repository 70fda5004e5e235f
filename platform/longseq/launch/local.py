"""Training processes on this machine: start them, pass on a stop, and let none outlive the others.

Each process runs ``longseq.training.worker`` in a session of its own, so that a terminal's Ctrl-C reaches only this
parent, which asks all of them to stop at the same step. They hold the read end of a pipe and end when it closes,
so they never outlive a parent that was killed.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from longseq.devices import environment_of_place
from longseq.errors import EXIT_GO_ON, EXIT_SUPERSEDED, DivergedError, LongseqError, SupersededError
from longseq.launch.gpu_settings import gpu_settings, recorder_settings, where_traces_are
from longseq.launch.watchdog import Judge, Look, Ward, keep_all, sentence
from longseq.runs.run import Run
from longseq.training.signs import PEER_LOST, STOP_SIGNAL, diverged_path, report_path
from longseq_data.cores import cores

# How long the others may take to notice that one process has died, before they are killed.
_GRACE_SECONDS = 5.0
_ECHO_SECONDS = 1.0
_SOFT = (signal.SIGUSR1, signal.SIGUSR2)


def train(
    run: Run, devices: int, checkpoint: Path | None, origin: Path | None = None, *, rehearse: bool = False
) -> int:
    """Train a run with ``devices`` processes until it ends; or ``rehearse`` its first steps and keep nothing.

    Args:
        checkpoint: to go on from.
        origin: without one, the checkpoint or exported folder whose weights the training begins with.

    Returns:
        0 when the last step was reached, ``EXIT_GO_ON`` when stopped and saved, 130 when stopped before the first
        step.

    Raises:
        LongseqError: when a process fails; the message is that process's own where it left one.
    """
    nodes = run.config().trainer.nodes
    if nodes > 1:
        raise LongseqError(
            f"trainer.nodes={nodes}: processes on other machines are started by `longseq submit`; to train on this one "
            f"alone, set trainer.nodes=1 trainer.devices={nodes * devices}, or fewer."
        )
    with ExitStack() as stack:
        reports = stack.enter_context(tempfile.TemporaryDirectory(prefix="longseq-"))
        requests = stack.enter_context(_stop_requests())
        wards = [stack.enter_context(closing(Ward(rank))) for rank in range(devices)]
        read_end, write_end = os.pipe()
        stack.callback(os.close, write_end)
        port = free_port()
        processes = [
            _start(run, checkpoint, origin, rehearse, ward, devices, Path(reports), read_end, port) for ward in wards
        ]
        os.close(read_end)
        codes, hang = _wait(processes, requests, run, wards)
        if hang:
            raise LongseqError(f"{hang} Go on with `{run.resume_command}`." if run.checkpoints() else hang)
        return _outcome(codes, requests, run, Path(reports))


# What other launchers (Open MPI, MPICH, MVAPICH, PMIx, torchrun) tell their processes, and libraries believe: DeepSpeed
# holds MPI's ranks against ours. SLURM's are not among them: they are overruled by those that we give.
_PLACES = re.compile(
    r"OMPI_(COMM_WORLD|UNIVERSE|FIRST_RANK).*|(PMI|PMIX|HYDRA|PALS|TORCHELASTIC|ROLE)_.*|MV2_COMM_WORLD_.*"
    r"|MPI_LOCAL.*|(GROUP|CROSS)_(RANK|SIZE|WORLD_SIZE)|LOCAL_(SIZE|WORLD_SIZE)"
)


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the places that another launcher has given: those are ours to give."""
    return {name: value for name, value in environment.items() if not _PLACES.fullmatch(name)}


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What a training process finds in its environment: this one's, and its place among the others."""
    threads = max(1, cores() // world)
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # else gloo looks the host's name up, which fails on a laptop without a network
        **without_ranks(os.environ),
        "RANK": str(rank),
        **environment_of_place(rank, world, os.environ),
        **gpu_settings(os.environ),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # A letter that a terminal or a log lacks is no reason to fail.
        "PYTHONIOENCODING": f"{os.environ.get('PYTHONIOENCODING', '').partition(':')[0]}:replace",
        "PYTHONSAFEPATH": "1",  # a file of the user's named like a library must not be imported
        # DeepSpeed builds some of its operators with ninja, which pip puts next to the interpreter.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def _start(
    run: Run,
    checkpoint: Path | None,
    origin: Path | None,
    rehearse: bool,
    ward: Ward,
    world: int,
    reports: Path,
    parent_pipe: int,
    port: int,
) -> subprocess.Popen[bytes]:
    rank, watched = ward.rank, (ward.theirs.fileno(), ward.stacks.fileno())
    environment = environment_of(rank, world, port) | recorder_settings(os.environ, run)
    command = [sys.executable, "-m", "longseq.training.worker", str(run.path), "--start", str(run.start)]
    command += ["--reports", str(reports), "--parent-pipe", str(parent_pipe)]
    command += ["--watched", *map(str, watched)]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    command += ["--origin", str(origin)] if origin else []
    command += ["--rehearse"] if rehearse else []
    output = None
    if rank:
        run.rank_log(rank).parent.mkdir(exist_ok=True)
        output = run.rank_log(rank).open("ab")
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(parent_pipe, *watched),
        )
        ward.pid = process.pid
        return process
    finally:
        if output:
            output.close()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], requests: list[int], run: Run, wards: Sequence[Ward]
) -> tuple[list[int], str]:
    """Wait for all processes to end, pass stop requests on, and end the rest when one fails.

    Returns:
        how each ended, and where one of them hung the sentence that says so.
    """
    passed_on, deadline, hang = 0, None, ""
    judge = Judge({ward.rank: socket.gethostname() for ward in wards})
    look = Look(run, judge)
    waited_in_vain: list[int] = []
    while None in [process.poll() for process in processes]:  # polls every one: rank 0 may wait for a dead one
        if len(requests) > passed_on:
            passed_on = len(requests)
            _signal_all(processes, STOP_SIGNAL if passed_on == 1 else signal.SIGKILL)
        failed = any(process.returncode not in (None, 0, EXIT_GO_ON) for process in processes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline and not waited_in_vain:
            waited_in_vain = [rank for rank, process in enumerate(processes) if process.poll() is None]
            _signal_all(processes, signal.SIGKILL)
        if look.due() and deadline is None:
            for ward in wards:
                judge.hear(ward.rank, ward.facts())
                ward.keep_asked(run)
            found = look()
            if found:
                keep_all(run, wards, found)
                hang, deadline = sentence(run, found.text), 0.0
        time.sleep(0.05)
    codes = [PEER_LOST if rank in waited_in_vain else process.returncode for rank, process in enumerate(processes)]
    return codes, hang


def _outcome(codes: Sequence[int], requests: Sequence[int], run: Run, reports: Path) -> int:
    if all(code == 0 for code in codes):
        return 0
    if all(code in (0, EXIT_GO_ON) for code in codes):
        return EXIT_GO_ON
    if requests and all(code in (-STOP_SIGNAL, -signal.SIGKILL, PEER_LOST) for code in codes):
        return 130
    sentences = [
        report_path(reports, rank).read_text(encoding="utf-8")
        for rank in range(len(codes))
        if report_path(reports, rank).exists()
    ]
    if sentences and EXIT_SUPERSEDED in codes:
        raise SupersededError(sentences[0])
    if sentences:
        raise (DivergedError if diverged_path(reports).exists() else LongseqError)(sentences[0])
    failed = [rank for rank, code in enumerate(codes) if code not in (0, EXIT_GO_ON)]
    causes = [rank for rank in failed if codes[rank] != PEER_LOST] or failed
    sentence = "; ".join(f"the process of rank {rank} {_how(codes[rank])}" for rank in causes) + "."
    if run.has_output():
        sentence += f" Output of the ranks from 1 on: {run.logs_dir}."
    sentence += where_traces_are(run)
    if run.checkpoints():
        sentence += f" Go on with `{run.resume_command}`."
    raise LongseqError(sentence)


def _how(code: int) -> str:
    if code == PEER_LOST:
        return "lost its connection to the others"
    if code >= 0:
        return f"failed with exit code {code}"
    hint = " (by the kernel, perhaps: is there enough memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 instead of dying of them: once to save, twice to stop.

    The last two are a scheduler's, ahead of its time limit: they never mean "at once", however often they come, and
    the SIGTERM that follows them lets a save in progress end.
    """
    requests: list[int] = []
    hard = 0
    first_at = 0.0

    def collect(number: int, _: FrameType | None) -> None:
        nonlocal first_at, hard
        now = time.monotonic()
        if hard and now - first_at < _ECHO_SECONDS:
            return  # one Ctrl-C, delivered by the terminal and again by a wrapper such as `timeout`
        if number not in _SOFT:
            first_at = first_at or now
            hard += 1
        if requests and hard < 2:
            return
        requests.append(number)
        if len(requests) == 1:
            text = "stopping: saving at the next step (again: stop at once, losing the steps since the last checkpoint)"
        else:
            text = "stopping at once"
        with suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
            os.write(2, f"\nlongseq: {text}\n".encode())

    if threading.current_thread() is not threading.main_thread():  # Python hears signals in that one alone
        yield requests
        return
    wanted = [signal.SIGINT, signal.SIGTERM, *_SOFT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        wanted.append(signal.SIGHUP)
    previous = {number: signal.signal(number, collect) for number in wanted}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
