"""What libraries find in the environment of a process on GPUs. Whatever the user has set stays. No torch here.

Set before torch is imported, which reads some of it then.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from longseq.runs.run import Run
from longseq_data.files import own_folder

_RECORDED = 2000  # collectives of a rank that are remembered


def gpu_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Of torch's allocator and Triton's cache."""
    settings = {}
    if not environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # Batches of other lengths and tiles leave fewer holes in segments that can grow.
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if "TRITON_CACHE_DIR" not in environment:
        with suppress(OSError):  # on the node's own disk; the default is in the home folder, which all nodes share
            cache = Path(tempfile.gettempdir(), f"longseq-triton-{os.geteuid()}")
            settings["TRITON_CACHE_DIR"] = str(own_folder(cache))
    return settings


def recorder_settings(environment: Mapping[str, str], run: Run) -> dict[str, str]:
    """Of NCCL's flight recorder: where each rank leaves its last collectives when one does not end in time."""
    settings = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in environment:  # its former name
        settings["TORCH_FR_BUFFER_SIZE"] = str(_RECORDED)
    if "TORCH_FR_DUMP_TEMP_FILE" not in environment:
        settings["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(run.trace_of(""))  # torch appends the rank
    return {name: value for name, value in settings.items() if name not in environment}


def where_traces_are(run: Run) -> str:
    """A sentence, with a space before it; empty where no rank of this start has left any."""
    prefix = run.trace_of("")
    if not any(prefix.parent.glob(f"{prefix.name}*")):
        return ""
    return f" What each rank's last collectives were: `torchfrtrace --prefix {prefix.name} {prefix.parent}`."
