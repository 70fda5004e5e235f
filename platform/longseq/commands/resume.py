"""Go on with a run from its newest whole checkpoint, where it was stopped, killed or finished early.

trainer.devices, zero_stage, accumulate and strategy may be others than before: the steps stay those of the same samples
(data.batch_tokens is the step of all processes together). The precision must be that of the checkpoint.
run.branch=NAME leaves RUN as it is, and begins a run NAME at its newest checkpoint, or at the one that is given in its
place: with another schedule, say (optim.schedule=wsd trainer.max_steps=...).
"""

from __future__ import annotations

import argparse

from longseq.commands.key_help import help_on_keys
from longseq.commands.options import TAKE_OVER_HELP
from longseq.launch.start import resume


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER_HELP)
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    training = resume(args.run_folder, args.overrides, take_over=args.take_over)
    print("\n".join(training.report))
    return training.code
