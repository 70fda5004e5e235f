"""Train a model here: 1 process, or N of them with trainer.devices=N.

Ctrl-C saves at the next step and leaves with exit code 75; `longseq resume` goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq.commands.key_help import help_on_keys
from longseq.launch.start import fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, or a name of `longseq configs`: protein/base")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. data.train='[a.fasta.gz]'")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    training = fit(args.config, args.overrides)
    print("\n".join(training.report))
    return training.code
