"""Small models that benchmarks train on tasks of their own: one way to make them, and one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec


class Sizes(Protocol):
    """What a request says of its model."""

    @property
    def dim(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def heads(self) -> int: ...


def spec_of(sizes: Sizes, vocabulary: int, seed: int, **options: Any) -> PerformerSpec:
    """A causal model; options: of attention, and others of the spec."""
    size: dict[str, Any] = {"dim": sizes.dim, "depth": sizes.depth, "heads": sizes.heads, "ffn_dim": 4 * sizes.dim}
    return PerformerSpec(vocabulary=vocabulary, causal=True, seed=seed, **size, **options)


def train(
    model: PerformerLM,
    optimizer: torch.optim.Optimizer,
    steps: int,
    rate: Callable[[int], float],
    loss_of: Callable[[int], Tensor],
    enough: Callable[[int, Tensor], bool],
) -> int:
    """At most ``steps`` steps with gradients of norm 1 at most; how many were made.

    Args:
        rate, loss_of: of a step, from 1 on.
        enough: is told each step and its loss, and says whether it was the last.
    """
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if enough(step, loss):
            return step
    return steps
