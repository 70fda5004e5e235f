"""What a start of a run was made of, for environment.json."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from longseq.config.schema import Config
from longseq.devices import on_cuda
from longseq.runs import code

_PACKAGES = ("longseq", "torch", "lightning", "deepspeed", "numpy", "biopython", "omegaconf", "tensorboard")


def start_facts(config: Config, step: int) -> dict[str, object]:
    """Versions, devices, git commit and world size of one start at ``step``."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_cuda(config) else ["cpu"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "world_size": config.processes,
        "zero_stage": config.trainer.zero_stage,
        "host": platform.node(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "git_commit": code.git_commit(),
        "code": code.current(),
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
