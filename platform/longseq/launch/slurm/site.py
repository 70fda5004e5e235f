"""A cluster's profile: what its administrators ask of a job. A YAML file with the keys of :class:`Site`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from longseq.config.durations import duration_seconds
from longseq.config.flat import load_flat
from longseq.config.sections import key
from longseq.errors import ConfigError
from longseq.launch.slurm.templates import folder
from longseq_data.files import user_path

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Site:
    """What holds for every job of a cluster. No value is seen by a shell: none is expanded."""

    partition: str | None = key(None, "where jobs wait; null: the cluster's default")
    account: str | None = key(None, "who pays")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that nodes must have, e.g. h100&ib")
    reservation: str | None = key(None, "nodes set aside for you")
    exclude: str | None = key(None, "nodes never to be used, e.g. node[17,23]")
    time: str | None = key(None, "limit of one start, e.g. 24h or 1-00:00:00; null: the partition's default")
    exclusive: bool = key(False, "nobody else's jobs on the nodes")
    cpus_per_task: int | None = key(None, "cores of one training process", at_least=1)
    memory: str | None = key(None, "of a node, e.g. 480G; 0: all of it")
    gpus_per_node: int = key(0, "of a node: the default of --gpus-per-node, and its most; 0: not known", at_least=0)
    gpu_type: str | None = key(None, "as the cluster names it, e.g. h100")
    gpu_memory_gib: float | None = key(None, "of one GPU: a run that needs more is refused", at_least=1)
    gpu_request: str = key(
        "gpus-per-node", "how GPUs are asked for: --gpus-per-node=8, or --gres=gpu:8", choices=("gpus-per-node", "gres")
    )
    modules: list[str] = key([], "loaded before anything is started, e.g. cuda/12.4")
    environment: dict[str, str] = key({}, "variables of the training processes, e.g. NCCL_SOCKET_IFNAME: ib0")
    container: str = key("none", "what the training runs in", choices=("none", "pyxis", "apptainer"))
    container_image: str | None = key(None, "its image: a .sqsh or .sif file, or a registry's name")
    container_mounts: list[str] = key([], "folders of the host seen inside, HOST or HOST:INSIDE")
    container_python: str = key("python3", "the interpreter inside that has longseq")
    scratch: str | None = key(None, "fast local folder of every node, for temporary files")
    signal_seconds: int = key(180, "how long before the time limit a run saves and comes back", at_least=10)
    requeue: bool = key(True, "the job comes back by itself after time limits, preemption, crashes and lost nodes")
    max_restarts: int = key(100, "how often a job starts again at most without a new checkpoint", at_least=0)
    pause_seconds: int = key(
        30, "longer each time, before the next start of a job that failed before its first step", at_least=0
    )
    preflight_seconds: int = key(300, "how long all processes of a start may take to meet", at_least=1)
    preflight_disk_gib: float = key(1.0, "free space that a node's temporary folder must have", at_least=0)
    preflight_clock_seconds: float = key(30.0, "by how much clocks of nodes may differ", at_least=0)
    preflight_gb_a_second: float = key(0.0, "least bandwidth of an all-reduce over all processes; 0: any", at_least=0)
    hang_seconds: int | None = key(None, "trainer.hang_seconds of all runs; null: each run's own", at_least=10)
    sbatch: list[str] = key([], "further directives, e.g. --mail-type=FAIL")
    srun: list[str] = key([], "further arguments of srun, e.g. --mpi=none")

    @property
    def time_seconds(self) -> float | None:
        """The limit of one start.

        Raises:
            ConfigError: if it is no time.
        """
        try:
            return None if self.time is None else duration_seconds(self.time)
        except ValueError as error:
            raise ConfigError(f"time={self.time}: {error}.") from None

    def check(self) -> None:
        """The keys against each other.

        Raises:
            ConfigError: naming the key.
        """
        limit = self.time_seconds
        if limit is not None and limit < self.signal_seconds + 60:
            raise ConfigError(
                f"time={self.time} and signal_seconds={self.signal_seconds}: less than a minute is left to train in; "
                "raise the one, or lower the other."
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"environment: {name!r} is no name of a variable.")
        if self.gpu_type is not None and not _WORD.fullmatch(self.gpu_type):
            raise ConfigError(f"gpu_type={self.gpu_type!r}: a word, as `sinfo -o %G` shows it.")
        if (self.container != "none") != (self.container_image is not None):
            raise ConfigError(
                f"container={self.container} and container_image={self.container_image}: give both, or neither."
            )
        for name in ("sbatch", "srun"):
            for argument in getattr(self, name):
                if not re.match(r"--[a-z][a-z-]*(=|$)", argument):
                    raise ConfigError(f"{name}: {argument!r} is no --option or --option=value.")


def load_site(name: str | None) -> Site:
    """The profile in a file, or one that ships by its name; without either $LONGSEQ_SITE, or nothing but defaults.

    Raises:
        ConfigError: for a file that is not there, and for keys and values that are refused.
    """
    name = name or os.environ.get("LONGSEQ_SITE") or None
    if name is None:
        return Site()
    path, shipped = user_path(name), folder() / "sites" / f"{name}.yaml"
    if not path.is_file() and shipped.is_file() and "/" not in name:
        path = shipped
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
        raise ConfigError(f"site {name}: no such file, and none of the profiles that ship ({names}).")
    site = load_flat(Site, path, (), "longseq submit --help")
    try:
        site.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return site
