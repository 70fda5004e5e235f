"""One of the processes that share an evaluation: ``python -m longseq.evaluation.worker PLACE PARENT``."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from longseq.devices import claim, reading_device
from longseq.errors import LongseqError
from longseq.evaluation.parallel import Reports, of_this_process, tally_path
from longseq.evaluation.request import Request
from longseq.evaluation.shards import JOB, Job, take_part
from longseq.launch.workers import serve


def work(place: Path, rank: int, world: int) -> None:
    """This process's share of a job in shards, or else of an evaluation's request."""
    if (place / JOB).is_file():
        from longseq.evaluation.work import work_of

        job = work_of(Job.read(place))
        _claimed(job.source.config.trainer.accelerator)
        take_part(place, rank, world, job)
        return
    request = Request.read(place / "request.json")
    device = _claimed(request.source(0).config.trainer.accelerator)
    for number, part, tally in of_this_process(request, rank, world, device, Reports(place, rank)):
        tally.save(tally_path(place, number, part, rank))


def _claimed(accelerator: str) -> str:
    import torch

    device = reading_device(accelerator)
    if device == "cpu" and os.environ.get("LONGSEQ_GPUS"):  # its bytes would be others, and it would take days
        raise LongseqError(
            f"{socket.gethostname()}: the job has asked for GPUs, and none can be used there: have the node looked at, "
            "and leave it out (exclude in the site's profile)."
        )
    claim(torch.device(device))
    return device


if __name__ == "__main__":
    code = serve(work)
    sys.stderr.flush()
    os._exit(code)  # threads of native libraries race with the interpreter's end
