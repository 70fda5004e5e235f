"""Where a task stands among all tasks of a job, as SLURM tells it, and what their start must find. No torch here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Limits:
    """What a start must find."""

    seconds: float = 300.0  # until all processes have met
    disk_gib: float = 1.0
    clock_seconds: float = 30.0
    gb_a_second: float = 0.0

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
    port: int

    @staticmethod
    def of_slurm(environment: Mapping[str, str]) -> Place:
        """From what srun tells its tasks. The port is a function of job and restart: those that linger have another."""
        job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", 0))
        nodes = tuple(host_names(environment["SLURM_STEP_NODELIST"]))
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            world=int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]),
            nodes=nodes,
            # Of the batch script's node, which is that of rank 0; by number, where names do not resolve.
            address=environment.get("SLURM_LAUNCH_NODE_IPADDR") or nodes[0],
            port=20_000 + (job * 101 + restart * 7) % 12_000,  # below the ports that systems give away
        )

    def node_of(self, rank: int) -> str:
        """The scheduler's name of a rank's node; every node has equally many."""
        return self.nodes[rank * len(self.nodes) // self.world]


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
