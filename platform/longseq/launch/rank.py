"""The program of each process where a launcher of one's own starts them: ``torchrun``, ``mpirun``, ``srun``.

    torchrun --nproc-per-node 2 -m longseq.launch.rank fit protein/base data.train=proteins.fasta.gz
    torchrun --nproc-per-node 2 -m longseq.launch.rank resume runs/NAME

Rank 0 does what ``longseq fit`` or ``longseq resume`` does before its processes start, and tells the others which run,
start and checkpoint it is; then all of them meet and train as the tasks of a job do (longseq.launch.slurm.task).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longseq.config.schema import Config
from longseq.devices import follow_scheduler, own_device
from longseq.errors import EXIT_CRASHED, EXIT_GO_ON, EXIT_UNFIT, ConfigError, LongseqError
from longseq.launch.gpu_settings import gpu_settings, recorder_settings
from longseq.launch.slurm.guard import fork_guard
from longseq.launch.slurm.place import Limits, Place, address_of, port_of, value_of
from longseq.launch.slurm.task import become, gathered
from longseq.runs import starts
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.owner import node_name
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.kept_output import keep_output
from longseq.training.signs import PEER_LOST
from longseq.training.vitals import Vitals, stacks_on_request
from longseq.training.worker import leave, nothing_collected, outcome, quiet, raise_open_files

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_SECONDS = 300.0  # until all processes are there
_POLL_SECONDS = 0.2
_PORT = 29_500  # torchrun's own, where no variable names one
_CALL, _RUN = "longseq/call", "longseq/run"


@dataclass(frozen=True)
class Meeting:
    """Where the processes meet first, by the launcher's variables."""

    rank: int
    world: int
    local_rank: int | None  # None: by the names of the nodes
    address: str
    port: int
    listens: bool  # whether rank 0 does: torchrun does so itself

    @staticmethod
    def of(environment: Mapping[str, str]) -> Meeting:
        """From what torchrun, Open MPI, MPICH, PMIx or srun tell a process.

        Raises:
            ConfigError: where they tell it nothing.
        """
        found = {what: value_of(what, environment) for what in ("rank", "world", "local_rank")}
        found["address"] = address_of(environment)
        missing = [name for what, name in _NEEDED.items() if found[what] is None]
        if missing == ["MASTER_ADDR"]:
            raise ConfigError(
                "MASTER_ADDR: not set, and the launcher does not say where rank 0 is. Give every process the name of "
                "the first node (mpirun -x MASTER_ADDR=NODE ...)."
            )
        if missing:
            raise ConfigError(
                f"{', '.join(missing)}: not set, and no launcher has said who this process is. Start it by torchrun, "
                "mpirun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process."
            )
        return Meeting(
            rank=int(found["rank"] or 0),
            world=int(found["world"] or 0),
            local_rank=None if found["local_rank"] is None else int(found["local_rank"]),
            address=str(found["address"]),
            port=port_of(environment, _PORT),
            listens=environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )


_NEEDED = {"rank": "RANK", "world": "WORLD_SIZE", "address": "MASTER_ADDR"}


def nodes_of(told: Sequence[tuple[str, int | None]]) -> tuple[str, ...]:
    """The nodes of ranks that say their node's name and their rank there, if they know it.

    Raises:
        ConfigError: where a node's ranks do not follow each other, or nodes have different numbers of them.
    """
    first = [
        rank
        for rank, (name, local) in enumerate(told)
        if (local == 0 if local is not None else rank == 0 or name != told[rank - 1][0])
    ]
    each = len(told) // max(1, len(first))
    names = tuple(told[rank][0] for rank in first)
    named_once = len(set(names)) == len(names) or None not in [local for _, local in told]
    if first != list(range(0, len(told), each)) or not named_once:
        where = ", ".join(f"{rank} on {name}" for rank, (name, _) in enumerate(told[:16]))
        raise ConfigError(
            f"the ranks ({where}{' ...' if told[16:] else ''}) are not equally many on each node, one node after the "
            "other: have the launcher place them in blocks (mpirun --map-by ppr:N:node, srun -m block)."
        )
    return names


