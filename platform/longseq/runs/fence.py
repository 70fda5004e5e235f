"""What a verb does before all else where it is a job: end with its start, and say what has changed. No torch here."""

from __future__ import annotations

import os
import sys

from longseq.runs import starts
from longseq.runs.code import changed_packages


def stand() -> None:
    """See to it that this process ends once the job has started anew elsewhere, as a training's does."""
    starts.watch_own(lambda sentence: print(f"longseq: error: {sentence}", file=sys.stderr, flush=True))
    if os.environ.get("SLURM_PROCID", "0") == "0" and (changed := changed_packages()):
        print(
            f"longseq: warning: since the job was submitted, packages have changed: {', '.join(changed)}.",
            file=sys.stderr,
        )
