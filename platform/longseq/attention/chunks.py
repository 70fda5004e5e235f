"""Chunks (G, N, C, ·) of a scan's rows: their log-scales, products and places, for :mod:`longseq.attention.scan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longseq.attention.state import NOTHING

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class _Scales:
    """Every exponential of log-scales that a group needs; c' is c after the chunk's own keys."""

    row_scale: Tensor  # M (G, N, C, 1)
    weights: Tensor  # exp(b_j − M_i), 0 where i does not see j: (G, N, C, C)
    carried: Tensor  # exp(c − M_i), 0 where the state is another document's: (G, N, C, 1)
    entering: Tensor  # exp(b_j − c'), 0 for keys of a document that has ended: (G, N, C, 1)
    left: Tensor  # exp(c − c'), 0 where the state's document has ended: (G, N, 1, 1)
    after: Tensor  # c behind the last chunk, counted from there: (N, 1, 1)


@dataclass(frozen=True)
class Group:
    """Some chunks of queries and the keys ``delay`` positions before them; G chunks of C positions."""

    q: Tensor  # (G, N, C, d)
    k: Tensor  # (G, N, C, d), zeros where there is no key or a hidden one
    fk: Tensor  # (G, N, C, m)
    scale: Tensor  # b (G, N, C, 1), −inf where k is zeroed; a decay included
    values: Tensor  # ṽ (G, N, C, e + 1)
    q_runs: Tensor | None  # (G, N, C, 1)
    k_runs: Tensor | None
    runs_before: Tensor | None  # the document of the last key before each chunk: (G, N, 1, 1)
    offsets: Tensor | None  # what a decay takes from the log of a query's weights, γ(i − start + delay): (·, N, C, 1)
    fading: Tensor | None  # what it takes from a state's log-scale from chunk to chunk, negative: (G, N, 1, 1)
    seen: Tensor  # (C, C) bool, j ≤ i

    def scales(self, before: Tensor) -> _Scales:
        """Every exponential of log-scales, given the state's log-scale c before the group, from the group's start."""
        scale = self.scale
        if self.q_runs is None or self.k_runs is None or self.runs_before is None:
            so_far = scale.cummax(2).values
            c, after, behind = _through(so_far[:, :, -1:], None, before, self.fading)
            row_scale = torch.maximum(so_far, c)
            # exp2 is several times quicker than exp; the infinity that a later key may give is cut off, not multiplied.
            weights = torch.sub(scale.mT * _LOG2E, row_scale * _LOG2E).exp2_().tril_()
            return _Scales(
                row_scale, weights, torch.exp(c - row_scale), torch.exp(scale - after), torch.exp(c - after), behind
            )
        visible = scale.mT.masked_fill(~(self.seen & (self.q_runs == self.k_runs.mT)), -torch.inf)
        reads, last = self.q_runs == self.runs_before, self.k_runs[:, :, -1:]
        scale = scale.masked_fill(self.k_runs != last, -torch.inf)  # what the state takes in
        goes_on = self.runs_before == last
        c, after, behind = _through(scale.amax(2, keepdim=True), goes_on, before, self.fading)
        row_scale = torch.maximum(visible.amax(-1, keepdim=True), torch.where(reads, c, NOTHING))
        carried = torch.exp(c - row_scale).masked_fill_(~reads, 0.0)
        left = torch.exp(c - after).masked_fill_(~goes_on, 0.0)
        return _Scales(row_scale, visible.sub_(row_scale).exp_(), carried, torch.exp(scale - after), left, behind)


def _through(
    top: Tensor, goes_on: Tensor | None, before: Tensor, fading: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state's log-scale before and after each chunk (G, N, 1, 1), and behind the last, counted from there.

    top: the largest log-scale among each chunk's keys that enter the state; goes_on: whether what the state held
    stays in it, or None if it always does.
    """
    befores, afters = [], []
    for index, chunk_top in enumerate(top):
        befores.append(before)
        held = before if goes_on is None else torch.where(goes_on[index], before, NOTHING)
        afters.append(torch.maximum(chunk_top, held))
        before = afters[-1] if fading is None else afters[-1] + fading[index]
    return torch.stack(befores), torch.stack(afters), before


def products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for stacks (G, N, ·, ·) of matrices."""
    made: Tensor = torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return made


def add_products(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """to += a @ b, in place."""
    to.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return to


def put(target: Tensor, start: int, stop: int, x: Tensor) -> None:
    """Write chunks x (G, N, C, ·) to positions start…stop of target (N, L, ·), less what lies before the first."""
    if stop > 0:
        target[:, max(start, 0) : stop] = in_a_row(x)[:, max(-start, 0) :]


def in_a_row(x: Tensor) -> Tensor:
    """Chunks x (G, N, C, ·) as positions (N, G · C, ·)."""
    return x.transpose(0, 1).flatten(1, 2)


def flow(sums: Tensor, later: Tensor) -> Tensor:
    """Σ of the gradients of the log-weights that pass through a state (N, m, e + 1), given R: (N, 1, 1) float64."""
    return (sums * later).sum((1, 2), keepdim=True, dtype=torch.float64)


def moment(grad: Tensor, first: int) -> Tensor:
    """Σ position · gradient of the log-weight (G, N, C, 1), ``first`` at each chunk's start: (N, 1, 1) float64."""
    positions = torch.arange(first, first + grad.shape[2], device=grad.device, dtype=torch.float64)[:, None]
    return (grad.double() * positions).sum((0, 2))[..., None]
