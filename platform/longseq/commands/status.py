"""One run in detail: its job, its starts, and where they got to."""

from __future__ import annotations

import argparse
import math
import time

from longseq.commands.jobs import as_dict, ask
from longseq.launch.slurm.queue import ENDED, SlurmError, queue
from longseq.launch.slurm.state import State, shared_jobs, state_of
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
    lines = head(state)
    if code.kept(run):
        lines.append(f"code      {code.kept(run)}")
    print("\n".join([*lines, kept(run), *history(run), *shared(run)]))
    if ended(state):
        print(f"Go on with:    {run.resume_command}")
    return 0


def ended(state: State) -> bool:
    """Whether nothing trains a run or waits to, and its last step was not reached."""
    return state.word in ("ENDED", "STOPPED", *ENDED)


def head(state: State) -> list[str]:
    """What has the run, and where it is."""
    lines = [f"run       {state.run.path}", f"state     {state.word}{f': {state.why}' if state.why else ''}"]
    if state.job:
        left = f", {state.left} left" if state.left else ""
        lines.append(f"job       {state.job}{f' on {state.nodes}' if state.nodes else ''}{left}")
    at = state.progress
    if at:
        loss = f", loss {at.loss:.4f}" if math.isfinite(at.loss) else ""
        rate = f", {at.tokens_per_second:,.0f} tokens/s" if math.isfinite(at.tokens_per_second) else ""
        lines.append(f"step      {at.step} of {at.last_step}{loss}{rate}; {ago(at.time)}")
    return lines


def shared(run: Run) -> list[str]:
    """The newest job of each output that others than trainings write with this run."""
    jobs = {(job.verb, job.place): job for job in shared_jobs(run)}
    try:
        queued, asked = queue(job.job for job in jobs.values()) if jobs else {}, True
    except SlurmError:  # said already, of the training
        queued, asked = {}, False
    lines = []
    for job in jobs.values():
        known, waiting = job.known(queued), job.shards
        state = known.state if known else "ENDED" if asked else "UNKNOWN"
        where = f" on {known.nodes}, {known.left} left" if known and known.state == "RUNNING" else ""
        shards = f"; {waiting} shards are finished" if waiting else ""
        lines.append(f"{job.verb:<9} job {job.job}: {state}{where}{shards}; {ago(job.time)}: {job.command}")
    return lines


def kept(run: Run) -> str:
    """The checkpoints that there are."""
    steps = [str(checkpoint.step) for checkpoint in run.checkpoints()]
    return f"kept      {'checkpoints of step ' + ', '.join(steps) if steps else 'no checkpoint yet'}"


def history(run: Run, last: int = 0) -> list[str]:
    """Each start, or the ``last`` ones: what it was, how far it came and how it ended."""
    lines = []
    for number in starts.numbers(run.starts_dir)[-last:]:
        what = starts.text_of(run.starts_dir, number, "start").partition("\n")[0]
        reached, end = starts.read_progress(run.starts_dir, number), starts.read_end(run.starts_dir, number)
        upto = f"to step {reached.step}" if reached else "no step"
        lines.append(f"start {number:<3} {what}: {upto}{f', {end}' if end else ''}")
    return lines


def ago(when: float) -> str:
    """How long ago a time of the clock is."""
    return f"{in_short(time.time() - when)} ago"


def in_short(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
