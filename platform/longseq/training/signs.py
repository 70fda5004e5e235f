"""What a training's process and the one that started it tell each other: a signal, an exit code, a sentence."""

from __future__ import annotations

import signal
from pathlib import Path

# What a worker takes as "save at the next step and leave"; SIGTERM and SIGUSR1 have other owners inside it.
STOP_SIGNAL = signal.SIGUSR2
# How a worker ends that only lost its connection to another: that other one has the cause.
PEER_LOST = 76


def report_path(directory: Path, rank: int) -> Path:
    """Where the process of ``rank`` leaves the sentence that says why it failed."""
    return directory / f"rank-{rank}.txt"


def diverged_path(directory: Path) -> Path:
    """What is there where that is a DivergedError."""
    return directory / "diverged"
