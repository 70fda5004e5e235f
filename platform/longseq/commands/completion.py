"""Print a script with which a shell completes verbs, options, choices, keys, names of configurations and files.

bash:  longseq completion bash > ~/.local/share/bash-completion/completions/longseq
zsh:   longseq completion zsh > FOLDER/_longseq, where FOLDER is in $fpath
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from longseq.config.merging import described_keys
from longseq.config.shipped import shipped

# Keys and names are written into the script: a shell completes in milliseconds, and asks no Python.
_BASH = """\
_longseq_keys() { compgen -W "{keys}" -- "$1"; }
_longseq_configs() { compgen -W "{configs}" -- "$1"; compgen -f -- "$1"; }"""
_ZSH = """\
_longseq_keys() { compadd -S '' -- {keys} }
_longseq_configs() { compadd -- {configs}; _files }"""
# A value follows a key, not a space.
_BASH_END = """
_longseq() { _shtab_longseq; if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace 2>/dev/null || :; fi; }
complete -o filenames -F _longseq longseq
"""
_ENDINGS = {"bash": _BASH_END, "zsh": ""}
_PREAMBLES = {"bash": _BASH, "zsh": _ZSH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(_PREAMBLES))


def run(args: argparse.Namespace) -> int:
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The script for ``bash`` or ``zsh``."""
    import shtab

    from longseq.cli import VERBS, parser_with

    parser = parser_with(VERBS)
    for action in _actions(parser):
        action.choices = action.choices and tuple(action.choices)  # shtab takes a dictionary for verbs
        if action.dest == "overrides":
            action.complete = {shell: "_longseq_keys"}  # type: ignore[attr-defined]
        elif str(action.metavar).startswith("CONFIG") or action.dest == "config":
            action.complete = {shell: "_longseq_configs"}  # type: ignore[attr-defined]
        elif action.choices is None and action.nargs != 0 and not isinstance(action.type, type(int)):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    keys = " ".join(f"{section}.{name}=" for section, name, _ in described_keys())
    preamble = _PREAMBLES[shell].replace("{keys}", keys).replace("{configs}", " ".join(shipped()))
    return shtab.complete(parser, shell, preamble=preamble) + _ENDINGS[shell]


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of the parser and of the verbs below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)
        else:
            yield action
