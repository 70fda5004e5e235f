"""Errors that are the user's to fix: one clear sentence each, shown without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longseq_data.errors import DataError


class LongseqError(Exception):
    """What is wrong, where, and what to do about it. The message is the whole output."""

    exit_code = 1


class ConfigError(LongseqError):
    """A configuration that cannot work: names the key and the file or argument it came from."""


class RunError(LongseqError):
    """A run folder or a checkpoint that cannot be used as asked."""


class DivergedError(LongseqError):
    """A training whose loss or gradient is no number any more, or far above those before."""


class PassingError(LongseqError):
    """A file system that has failed in a way that may pass: a job starts again, as after a crash."""

    exit_code = 70


class SupersededError(LongseqError):
    """A newer start has the run."""

    exit_code = 77


@contextmanager
def place_of_errors(path: Path) -> Iterator[None]:
    """An OSError that does not say where it came from (a full disk does not) says ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


# What the command line turns into one line on stderr. Anything else is a bug and keeps its traceback.
USER_ERRORS = (LongseqError, DataError)

# What a job script may go by; docs/reference/exit-codes.md is made of it.
EXIT_CODES = {
    0: "done; of a training: the last step was reached",
    1: "an error, in one sentence on stderr",
    2: "a wrong command line",
    3: "`longseq data leaks` found relatives of test or valid in train",
    69: "a node of a job is not fit to train on, and there are no others (EX_UNAVAILABLE of sysexits.h)",
    70: "a job has stopped for good: it crashed twice after the same step, or was started too often (EX_SOFTWARE)",
    75: "saved, go on with `longseq resume`: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, or trainer.time_limit; in a "
    "job also crashed, and comes back by the queue (EX_TEMPFAIL)",
    77: "a newer start has the run: this one has written nothing since, and has ended (EX_NOPERM)",
    130: "stopped at once: by a second Ctrl-C of a training, whose steps since the last checkpoint are lost; by the "
    "first of any other verb",
}
EXIT_ERROR = 1
EXIT_UNFIT = 69
EXIT_CRASHED = PassingError.exit_code
EXIT_GO_ON = 75
EXIT_SUPERSEDED = SupersededError.exit_code
