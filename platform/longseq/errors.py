"""Errors that are the user's to mend: one clear sentence each, shown without a traceback."""

from __future__ import annotations

from longseq_data.errors import DataError


class LongseqError(Exception):
    """What is wrong, where, and what to do about it. The message is the whole output."""


class ConfigError(LongseqError):
    """A configuration that cannot work: names the key and the file or argument it came from."""


class RunError(LongseqError):
    """A run folder or a checkpoint that cannot be used as asked."""


# What the command line turns into one line on stderr. Anything else is a bug and keeps its traceback.
USER_ERRORS = (LongseqError, DataError)

# Exit codes. EX_TEMPFAIL of sysexits.h: the run was saved and wants to go on.
EXIT_ERROR = 1
EXIT_GO_ON = 75
