"""Cancel the jobs of a run: what trains is asked to save first, and `longseq submit RUN` goes on from there."""

from __future__ import annotations

import argparse

from longseq.launch.shared_work import SHARED
from longseq.launch.slurm.queue import cancel, queue
from longseq.launch.slurm.state import jobs_of, live_jobs, shared_jobs
from longseq.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="run folders, e.g. runs/sweep-*")
    parser.add_argument(
        "--job",
        choices=("train", "evaluate", *SHARED),
        default="train",
        help="its jobs of a kind; what they have finished stays",
    )


def run(args: argparse.Namespace) -> int:
    runs = [Run.open(folder) for folder in args.run_folders]
    shared = {run: [each for each in shared_jobs(run) if each.verb == args.job] for run in runs}
    if args.job == "train":
        queued = queue(job for run in runs for job in jobs_of(run))
    else:
        queued = queue(each.job for several in shared.values() for each in several)
    for run in runs:
        if args.job == "train":
            jobs = [job.job for job in live_jobs(run, queued)]
        else:
            jobs = [each.job for each in shared[run] if each.live(queued)]
        if not jobs:
            print(f"{run.path}: no job of this run runs or waits.")
            continue
        cancel(jobs)
        print(f"{run.path}: cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}.")
    return 0
