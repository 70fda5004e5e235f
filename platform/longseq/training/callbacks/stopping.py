"""A stop that was asked for from outside: a signal sets a flag, nothing more."""

from __future__ import annotations

import signal
import time
from types import FrameType

from longseq.training.signs import STOP_SIGNAL


class StopRequested(Exception):
    """All ranks have agreed to stop at this step and the state is saved."""


class Settled(StopRequested):
    """There is nothing more to learn: this was the last step."""


class StopFlag:
    """Remembers that a stop was asked for. Handlers do no work: the ranks agree at a step boundary."""

    def __init__(self) -> None:
        self.requested = False
        self.began = time.monotonic()
        self.time_limit: float | None = None  # seconds after ``began``

    @property
    def out_of_time(self) -> bool:
        return self.time_limit is not None and time.monotonic() - self.began >= self.time_limit

    def install(self) -> None:
        """Take the stop signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, STOP_SIGNAL):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
