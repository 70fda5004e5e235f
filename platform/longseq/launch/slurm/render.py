"""Job scripts, by pure functions: of a configuration, a site's profile and a request to the text of a script."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.launch.slurm.site import Site
from longseq.launch.slurm.templates import Shell, directive, fill, quoted
from longseq.training.signs import PEER_LOST

_DEPENDENCY = re.compile(r"singleton|[a-z]+(:\d+(_\d+)?(\+\d+)?)+([,?][a-z]+(:\d+(_\d+)?(\+\d+)?)+)*")
_CONTROLLED = (  # options of sbatch that have a place of their own
    *(
        "job-name",
        "output",
        "error",
        "open-mode",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
    ),
    *("gres", "time", "signal", "requeue", "no-requeue", "array", "dependency", "partition", "account", "qos"),
    *("constraint", "reservation", "exclude", "mem", "exclusive"),
)


@dataclass(frozen=True)
class Request:
    """What one job is asked to be."""

    nodes: int
    devices: int  # tasks of a node
    gpus: bool  # a GPU for every task
    min_nodes: int | None = None  # goes on with fewer nodes when no more come back
    spares: int = 0  # more nodes, where there are any, that take the place of those that are lost
    dependency: str | None = None
    comes_back: bool = True  # by itself; a chain has its next job instead
    at_once: int | None = None  # of an array
    by_node: bool = False  # a node is one task, which starts its processes itself
    code: str = ""  # the snapshot in the run's folder that it runs, see runs.code; without one what is installed

    @property
    def least(self) -> int:
        """Nodes without which it does not start."""
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def most(self) -> int:
        return self.nodes + self.spares

    @property
    def wide(self) -> bool:
        """SLURM gives no more nodes than tasks, which it counts for the fewest nodes: where those would be too few, a
        node is one task to it, with the cores of all of its processes."""
        return self.by_node or self.least * self.devices < self.most


@dataclass(frozen=True)
class Layout:
    """How a step is shared among nodes."""

    nodes: int
    accumulate: int


def train_script(run: Path, config: Config, site: Site, request: Request) -> str:
    """The script of one training run in the folder ``run``.

    Raises:
        ConfigError: for a value that no script can hold.
    """
    head = _directives(site, request, run.name, run / "slurm" / "job-%j.log")
    return fill("train.sbatch.j2", {"run": run, "directives": head, **_training(config, site, request, (run,))})


def sweep_script(name: str, runs: Sequence[Path], config: Config, site: Site, request: Request) -> str:
    """The script of an array with a training run a task, in folders called ``name``-0, ``name``-1, ..."""
    first = runs[0]
    assert [run.name for run in runs] == [f"{name}-{number}" for number in range(len(runs))]
    most = f"%{request.at_once}" if request.at_once else ""
    head = _directives(site, request, name, first.with_name(f"{name}-%a") / "slurm" / "job-%A_%a.log")
    head.append(directive("array", f"0-{len(runs) - 1}{most}"))
    return fill("sweep.sbatch.j2", {"runs": runs, "directives": head, **_training(config, site, request, runs)})


def evaluate_script(run: Path, arguments: Sequence[str], site: Site, request: Request) -> str:
    """The script of `longseq evaluate`, on one node with one task."""
    head = _directives(site, request, f"{run.name}-evaluate", run / "slurm" / "evaluate-%j.log", waits=False)
    values = {"run": run, "arguments": _words(arguments), "directives": head}
    values |= _fence(run / "slurm" / "evaluate", run / "code", site, request)
    return fill("evaluate.sbatch.j2", values | _environment(site) | _command(site, request, (run,)))


def prepare_script(config: Path, arguments: Sequence[str], place: Path, site: Site, request: Request) -> str:
    """The script of `longseq data prepare`, one task per node. ``place``: of its log and its code, as far as all have
    the same name."""
    head = _directives(site, request, f"prepare-{config.stem}", place.with_name(f"{place.name}-%j.log"), waits=False)
    if request.nodes > 1:
        head.append(directive("no-kill"))
    values = {"config": config, "arguments": _words(arguments), "directives": head, "nodes": request.nodes}
    values |= _fence(place, place.with_name(f"{place.name}.code"), site, request)
    return fill("prepare.sbatch.j2", values | _environment(site) | _command(site, request, ()))


def shared_script(run: Path, verb: str, arguments: Sequence[str], shards: Path, site: Site, request: Request) -> str:
    """The script of a verb whose ``shards``, a folder, the processes of several nodes share."""
    head = _directives(site, request, f"{run.name}-{verb}", run / "slurm" / f"{verb}-%j.log")
    values = {"verb": Shell(verb), "shards": shards, "directives": head, "arguments": _words(arguments)}
    values |= {"nodes": request.nodes, "devices": request.devices, "requeue": site.requeue}
    values |= {"max_restarts": site.max_restarts, "pause_seconds": site.pause_seconds, "gpus": request.gpus}
    values |= _fence(run / "slurm" / verb, run / "code", site, request)
    return fill("shared.sbatch.j2", values | _environment(site) | _command(site, request, (run, shards)))


def _fence(beside: Path, codes: Path, site: Site, request: Request) -> dict[str, object]:
    """For _verb.j2, in the script of any job that is no training: its starts are numbered, and only the newest lives.

    beside: log and starts, without the job's number, lie next to each other. codes: the folder of its snapshot.
    """
    code = _code(request, site, codes)
    return {"beside": beside, "name": beside.name, "codes": codes, "code": code}


def _code(request: Request, site: Site, codes: Path) -> str:
    if site.container != "none":  # an image does not change
        return ""
    if request.code and ":" in str(codes):
        raise ConfigError(f"{codes}: the path of a job's code cannot hold a ':': choose another folder.")
    return request.code


def layouts(config: Config, nodes: int, min_nodes: int, devices: int) -> Mapping[int, Layout]:
    """For each number of nodes that a start may get: how many of them are used, and batches accumulated.

    A process never holds more sequences than with all ``nodes``: what fewer processes lack, they do one after another.

    Raises:
        ConfigError: if a step cannot be shared among ``min_nodes``.
    """
    samples, trainer, parts = config.samples_per_step, config.trainer, config.trainer.context_parallel
    most = math.ceil(samples * parts / (nodes * devices * trainer.accumulate))  # sequences of a process in a batch
    found: dict[int, Layout] = {}
    for there in range(min_nodes, nodes + 1):
        for used in range(there, min_nodes - 1, -1):
            if used * devices % parts:
                continue
            ranks, accumulate = used * devices // parts, trainer.accumulate
            while samples / (ranks * accumulate) > most or (
                not config.data.by_length and samples % (ranks * accumulate)
            ):
                accumulate += 1
                if ranks * accumulate > samples:
                    break
            else:
                found[there] = Layout(used, accumulate)
                break
        if there not in found:
            if all(used * devices % parts for used in range(min_nodes, there + 1)):
                raise ConfigError(
                    f"--min-nodes={min_nodes}: {there} × {devices} processes are no groups of trainer.context_parallel="
                    f"{parts}: take --min-nodes={parts // math.gcd(parts, devices)}."
                )
            raise ConfigError(
                f"--min-nodes={min_nodes}: a step of {samples} sequences (data.batch_tokens / data.length) cannot be "
                f"shared evenly among {there} × {devices} processes: take --min-nodes={nodes}, or another batch_tokens."
            )
    return found


def _directives(site: Site, request: Request, name: str, log: Path, *, waits: bool = True) -> list[Shell]:
    """The head of a script. ``waits``: for a signal ahead of its end, to save and come back."""
    if "%" in str(log.parent).replace("-%a", ""):
        raise ConfigError(f"{log.parent}: sbatch would replace the %: set run.dir to a path without one.")
    outlives = request.least != request.most
    lines = [
        directive("job-name", name),
        directive("nodes", f"{request.least}-{request.most}" if outlives else request.nodes),
        *([] if request.wide else [directive("ntasks-per-node", request.devices)]),
    ]
    wanted: dict[str, object] = {
        "cpus-per-task": request.devices * (site.cpus_per_task or 1) if request.wide else site.cpus_per_task,
        "mem": site.memory,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclude": site.exclude,
        "dependency": _dependency(request.dependency),
    }
    if request.gpus:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        gres = site.gpu_request == "gres"
        wanted["gres" if gres else "gpus-per-node"] = f"{'gpu:' if gres else ''}{kind}{request.devices}"
    if site.time_seconds is not None:
        wanted["time"] = _clock(site.time_seconds)
    lines += [directive(option, value) for option, value in wanted.items() if value is not None]
    lines += [directive("exclusive")] if site.exclusive else []
    lines += [directive("output", log), directive("open-mode", "append")]
    comes_back = site.requeue and request.comes_back
    lines += [directive("requeue" if comes_back else "no-requeue")]
    lines += [directive("no-kill")] if waits and outlives else []  # by the loss of a node
    lines += [directive("signal", f"B:USR1@{site.signal_seconds}")] if waits else []
    for argument in site.sbatch:
        option, equals, value = argument.removeprefix("--").partition("=")
        if option in _CONTROLLED:
            raise ConfigError(f"sbatch: --{option} is set from another key of the profile, or by `longseq submit`.")
        lines.append(directive(option, value if equals else None))
    return lines


def _training(config: Config, site: Site, request: Request, runs: Sequence[Path]) -> dict[str, object]:
    requeue = site.requeue and request.comes_back
    limits = {"seconds": site.preflight_seconds, "disk-gib": site.preflight_disk_gib}
    limits |= {"clock-seconds": site.preflight_clock_seconds, "gb-a-second": site.preflight_gb_a_second}
    limits |= {} if site.hang_seconds is None else {"hang-seconds": site.hang_seconds}
    return {
        "layouts": list(layouts(config, request.nodes, request.least, request.devices).items()),
        "nodes": request.nodes,
        "least": request.least,
        "outlives": request.least != request.most,
        "ends_it": Shell("scontrol requeue" if requeue else "scancel"),
        "ends_it_words": Shell("it comes back by the queue" if requeue else "the next job of the chain goes on"),
        "devices": request.devices,
        "max_restarts": site.max_restarts,
        "pause_seconds": site.pause_seconds,
        "requeue": requeue,
        "memory": config.trainer.memory_checkpoint_every > 0,
        "code": _code(request, site, runs[0] / "code"),
        "codes": Shell("$run/code"),
        "peer_lost": PEER_LOST,
        # A GPU that was asked for and cannot be seen is no reason to train on a CPU.
        "accelerator": Shell(" trainer.accelerator=cuda" if request.gpus else ""),
        "preflight": _words(f"--{name}={value:g}" for name, value in limits.items()),
        **_environment(site),
        **_command(site, request, runs),
    }


def _environment(site: Site) -> dict[str, object]:
    return {
        "modules": site.modules,
        "threads": site.cpus_per_task if "OMP_NUM_THREADS" not in site.environment else None,
        "environment": site.environment,
        "scratch": site.scratch,
    }


def _command(site: Site, request: Request, runs: Sequence[Path]) -> dict[str, object]:
    """Arguments of srun, and what stands before ``-m module``: an interpreter, here or in a container."""
    # srun does not take over --cpus-per-task of the job.
    cpus = site.cpus_per_task or (1 if request.wide else None)
    if request.by_node and cpus:
        cpus *= request.devices
    srun = ["--input=none", *([f"--cpus-per-task={cpus}"] if cpus else []), *site.srun]
    mounts = list(dict.fromkeys([*site.container_mounts, *(str(run.parent) for run in runs)]))
    command = [sys.executable]
    if site.container == "pyxis":
        srun.append(f"--container-image={site.container_image}")
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
        srun += [f"--container-mounts={','.join(pairs)}"] if pairs else []
        command = [site.container_python]
    elif site.container == "apptainer":
        bound = [word for mount in mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if request.gpus else []
        command = ["apptainer", "exec", *gpus, *bound, str(site.container_image), site.container_python]
    return {"srun": _words(srun), "command": _words(command)}


def _words(words: Iterable[object]) -> Shell:
    return Shell(" ".join(map(quoted, words)))


def _dependency(text: str | None) -> str | None:
    if text is not None and not _DEPENDENCY.fullmatch(text):
        raise ConfigError(f"--dependency={text!r}: write it as sbatch does, e.g. afterok:1234 or singleton.")
    return text


def _clock(seconds: float) -> str:
    """As sbatch reads it, rounded up to minutes, which is what SLURM counts."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"
