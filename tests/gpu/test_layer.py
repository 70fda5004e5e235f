"""How many kernels one layer of a model starts on a GPU in a step: the host must be quicker than the chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def _printed(*arguments: str) -> dict[str, dict[str, int]]:
    """Counted where kernels are not interpreted, which a process decides once."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform"), str(ROOT / "pipelines"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/gpu/layer.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def test_a_layer_starts_about_40_kernels_in_a_step():
    ceilings = {
        "autocast": 37,
        "bf16": 35,
        "autocast, qk_norm": 38,
        "bf16, qk_norm": 37,
        "autocast, dropout": 41,
        "bf16, dropout": 39,
        "autocast, checkpoints": 53,
        "bf16, checkpoints": 49,
        "bf16, window": 38,
        "autocast, window": 40,
        "bf16, window, learned": 40,
        "autocast, window, learned": 42,
        "bf16, learned": 39,
        "bf16, gate": 67,
        "bf16, window, gate": 75,
        "bf16, masked": 36,
        "autocast, masked": 38,
    }
    found = _printed(*ceilings)
    for name, ceiling in ceilings.items():
        kernels = found[name]
        # What a layer cannot do without: 4 linear maps forward and 8 products backward.
        products = 12 + 4 * name.endswith("checkpoints") + 3 * name.endswith("gate")
        assert kernels["mm"] + kernels["addmm"] == products
        assert kernels["attend"] == 1 + name.endswith("checkpoints")
        assert products < sum(kernels.values()) <= ceiling, (name, kernels)


@pytest.mark.compiled
def test_a_layer_starts_at_most_60_kernels_for_a_million_tokens():
    for name, kernels in _printed("autocast, 1M", "bf16, 1M").items():
        assert kernels["mm"] + kernels["addmm"] == 16
        assert sum(kernels.values()) <= 60, (name, kernels)


@pytest.mark.compiled
def test_the_small_kernels_of_a_layer_spill_nothing():
    for arch, stacks in _printed("--arch", "80", "89", "90", "100").items():
        names = ("norm_rows", "norm_rows_vjp", "add_parts", "move_heads", "put_rates", "add_parts_of_heads")
        assert stacks == dict.fromkeys(names, 0), arch
