"""The one exception that is the user's to fix."""

from __future__ import annotations


class DataError(Exception):
    """A problem with the user's data.

    Its message is one sentence for the terminal: which file and line, what is wrong, what to do. A command prints it
    without a traceback.
    """
