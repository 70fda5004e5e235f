"""Cancel the jobs of a run: what trains is asked to save first, and `longseq submit RUN` goes on from there."""

from __future__ import annotations

import argparse

from longseq.launch.slurm.queue import cancel, queue
from longseq.launch.slurm.state import jobs_of, live_jobs
from longseq.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="run folders, e.g. runs/sweep-*")


def run(args: argparse.Namespace) -> int:
    runs = [Run.open(folder) for folder in args.run_folders]
    queued = queue(job for run in runs for job in jobs_of(run))
    for run in runs:
        jobs = [job.job for job in live_jobs(run, queued)]
        if not jobs:
            print(f"{run.path}: no job of this run runs or waits.")
            continue
        cancel(jobs)
        print(f"{run.path}: cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}.")
    return 0
