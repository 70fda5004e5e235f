"""Where a task stands among all tasks of a job, as SLURM tells it, and what their start goes by. No torch here."""

from __future__ import annotations

import argparse
import re
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from longseq.errors import LongseqError

_FIRST_PORT, _PORTS = 20_000, 12_000  # below the ports that systems give away


@dataclass(frozen=True)
class Limits:
    """What a start must find, and how long it waits for a rank that does not answer."""

    seconds: float = 300.0  # until all processes have met
    disk_gib: float = 1.0
    clock_seconds: float = 30.0
    gb_a_second: float = 0.0
    hang_seconds: float | None = None  # None: trainer.hang_seconds

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for name, value in asdict(Limits()).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)

    @staticmethod
    def of(args: argparse.Namespace) -> Limits:
        return Limits(**{name: getattr(args, name) for name in asdict(Limits())})


@dataclass(frozen=True)
class Place:
    """Where this process stands among all."""

    rank: int
    local_rank: int
    world: int
    nodes: tuple[str, ...]  # of the step, by the scheduler's names
    address: str
    port: int  # that rank 0 tries first

    @staticmethod
    def of_slurm(environment: Mapping[str, str], address: str = "", start: int = 0) -> Place:
        """From what srun tells its tasks. The port is a function of job and start: those that linger have another.

        address: of rank 0's node, where the batch script is on another one. start: the run's, of which a job can have
        several.
        """
        job = int(environment["SLURM_JOB_ID"])
        nodes = tuple(host_names(environment["SLURM_STEP_NODELIST"]))
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            world=int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]),
            nodes=nodes,
            # Of the batch script's node, which is mostly that of rank 0; by number, where names do not resolve.
            address=address or environment.get("SLURM_LAUNCH_NODE_IPADDR") or nodes[0],
            port=_FIRST_PORT + (job * 101 + start * 7) % _PORTS,
        )

    @property
    def node(self) -> str:
        """The scheduler's name of this process's node."""
        return self.node_of(self.rank)

    def node_of(self, rank: int) -> str:
        """The scheduler's name of a rank's node; every node has equally many."""
        return self.nodes[rank * len(self.nodes) // self.world]

    def ports(self, count: int = 16) -> Iterator[int]:
        """What rank 0 tries, where others of this machine listen on the first."""
        for attempt in range(count):
            yield self.port if not attempt else _FIRST_PORT + (self.port + attempt * 1_009) % _PORTS


# How launchers (torchrun, Open MPI, MPICH and Intel's, srun) tell a process its place.
_TOLD = {
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "world": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
    "local_rank": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "local_world": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}
_OF_MPIRUN = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
# What all processes of one start have in common on all nodes, and no others of their machines: Open MPI's 4 and 5.
_START = ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE")


def value_of(what: str, environment: Mapping[str, str]) -> str | None:
    """A process's "rank", "local_rank" or number of processes ("world"; "local_world": of its node), if it was told."""
    return next((environment[name] for name in _TOLD[what] if environment.get(name)), None)


def address_of(environment: Mapping[str, str]) -> str | None:
    """Where rank 0 is, if a launcher has told it.

    mpirun does not, but for one machine. In a SLURM job its daemons are tasks of a step, and srun's variables theirs.
    """
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if any(name in environment for name in _OF_MPIRUN):
        here = value_of("local_world", environment)
        return "127.0.0.1" if here and here == value_of("world", environment) else None
    first = next(host_names(environment.get("SLURM_STEP_NODELIST", "")), "")
    with suppress(OSError):  # not the launching node first: where srun was typed on a login node, rank 0 is elsewhere
        if first:
            socket.getaddrinfo(first, None)
            return first
    return environment.get("SLURM_LAUNCH_NODE_IPADDR")


def port_of(environment: Mapping[str, str], otherwise: int) -> int:
    """Where rank 0 listens: another port for each start of Open MPI or srun, as several may run on one machine."""
    if environment.get("MASTER_PORT"):
        return int(environment["MASTER_PORT"])
    start = next((environment[name] for name in _START if environment.get(name)), "")
    if not start and environment.get("SLURM_STEP_ID"):
        start = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
    return _FIRST_PORT + zlib.crc32(start.encode()) % _PORTS if start else otherwise


def refuse_several_tasks(environment: Mapping[str, str], verb: str) -> None:
    """`srun -n2 longseq fit`, or torchrun's, would start the same training twice.

    Raises:
        LongseqError: where this process is one of several of a launcher.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # of srun; a job's own script has none
    if tasks != "1":
        raise LongseqError(
            f"longseq {verb}: task {environment.get('SLURM_PROCID')} of {tasks} that srun has started, and each would "
            f"train for itself. `longseq submit` starts a training on several nodes; on one node, "
            f"`srun --ntasks=1 longseq {verb} ... trainer.devices=N` starts its own processes."
        )
    rank, world = value_of("rank", environment), value_of("world", environment)
    if rank is not None and (world or "1") != "1":
        advice = "Start it once, and it starts its own processes (trainer.devices=N)."
        if verb != "finetune":
            own = f"longseq.launch.rank {verb} {'CONFIG' if verb == 'fit' else 'RUN'}"
            advice = f"Have it start `python -m {own}`, which trains in all of them (`torchrun ... -m {own}`)."
        raise LongseqError(
            f"longseq {verb}: process {rank} of {world} that a launcher has started, and each would train for itself. "
            f"{advice}"
        )


def host_names(text: str) -> Iterator[str]:
    """Names of a SLURM list: "node[1-3,07],login" is node1, node2, node3, node07, login."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            yield part
            continue
        before, ranges, after = match.groups()
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from host_names(f"{before}{number:0{len(first)}}{after}")
