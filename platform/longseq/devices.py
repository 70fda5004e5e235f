"""Which device is this process's. Decided here alone, for training, preflight, evaluation and whoever reads a model.

Whoever starts a process tells it in its environment where it is among the processes that see the same devices:
LOCAL_RANK of LOCAL_WORLD_SIZE. DeepSpeed and Lightning take LOCAL_RANK for the index of the device as well, so where a
scheduler shows each task a device of its own the two are 0 and 1, wherever on its node the task is. RANK and
WORLD_SIZE say where it is among all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from longseq.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from longseq.config.schema import Config


def on_cuda(config: Config) -> bool:
    """Whether this run trains on GPUs."""
    import torch

    wanted = config.trainer.accelerator
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())


def own_device(config: Config) -> torch.device:
    """Of a training process. :func:`claim` it before the first collective."""
    import torch

    return torch.device("cuda", _local_rank()) if on_cuda(config) else torch.device("cpu")


def claim(device: torch.device) -> None:
    """Make it the one that libraries compute on and talk from: NCCL and DeepSpeed ask for the current device."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def identity(device: torch.device) -> str:
    """What tells a GPU, or a MIG instance, from the others of its node; nothing for a CPU, which processes share.

    Drivers differ in whose UUID an instance has, its own or its GPU's, so it goes by the name that it was asked for by.
    """
    import torch

    if device.type != "cuda":
        return ""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    if index < len(names) and names[index].strip().startswith("MIG-"):
        return names[index].strip()
    return str(torch.cuda.get_device_properties(device).uuid)


def reading_device(accelerator: str) -> str:
    """Of a process that reads a model, by trainer.accelerator; in turns where there are more processes than devices."""
    import torch

    if accelerator == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{_local_rank() % torch.cuda.device_count()}"


def sharing(config: Config) -> int:
    """How many processes, this one included, share the devices that it sees."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", config.trainer.devices))


def check_devices(config: Config) -> None:
    """Refuse more processes than there are devices for.

    Raises:
        ConfigError: naming the key to change.
    """
    import torch

    gpus = torch.cuda.device_count()
    if on_cuda(config) and sharing(config) > gpus:
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}, but there are {gpus} GPUs here: set trainer.devices="
            f"{max(gpus, 1)}{'' if gpus else ' and trainer.accelerator=cpu'}."
        )


def environment_of_place(local_rank: int, processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What process ``local_rank`` of those on a node finds in its environment. Before CUDA is asked for anything.

    A process can use one MIG instance, the first that it is shown, so each is shown its own.
    """
    instances = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.startswith("MIG-")]
    if len(instances) < 2:
        return {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(processes)}
    turn, own = divmod(local_rank, len(instances))
    return {
        "CUDA_VISIBLE_DEVICES": instances[own],
        "LOCAL_RANK": str(turn),
        "LOCAL_WORLD_SIZE": str(-(-processes // len(instances))),
    }


def follow_scheduler(config: Config) -> None:
    """For a task that a scheduler may show fewer devices than its node has tasks (--gpus-per-task, --gpu-bind).

    One device each: it is the first. Several: the tasks that see the same ones are taken to be neighbours, and
    preflight refuses it where two of them then have the same device.
    """
    import torch

    if not on_cuda(config):
        return
    there = torch.cuda.device_count()
    if there and sharing(config) % there == 0 and sharing(config) > there:
        os.environ |= {"LOCAL_RANK": str(_local_rank() % there), "LOCAL_WORLD_SIZE": str(there)}


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))