def main() -> int:
    stop = StopFlag()
    stop.install()  # first: a signal means "save", however early it comes
    parser = argparse.ArgumentParser(prog="python -m longseq.launch.rank", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("verb", choices=("fit", "resume"))
    parser.add_argument("what", metavar="CONFIG|RUN", help="as of that verb of longseq")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    process: _Process | None = None
    try:
        process = _Process(Meeting.of(os.environ), stop)
        code = process.lead(args) if process.at.rank == 0 else process.follow()
    except LongseqError as error:
        code = getattr(error, "exit_code", 1)
        if code == PEER_LOST:
            print(f"longseq: warning: {error}", file=sys.stderr, flush=True)
        elif str(error):
            print(f"longseq: error: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
        code = EXIT_CRASHED
    if process is not None and process.at.rank == 0 and code:
        process.tell({"code": code})
    return code


class _Ended(LongseqError):
    """How this process's part of a training has ended, where it has."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.exit_code = code


class _Process:
    """One of the processes, from the meeting on.

    torchrun starts all of them again where one has failed, with the same store, and counts that differ from node to
    node. So rank 0 calls, by a name of its own each time; the others answer the newest call with names of theirs, and
    take for their words what is said to that name: nothing that earlier processes have left is heard.
    """

    def __init__(self, at: Meeting, stop: StopFlag):
        self.at, self.stop, self.begun = at, stop, False
        read, self._write = os.pipe()
        # Before libraries, whose threads it would lack, and before the run's lock, which it would keep.
        self.ward, self.port = fork_guard(at.rank, lambda: _of_words(_line(read, self._write)))
        os.close(read)
        os.environ |= gpu_settings(os.environ)
        self.name, self.call = uuid.uuid4().hex, ""
        self.store = self._meet()

    def _meet(self) -> TCPStore:
        with nothing_collected():
            from torch._C._distributed_c10d import TCPStore
        at = self.at
        try:
            store = TCPStore(
                at.address,
                at.port,
                is_master=at.rank == 0 and at.listens,
                timeout=timedelta(seconds=_SECONDS),
                wait_for_workers=False,
            )
            twice = at.listens and store.add(f"longseq/here/{at.rank}", 1) > 1
        except RuntimeError as error:
            raise _Ended(
                EXIT_UNFIT,
                f"rank {at.rank} on {node_name()}: the processes cannot meet at {at.address}:{at.port} (MASTER_ADDR, "
                f"MASTER_PORT): {str(error).splitlines()[0]}. Is the port free there, and can this node reach it?",
            ) from None
        if twice:
            raise ConfigError(f"rank {at.rank} was started twice: give each process a RANK of its own.")
        if at.rank == 0:
            self.call = self.name
            store.set(_CALL, self.call)
        return store

    def _heard(self, look: Callable[[], str | None], missing: str = "") -> Any:
        """What another process says, sooner or later; a signal ends the wait, and ``missing`` names who is late."""
        deadline = time.monotonic() + _SECONDS
        while (words := look()) is None:
            if self.stop.requested:
                raise _Ended(EXIT_GO_ON, "stopped before the training had begun.")
            if missing and time.monotonic() > deadline:
                raise _Ended(EXIT_UNFIT, f"no sign of {missing} after {_SECONDS:g} s.")
            time.sleep(_POLL_SECONDS)
        return json.loads(words)

    def _said(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _words(self) -> str | None:
        """What rank 0 has said to this process; answers its newest call."""
        call = self._said(_CALL)
        if call and call != self.call:
            self.call = call
            answer = json.dumps([node_name(), self.at.local_rank, self.name])
            self.store.set(f"longseq/{call}/{self.at.rank}", answer)
        return self._said(f"longseq/{self.name}")

    def tell(self, words: Mapping[str, Any]) -> None:
        """Rank 0: what the others wait for; of two things they hear the first."""
        with suppress(RuntimeError):  # there is nobody any more
            answers = (self._said(f"longseq/{self.call}/{rank}") for rank in range(1, self.at.world))
            for answer in answers:
                if answer:
                    self.store.compare_set(f"longseq/{json.loads(answer)[2]}", "", json.dumps(words))
            if "code" in words and self.at.listens and not self.begun:
                time.sleep(5 * _POLL_SECONDS)  # the store ends with this process

    def lead(self, args: argparse.Namespace) -> int:
        """Rank 0, as the verb of longseq, whose training is this process's and the others'."""
        from longseq.config.loading import load_config
        from longseq.launch import start

        told: list[tuple[str, int | None]] = [(node_name(), self.at.local_rank)]
        for rank in range(1, self.at.world):
            name, local, _ = self._heard(partial(self._said, f"longseq/{self.call}/{rank}"), f"rank {rank}")
            told.append((name, local))
        nodes = nodes_of(told)
        words = [f"trainer.nodes={len(nodes)}", f"trainer.devices={self.at.world // len(nodes)}"]

        def train(run: Run, config: Config, checkpoint: Path | None, origin: Path | None) -> int:
            self.store.set(_RUN, str(run.path))  # for torchrun's next attempt
            words = {"run": str(run.path), "start": run.start, "nodes": nodes}
            words |= {"checkpoint": str(checkpoint or ""), "origin": str(origin or "")}
            self.tell(words)
            return self._train(words)

        # An attempt after another one goes on, where that has left a run; what was asked for is in its configuration.
        before = self._said(_RUN)
        if before and Run(Path(before)).config_path.exists():
            if Run.open(before).finished:
                self.tell({"code": 0})
                return 0
            training = start.resume(before, words, take_over=True, launch=train)
        elif args.verb == "resume":
            training = start.resume(args.what, [*args.overrides, *words], launch=train)
        else:
            path = Path(args.what)
            training = start.begin(load_config(path, [*args.overrides, *words]), path.stem, launch=train)
        print("\n".join(training.report), flush=True)
        return 0  # torchrun takes any other code for a failure

    def follow(self) -> int:
        words = self._heard(self._words)
        if "code" in words:
            return int(words["code"])
        code = self._train(words)
        return 0 if code == EXIT_GO_ON else code

    def _train(self, words: Mapping[str, Any]) -> int:
        """The training of this rank: 0, or 75 where it was stopped and has saved.

        Raises:
            LongseqError: with the exit code that it means.
        """
        run, place = _of_words(json.dumps({**words, "at": asdict(self.at)}).encode())
        os.write(self._write, json.dumps({**words, "at": asdict(self.at)}).encode() + b"\n")
        self.begun = True
        keep_output(run.rank_log(place.rank))
        stacks_on_request(self.ward.stacks.fileno())
        vitals = Vitals(self.ward.theirs, run.trace_of(place.rank))
        become(place)
        os.environ |= recorder_settings(os.environ, run)
        starts.watch(run.starts_dir, run.start, lambda text: print(f"longseq: error: {text}", file=sys.stderr))
        code, sentence = outcome(lambda: self._steps(run, place, vitals, words), run)
        if sentence:
            self.ward.wait_to_be_ended()
            raise _Ended(code, f"rank {place.rank} {sentence}." if code == PEER_LOST else sentence)
        return code

    def _steps(self, run: Run, place: Place, vitals: Vitals, words: Mapping[str, Any]) -> int:
        with nothing_collected():
            import torch

            from longseq.training.collectives import PATIENCE
            from longseq.training.fit import fit

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # of which nobody had told torch
        quiet()
        raise_open_files()
        config = run.config()
        self.stop.time_limit = config.time_limit_seconds
        vitals.hang_seconds = config.trainer.hang_seconds
        follow_scheduler(config)
        vitals.device = str(own_device(config))
        store = gathered(run, config, place, Limits(), vitals, self.port)
        if store is not None:
            os.environ["MASTER_PORT"] = str(store.port)
            store.set_timeout(PATIENCE)
        vitals.within = None
        checkpoint = Checkpoint(Path(words["checkpoint"])) if words["checkpoint"] else None
        origin = Path(words["origin"]) if words["origin"] else None
        return 0 if fit(run, config, checkpoint, self.stop, vitals, origin) else EXIT_GO_ON


def _of_words(line: bytes) -> tuple[Run, Place]:
    """The run and this process's place, of what rank 0 has told and the launcher has."""
    words = json.loads(line)
    at, nodes = words["at"], tuple(words["nodes"])
    local_rank = at["rank"] % (at["world"] // len(nodes))
    place = Place(at["rank"], local_rank, at["world"], nodes, at["address"], at["port"])
    return Run(Path(words["run"]), words["start"]), place


def _line(read: int, write: int) -> bytes:
    """In the guard: wait for the line that says what it watches; the end of its process ends it."""
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        if line := pipe.readline():
            return line
    os._exit(0)


if __name__ == "__main__":
    leave(main())
