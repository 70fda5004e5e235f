"""One of the processes that share a file's work: ``python -m longseq.evaluation.worker PLACE PARENT``."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from longseq.allocator import keep_freed_memory
from longseq.devices import claim, reading_device
from longseq.errors import LongseqError
from longseq.evaluation.shards import Job, take_part
from longseq.launch.workers import serve


def work(place: Path, rank: int, world: int) -> None:
    """This process's share of a job in shards."""
    from longseq.evaluation.work import work_of

    job = work_of(Job.read(place))
    _claim(job.source.config.trainer.accelerator)
    take_part(place, rank, world, job)


def _claim(accelerator: str) -> None:
    import torch

    device = reading_device(accelerator)
    if device == "cpu" and os.environ.get("LONGSEQ_GPUS"):  # its bytes would be others, and it would take days
        raise LongseqError(
            f"{socket.gethostname()}: the job has asked for GPUs, and none can be used there: have the node looked at, "
            "and leave it out (exclude in the site's profile)."
        )
    claim(torch.device(device))
    if device == "cpu":
        keep_freed_memory()


if __name__ == "__main__":
    code = serve(work)
    sys.stderr.flush()
    os._exit(code)  # threads of native libraries race with the interpreter's end
