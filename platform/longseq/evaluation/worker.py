"""One of the processes that share an evaluation: ``python -m longseq.evaluation.worker PLACE``."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from longseq.devices import claim, reading_device
from longseq.errors import EXIT_ERROR, USER_ERRORS
from longseq.evaluation.parallel import Reports, failure_path, of_this_process, tally_path
from longseq.evaluation.request import Request
from longseq_data.os_errors import explained


def main() -> int:
    place, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _end_with_parent()
    import torch

    request = Request.read(place / "request.json")
    try:
        device = reading_device(request.source(0).config.trainer.accelerator)
        claim(torch.device(device))
        for number, part, tally in of_this_process(request, rank, world, device, Reports(place, rank)):
            tally.save(tally_path(place, number, part, rank))
    except USER_ERRORS as error:
        failure_path(place, rank).write_text(str(error), encoding="utf-8")
        return EXIT_ERROR
    except OSError as error:
        failure_path(place, rank).write_text(f"{explained(error, error.filename or place)}.", encoding="utf-8")
        return EXIT_ERROR
    return 0


def _end_with_parent() -> None:
    """Do not outlive a parent that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(EXIT_ERROR)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of native libraries race with the interpreter's end
