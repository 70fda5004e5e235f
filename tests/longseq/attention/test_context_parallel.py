"""Slices of a sequence on 1, 2 and 4 real processes against the whole sequence on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("context_worker.py")
WORLD = 4


def _worker() -> ModuleType:
    spec = spec_from_file_location("context_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_WORKER = _worker()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank has found, in all cases: processes take seconds to start."""
    folder = tmp_path_factory.mktemp("context")
    command = [sys.executable, str(WORKER)]
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder / "store"), str(folder / "result")],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [worker.communicate(timeout=900)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(errors)
    return json.loads((folder / "result").read_text())


@pytest.mark.parametrize("name", [*_WORKER.CASES, *(f"model {name}" for name in _WORKER.MODELS)])
def test_slices_have_the_outputs_and_gradients_of_the_whole(found: list[dict], name: str) -> None:
    for rank, what in enumerate(found):
        for where, error in what["errors"][name].items():
            assert error < 1e-5, f"rank {rank}, {where}"


@pytest.mark.parametrize("causal", [True, False])
def test_a_message_is_one_state_a_head_whatever_the_length(found: list[dict], causal: bool) -> None:
    """B · H · (m · (e + 1) + 1) numbers of 4 bytes, B = 1, H = 2, m = 8, e = 4: one forward, one backward.

    And a byte each: whether any number is not finite.
    """
    payload = 1 * 2 * (8 * (4 + 1) + 1) * 4
    for what in found:
        for length in (1 << 12, 1 << 18):
            sent = what["sent"][f"{length} {causal} 0"]
            assert sent == {"gathers": 2, "gathered": 2 * payload, "halo": 0, "other": 2}


def test_a_window_sends_its_keys_and_values_to_the_neighbour(found: list[dict]) -> None:
    """16 positions of k and v (4 numbers each) and a mark, for 2 heads; their gradients go back."""
    keys, gradients = 16 * 2 * (4 + 4 + 1) * 4, 16 * 2 * (4 + 4) * 4
    for rank, what in enumerate(found):
        for length in (1 << 12, 1 << 18):
            sent = what["sent"][f"{length} True 16"]
            assert sent["halo"] == keys * (rank < WORLD - 1) + gradients * (rank > 0)
            assert sent["gathers"] == 2


def test_exact_attention_sends_slices_to_single_ranks_and_gathers_no_keys(found: list[dict]) -> None:
    """16 positions of k and v (4 numbers each), for 2 heads: there forward and backward, and the gradients home."""
    size = 16 * 2 * (4 + 4) * 4
    for rank, what in enumerate(found):
        # Gathered: which of 16 keys are padding, and a byte each whether any number is not finite.
        sent = {"gathers": 0, "gathered": 0, "other": 16 + 2}
        behind = WORLD - 1 - rank  # the ranks that see its keys; those before it get gradients
        assert what["sent"]["exact True"] == {**sent, "halo": (2 * behind + rank) * size}
        assert what["sent"]["exact False"] == {**sent, "halo": 3 * (WORLD - 1) * size}
