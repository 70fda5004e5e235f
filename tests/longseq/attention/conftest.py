"""Every test of attention runs with fresh memory full of NaN: a result that was never written shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it, torch.empty gives NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
