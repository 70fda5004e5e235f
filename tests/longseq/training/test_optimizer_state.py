"""Adam's count of steps, wherever an implementation keeps it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longseq.training.optimizer_state import _state_of, optimizer_step, set_optimizer_step


@pytest.mark.parametrize(
    ("counts", "steps"),
    [
        ([], 0),
        ([torch.tensor(7.0), torch.tensor(7.0)], 7),  # torch
        ([0, 0, 7, 0, 7], 7),  # DeepSpeed's FusedAdam: two groups, of three tensors and of two
    ],
)
def test_the_steps_are_counted_where_the_count_is_kept(counts, steps):
    holder = SimpleNamespace(base=SimpleNamespace(state={n: {"step": count} for n, count in enumerate(counts)}))
    assert optimizer_step(holder) == steps
    set_optimizer_step(holder, 9)
    assert all(int(state["step"]) == 9 for state in holder.base.state.values())


def test_a_fused_optimiser_that_is_restored_counts_steps_where_its_weights_are():
    """On a GPU its kernel reads the count there."""
    weight = nn.Parameter(torch.empty(3, device="meta"))
    state = _state_of(torch.optim.AdamW([weight]), weight)
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert state["step"].shape == ()
