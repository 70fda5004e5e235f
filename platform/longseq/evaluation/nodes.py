"""The nodes of a job share a file's shards: ``python -m longseq.evaluation.nodes PLACE DEVICES VERB ...``.

Each is one task of srun. The first runs the verb, which deals out the work and writes the results as it would on one
machine; the others start their processes, which take part. Nobody sends anything: they share the folder PLACE, which
goes once the verb has ended well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longseq.errors import EXIT_CRASHED, EXIT_ERROR, USER_ERRORS, SupersededError
from longseq.evaluation.losses import Losses, replace_lost
from longseq.launch.slurm.place import Place
from longseq.launch.workers import Workers
from longseq.runs import starts
from longseq.runs.fence import stand
from longseq_data.files import write_text
from longseq_data.os_errors import explained, may_pass

_TOLD = "LONGSEQ_NODES"
_BEGUN = "begun.txt"
_LOOK = 0.2  # seconds
_OF_PEOPLE = (EXIT_ERROR, 2)  # exit codes of what a person must fix; 2: a wrong option


@dataclass(frozen=True)
class Nodes:
    """What the first node's verb knows of the others."""

    folder: str  # where all keep their shards
    nodes: int
    start: str  # of the job's starts which one this is, by its file

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
        with suppress(OSError):  # it is looked for again
            return (self.place / _BEGUN).read_text(encoding="utf-8") == self.start
        return False


def help_out(nodes: Nodes, node: int, devices: int) -> None:
    """One of the other nodes: its processes, until they have done their share.

    Raises:
        LongseqError, DataError: what went wrong, in one sentence.
    """
    while not nodes.begun():  # srun ends this one where the first has failed
        time.sleep(_LOOK)
    with Workers("longseq.evaluation.worker", nodes.place, devices, node, nodes.nodes) as workers:
        losses = Losses()
        while not workers.ended():
            replace_lost(workers, losses)
            time.sleep(_LOOK)


def let_go(place: Path) -> None:
    """Remove a folder of shards that nobody needs any more, unless a newer start of the job has it.

    On the nodes of a job ``main`` does it when the verb has ended well; on one machine, ``shards.kept``.
    """
    with suppress(SupersededError, OSError):
        starts.check_own()
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """A node's task, and its exit code; what ends the job is noted as its start's end."""
    folder, devices, *words = sys.argv[1:]
    if "TMPDIR" in os.environ:  # the job's script makes it on the first node
        Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    task, own = Place.of_slurm(os.environ), starts.own()
    nodes, why = Nodes(folder, task.world, os.environ[starts.OWN]), "see the job's log"
    if task.rank == 0:
        told = {**os.environ, _TOLD: json.dumps(asdict(nodes))}
        code = subprocess.run([sys.executable, "-m", "longseq.cli", *words, "--devices", devices], env=told).returncode
    else:
        code = 0
        try:
            stand()  # the first node's verb does so itself
            help_out(nodes, task.rank, int(devices))
        except USER_ERRORS as error:
            code, why = getattr(error, "exit_code", EXIT_ERROR), f"node {task.rank}: {error}"
        except OSError as error:
            code = EXIT_CRASHED if may_pass(error) else EXIT_ERROR
            why = f"node {task.rank}: {explained(error, error.filename or folder)}."
        if code:
            print(f"longseq: error: {why}", file=sys.stderr)
    if own and code in _OF_PEOPLE:  # of what srun then ends the exit codes say nothing
        starts.note_end(*own, f"error {why}")
    elif own and code == 0 and task.rank == 0:
        starts.note_end(*own, "finished")  # first: a job that comes back now would compute all again
        let_go(nodes.place)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
