"""Options that several verbs take."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from longseq.commands.numbers import natural, positive
from longseq.errors import LongseqError
from longseq.trained_model import TARGET_HELP

TAKE_OVER_HELP = (
    "start although what had the run cannot be asked whether it still trains: a process of another machine, or a job "
    "where SLURM does not answer"
)
_OVERRIDE = re.compile(r"[A-Za-z]\w*(\.[\w-]+)+=")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights are meant."""
    parser.add_argument("target", metavar="RUN|CHECKPOINT|FOLDER", type=Path, help=TARGET_HELP)
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def add_models(parser: argparse.ArgumentParser, example: str = "trainer.accelerator=cpu") -> None:
    """One model or several, then keys; ``example``: one of these."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|CHECKPOINT|FOLDER [key=value ...]",
        help=f"{TARGET_HELP}, or several of them; then keys, e.g. {example}",
    )
    parser.set_defaults(overrides=[])
    parser.add_argument("--ema", action="store_true", help="take the running mean of the weights (trainer.ema_decay)")


def models_and_keys(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The words of a verb with several models: models, and key=value.

    Raises:
        LongseqError: where there is no model.
    """
    keys = [word for word in args.words if _OVERRIDE.match(word) and not Path(word).exists()]
    targets = [Path(word) for word in args.words if word not in keys]
    if not targets:
        raise LongseqError(f"{args.verb}: no model; give {TARGET_HELP}.")
    return targets, [*keys, *args.overrides]


def add_devices(parser: argparse.ArgumentParser) -> None:
    """How many processes share the work."""
    parser.add_argument(
        "--devices",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the work, a GPU each where there are any; the results are the same (default 1)",
    )


def add_direction(parser: argparse.ArgumentParser) -> None:
    """Which way a causal model reads proteins."""
    from longseq.evaluation.records import DIRECTIONS  # which verbs without this option need not import

    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        help="of causal models: the mean log-likelihood of both directions, or forward alone; default: as it was "
        "trained (data.reverse)",
    )


def add_context(parser: argparse.ArgumentParser) -> None:
    """Relatives that a causal model reads first."""
    parser.add_argument(
        "--context",
        type=Path,
        metavar="FILE",
        help="FASTA or A3M of relatives that a causal model reads before each sequence, in random order",
    )
    parser.add_argument(
        "--context-tokens",
        type=natural,
        default=0,
        metavar="N",
        help="as many relatives as fit into N tokens; default: three quarters of data.length",
    )


def add_overrides(parser: argparse.ArgumentParser, help: str = "e.g. trainer.accelerator=cpu") -> None:
    """key=value on top of the configuration; the last of the positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help=help)


def given(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """Options by their names, for a function that calls its arguments so."""
    return {name: getattr(args, name) for name in names.split()}


def told(*what: str) -> None:
    """What is being done, on stderr."""
    print(f"longseq: {', '.join(what)}", file=sys.stderr, flush=True)


def ready() -> None:
    """Settings of a process that computes on its own."""
    import torch

    from longseq.allocator import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()
    end_well()


def end_well() -> None:
    """At SIGTERM this process removes what it has half written, and ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
