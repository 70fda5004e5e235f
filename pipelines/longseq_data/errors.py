"""The one exception that is the user's to fix."""

from __future__ import annotations


class DataError(Exception):
    """A problem with the user's data.

    Its message is one sentence for the terminal: which file and line, what is wrong, what to do. A command prints it
    without a traceback.
    """

    def __init__(self, sentence: str) -> None:
        # names and letters of damaged files stand in it: nothing that would move a terminal's cursor
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in sentence))


def one_line(error: BaseException) -> str:
    """What an exception says, fit to stand in a sentence."""
    return f"{type(error).__name__}: {in_line(str(error))}".removesuffix(": ")


def in_line(text: str) -> str:
    """Foreign text without line breaks, control characters and half surrogates, which no terminal could show."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
