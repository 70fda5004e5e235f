"""The program each training process runs: ``python -m longseq.training.worker RUN``. Started by ``launch.local``."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from longseq.allocator import keep_freed_memory
from longseq.errors import (
    EXIT_CRASHED,
    EXIT_ERROR,
    EXIT_GO_ON,
    EXIT_SUPERSEDED,
    USER_ERRORS,
    DivergedError,
    SupersededError,
)
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.kept_output import keep_output
from longseq.training.signs import PEER_LOST, diverged_path, report_path
from longseq.training.vitals import Vitals, stacks_on_request
from longseq_data.children import end_when_closed
from longseq_data.os_errors import explained, may_pass


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--origin", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--parent-pipe", type=int, required=True)
    parser.add_argument("--watched", type=int, nargs=2, metavar=("SOCKET", "STACKS"), required=True)
    args = parser.parse_args()
    stacks_on_request(args.watched[1])
    end_when_closed(args.parent_pipe, lambda: os._exit(EXIT_ERROR))  # nobody else would end us

    run = Run(Run.open(args.run).path, args.start)
    vitals = Vitals(socket.socket(fileno=args.watched[0]), run.trace_of(os.environ["RANK"]))
    if os.environ["RANK"] == "0" and not args.rehearse:  # the others write to nothing else
        keep_output(run.rank_log(0))
    report = report_path(args.reports, int(os.environ["RANK"]))
    if args.rehearse:
        code, sentence = outcome(lambda: _rehearse(run, vitals), run)
    else:
        starts.watch(run.starts_dir, run.start, partial(report.write_text, encoding="utf-8"))

        def train() -> int:
            try:
                return _train(run, args.checkpoint, args.origin, vitals)
            except DivergedError:
                diverged_path(args.reports).touch()
                raise

        code, sentence = outcome(train, run)
    if sentence and code == PEER_LOST:
        print(f"longseq: warning: rank {os.environ['RANK']} {sentence}.", file=sys.stderr, flush=True)
    elif sentence:
        report.write_text(sentence, encoding="utf-8")
    return code


def outcome(work: Callable[[], int], run: Run) -> tuple[int, str | None]:
    """The exit code of ``work``, and the sentence that says why where it failed in a way that people can fix.

    With ``PEER_LOST`` it is no more than a symptom: another process has the cause.
    """
    try:
        return work(), None
    except USER_ERRORS as error:
        return getattr(error, "exit_code", EXIT_ERROR), str(error)
    except OSError as error:  # a full disk, mostly: say so without a traceback
        code = EXIT_CRASHED if may_pass(error) else EXIT_ERROR
        return code, f"{explained(error, error.filename or run.path)}. Then go on with `{run.resume_command}`."
    except RuntimeError as error:
        if _peer_lost(error):
            try:
                run.check_start()  # the other one has seen a newer start, perhaps
            except SupersededError as superseded:
                return EXIT_SUPERSEDED, str(superseded)
            return PEER_LOST, f"lost its connection to another process ({_first_sentence(error)})"
        if type(error).__name__ != "OutOfMemoryError":
            raise
        sentence = (
            f"{run.path}: out of GPU memory ({str(error).splitlines()[0]}) Raise trainer.accumulate or "
            "trainer.zero_stage, set trainer.activation_checkpointing=true, or lower data.length."
        )
        return EXIT_ERROR, sentence


def _train(run: Run, checkpoint_path: Path | None, origin: Path | None, vitals: Vitals) -> int:
    raise_open_files()
    from longseq.training.callbacks.stopping import StopFlag

    stop = StopFlag()
    stop.install()

    with nothing_collected():
        import torch

        from longseq.runs.checkpoint import Checkpoint
        from longseq.training.fit import fit

    quiet()
    if not torch.cuda.is_available():
        keep_freed_memory()
    config = run.config()
    stop.time_limit = config.time_limit_seconds
    vitals.hang_seconds = config.trainer.hang_seconds
    finished = fit(run, config, Checkpoint(checkpoint_path) if checkpoint_path else None, stop, vitals, origin)
    return 0 if finished else EXIT_GO_ON


def _rehearse(run: Run, vitals: Vitals) -> int:
    raise_open_files()
    with nothing_collected():
        from longseq.training.rehearsal import rehearse

    quiet()
    config = run.config()
    vitals.hang_seconds = config.trainer.hang_seconds
    rehearse(run, config, vitals=vitals)
    return 0


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For imports: what modules make stays.

    To look through it for garbage takes an eighth of their time, and a quarter of a second at each collection later:
    DeepSpeed's, Lightning's, and those in the middle of steps.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _peer_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process went away."""
    return "gloo/transport" in str(error) or "Connection closed by" in str(error) or "ncclRemoteError" in str(error)


def _first_sentence(error: RuntimeError) -> str:
    """Without the advice that gloo gives behind it."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def quiet() -> None:
    """Libraries' notes on normal operation would bury ours. After their import, which sets their levels."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def raise_open_files() -> None:
    """As many open files as this process may have: gloo takes one for each other rank, several times."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems refuse what they name
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def leave(code: int) -> None:
    """End without taking the interpreter apart.

    The threads of gloo and other native libraries race with that, and now and then one aborts a process whose work is
    done ("terminate called without an active exception"). Everything is on the disk by now.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
