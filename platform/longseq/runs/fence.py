"""What a verb does before all else where it is a job: end with its start, and say what has changed. No torch here."""

from __future__ import annotations

import os
import sys

from longseq.runs import code, starts


def stand() -> None:
    """See to it that this process ends once the job has started anew elsewhere, as a training's does.

    Raises:
        RunError: where it does not run the code that it was told to.
    """
    starts.watch_own(lambda sentence: print(f"longseq: error: {sentence}", file=sys.stderr, flush=True))
    code.check_told()
    if os.environ.get("SLURM_PROCID", "0") == "0" and (changed := code.changed_packages()):
        print(
            f"longseq: warning: since the job was submitted, packages have changed: {', '.join(changed)}.",
            file=sys.stderr,
        )
