"""One run in detail: its job, its starts, and where they got to."""

from __future__ import annotations

import argparse
import math
import time

from longseq.commands.jobs import as_dict, ask
from longseq.launch.slurm.state import state_of
from longseq.printed import as_json
from longseq.runs import code, starts
from longseq.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/uniref50-20260101-120000")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    run = Run.open(args.run_folder)
    state = state_of(run, ask([run]))
    if args.json:
        print(as_json({**as_dict(state), "code": code.kept(run) or None}, indent=1))
        return 0
    print(f"run       {run.path}")
    print(f"state     {state.word}{f': {state.why}' if state.why else ''}")
    if state.job:
        left = f", {state.left} left" if state.left else ""
        print(f"job       {state.job}{f' on {state.nodes}' if state.nodes else ''}{left}")
    at = state.progress
    if at:
        loss = f", loss {at.loss:.4f}" if math.isfinite(at.loss) else ""
        rate = f", {at.tokens_per_second:,.0f} tokens/s" if math.isfinite(at.tokens_per_second) else ""
        print(f"step      {at.step} of {at.last_step}{loss}{rate}; {_ago(time.time() - at.time)} ago")
    if code.kept(run):
        print(f"code      {code.kept(run)}")
    kept = [str(checkpoint.step) for checkpoint in run.checkpoints()]
    print(f"kept      {'checkpoints of step ' + ', '.join(kept) if kept else 'no checkpoint yet'}")
    for number in starts.numbers(run.starts_dir):
        what = starts.path_of(run.starts_dir, number, "start").read_text(encoding="utf-8").partition("\n")[0]
        reached, end = starts.read_progress(run.starts_dir, number), starts.read_end(run.starts_dir, number)
        upto = f"to step {reached.step}" if reached else "no step"
        print(f"start {number:<3} {what}: {upto}{f', {end}' if end else ''}")
    if state.word in ("ENDED", "STOPPED", "TIMEOUT", "FAILED", "CANCELLED", "NODE_FAIL"):
        print(f"Go on with:    {run.resume_command}")
    return 0


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
