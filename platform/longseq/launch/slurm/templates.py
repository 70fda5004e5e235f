"""Where the job scripts' templates are, and how they are filled in: every value is quoted for the shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.config import shipped
from longseq.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,-]*")


class Shell(str):
    """Text that is meant as it stands: not a value that came from outside."""

    __slots__ = ()


def folder() -> Path:
    """Where they are. Raises ConfigError if they are not there."""
    return shipped.folder(__file__, "slurm", "train.sbatch.j2")


def fill(template: str, values: Mapping[str, object]) -> str:
    """The text of a template. What it prints is quoted, but for :class:`Shell`.

    Raises:
        ConfigError: for a value that no script can hold.
    """
    return _environment().get_template(template).render(values)


def directive(name: str, value: object = None) -> Shell:
    """One ``#SBATCH --name=value``.

    sbatch reads these lines itself, with rules of its own for quotes: what would need them is refused.

    Raises:
        ConfigError: naming the option.
    """
    if value is None:
        return Shell(f"--{name}")
    text = str(value)
    odd = sorted({character for character in text if character in "\"'\\" or not character.isprintable()})
    if odd:
        raise ConfigError(f"--{name}={text!r}: sbatch cannot be given {' '.join(map(repr, odd))}: leave it out.")
    return Shell(f"--{name}={text}" if _PLAIN.fullmatch(text) else f'--{name}="{text}"')


def quoted(value: object) -> Shell:
    """A value as one word of a shell.

    Raises:
        ConfigError: for one with control characters, a line's end for instance.
    """
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{text!r}: a job script cannot hold control characters: leave them out.")
    return Shell(shlex.quote(text))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined

    def finalize(value: object) -> object:
        return value if isinstance(value, (Shell, Undefined)) else quoted(value)

    return Environment(
        loader=FileSystemLoader(folder()),
        undefined=StrictUndefined,
        finalize=finalize,
        comment_start_string="<#",  # "{#" is the shell's: ${#list[@]}
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
