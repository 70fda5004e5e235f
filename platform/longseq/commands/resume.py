"""Go on with a run from its newest whole checkpoint, where it was stopped, killed or finished early.

trainer.devices, zero_stage, accumulate and strategy may be others than before: the steps stay those of the same samples
(data.batch_tokens is the step of all processes together). The precision must be that of the checkpoint.
run.branch=NAME leaves RUN as it is, and begins a run NAME at its newest checkpoint, or at the one that is given in its
place: with another schedule, say (optim.schedule=wsd trainer.max_steps=...).
"""

from __future__ import annotations

import argparse
import os
import sys

from longseq.commands.key_help import help_on_keys
from longseq.commands.options import TAKE_OVER_HELP
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.launch.start import resume
from longseq.runs import code
from longseq.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.add_argument(
        "--current-code", action="store_true", help="of a run of jobs: by today's code, and not that of its submission"
    )
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER_HELP)
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    refuse_several_tasks(os.environ, "resume")
    _take_code(Run.open(args.run_folder), current=args.current_code)
    training = resume(args.run_folder, args.overrides, take_over=args.take_over)
    print("\n".join(training.report))
    return training.code


def _take_code(run: Run, *, current: bool) -> None:
    """Begin anew with the code that the run was submitted with, if that is another one than this process's."""
    before, today = code.kept(run), code.current()
    if not before or before == today:
        return
    if current:
        print(f"code     {today}, today's; that of the submission was {before}", file=sys.stderr)
        code.keep(run)
        return
    print(f"code     {before}, of the submission (--current-code takes today's, {today})", file=sys.stderr, flush=True)
    places = [str(code.folder_of(run, before)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "longseq.cli", *sys.argv[1:]], environment)
