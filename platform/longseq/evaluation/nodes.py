"""The nodes of a job share a file's shards: ``python -m longseq.evaluation.nodes PLACE DEVICES FAILED VERB ...``.

Each is one task of srun. The first runs the verb, which deals out the work and writes the results as it would on one
machine; the others start their processes, which take part. Nobody sends anything: they share the folder PLACE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longseq.errors import EXIT_ERROR, USER_ERRORS
from longseq.launch.slurm.place import Place
from longseq.launch.workers import Workers
from longseq_data.files import write_text

_TOLD = "LONGSEQ_NODES"
_BEGUN = "begun.txt"
_LOOK = 0.2  # seconds
_OF_PEOPLE = (EXIT_ERROR, 2)  # exit codes of what a person must fix; 2: a wrong option


@dataclass(frozen=True)
class Nodes:
    """What the first node's verb knows of the others."""

    folder: str  # where all keep their shards
    nodes: int
    start: str  # of the job's starts which one this is

    @property
    def place(self) -> Path:
        return Path(self.folder)

    @staticmethod
    def here() -> Nodes | None:
        """Of this process, as it was told in its environment; None where it is no job's."""
        told = os.environ.get(_TOLD)
        return Nodes(**json.loads(told)) if told else None

    def begin(self) -> None:
        """Let the others begin, now that the folder is ready."""
        write_text(self.place / _BEGUN, self.start)

    def begun(self) -> bool:
        with suppress(OSError):
            return (self.place / _BEGUN).read_text(encoding="utf-8") == self.start
        return False


def help_out(nodes: Nodes, node: int, devices: int) -> None:
    """One of the other nodes: its processes, until they have done their share.

    Raises:
        LongseqError, DataError: what went wrong, in one sentence.
    """
    from longseq.evaluation.shards import replace_lost

    while not nodes.begun():  # srun ends this one where the first has failed
        time.sleep(_LOOK)
    with Workers("longseq.evaluation.worker", nodes.place, devices, node, nodes.nodes) as workers:
        losses = Counter[int]()
        while not workers.ended():
            replace_lost(workers, losses)
            time.sleep(_LOOK)


def main() -> int:
    folder, devices, failed, *words = sys.argv[1:]
    if "TMPDIR" in os.environ:  # the job's script makes it on the first node
        Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    task = Place.of_slurm(os.environ)
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    nodes = Nodes(folder, task.world, ".".join(os.environ.get(name, "0") for name in names))
    if task.rank == 0:
        told = {**os.environ, _TOLD: json.dumps(asdict(nodes))}
        code = subprocess.run([sys.executable, "-m", "longseq.cli", *words, "--devices", devices], env=told).returncode
    else:
        try:
            help_out(nodes, task.rank, int(devices))
            code = 0
        except USER_ERRORS as error:
            print(f"longseq: error: node {task.rank}: {error}", file=sys.stderr)
            code = EXIT_ERROR
    if code in _OF_PEOPLE:  # of what srun then ends the exit codes say nothing
        Path(failed).touch()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
