"""What a start of a run was made of, for environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from longseq.config.schema import Config
from longseq.devices import on_cuda

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
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """The commit of the platform's own checkout, with ``-dirty`` where files differ from it; None outside one."""
    command = ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
