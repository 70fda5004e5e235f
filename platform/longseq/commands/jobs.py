"""The runs that were submitted: job, state, step, loss, speed, starts and time left.

From SLURM's queue and the runs' folders; it needs neither accounting nor, for what is in the folders, SLURM.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from longseq.launch.slurm.queue import Queued, SlurmError, queue
from longseq.launch.slurm.state import State, jobs_of, runs_with_jobs, state_of
from longseq.printed import as_json
from longseq.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder of the runs (run.dir); default: runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    runs = list(runs_with_jobs(args.dir))
    queued = ask(runs)
    states = [state_of(run, queued) for run in runs]
    if args.json:
        print(as_json([as_dict(state) for state in states], indent=1))
        return 0
    if not states:
        print(f"{args.dir}: no run here was submitted; `longseq submit` does that, and --dir names another folder.")
        return 0
    width = max(len(state.run.path.name) for state in states)
    print(f"{'run':<{width}}  {'job':>9}  {'state':<10}  {'step':>15}  {'loss':>8}  {'tokens/s':>10}  starts  left")
    for state in states:
        print(row(state, width))
    return 0


def ask(runs: Iterable[Run]) -> dict[str, Queued] | None:
    """What SLURM says of the jobs of runs; None, with a warning, where it cannot be asked."""
    queued, error = known(runs)
    if error:
        print(f"longseq: warning: {error} Shown is what the runs' folders say.", file=sys.stderr)
    return queued


def known(runs: Iterable[Run]) -> tuple[dict[str, Queued] | None, SlurmError | None]:
    """What SLURM says of the jobs of runs, or why it cannot be asked."""
    try:
        return queue(job for run in runs for job in jobs_of(run)), None
    except SlurmError as error:
        return None, error


def row(state: State, width: int) -> str:
    at = state.progress
    step = f"{at.step}/{at.last_step}" if at else "-"
    loss = f"{at.loss:.4f}" if at and math.isfinite(at.loss) else "-"
    rate = f"{at.tokens_per_second:,.0f}" if at and math.isfinite(at.tokens_per_second) else "-"
    why = f"  {state.why}" if state.why else ""
    return (
        f"{state.run.path.name:<{width}}  {state.job or '-':>9}  {state.word:<10}  {step:>15}  {loss:>8}  {rate:>10}  "
        f"{state.starts:>6}  {state.left or '-'}{why}"
    )


def as_dict(state: State) -> dict[str, object]:
    at = state.progress
    return {
        "run": str(state.run.path),
        "job": state.job,
        "state": state.word,
        "why": state.why,
        "step": at.step if at else None,
        "last_step": at.last_step if at else None,
        "loss": at.loss if at and math.isfinite(at.loss) else None,
        "tokens_per_second": at.tokens_per_second if at and math.isfinite(at.tokens_per_second) else None,
        "starts": state.starts,
        "left": state.left,
        "nodes": state.nodes,
    }
