"""Scans that begin with a state and hand one on: what ranks, each with a slice, are joined by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState

N, LENGTH, CUT, HEAD_DIM, VALUE_DIM, FEATURES = 2, 150, 70, 8, 6, 20
ENGINES = ("Torch", "Native", "Triton")


def rows(delay: int, kinds: str) -> Rows:
    rng = torch.Generator().manual_seed(delay)
    q, k, v = (torch.randn(N, LENGTH + delay, size, generator=rng) for size in (HEAD_DIM, HEAD_DIM, VALUE_DIM))
    decay = torch.tensor([0.01, 0.1]).view(N, 1, 1) if "decay" in kinds else None
    hidden = torch.rand(N, LENGTH + delay, generator=rng) < 0.2 if "hidden" in kinds else None
    runs = (torch.arange(LENGTH + delay) >= 30).long().expand(N, -1) if "runs" in kinds else None
    return Rows(q, k, v, decay, hidden, runs, feature_map("softmax", FEATURES, HEAD_DIM), delay)


def part(of: Rows, start: int, stop: int) -> Rows:
    where = slice(start, stop + of.delay)
    hidden, runs = (None if x is None else x[:, where] for x in (of.hidden, of.runs))
    runs = None if runs is None else runs - runs[:, :1]
    return Rows(of.q[:, where], of.k[:, where], of.v[:, where], of.decay, hidden, runs, of.feature_map, of.delay)


def state_of(engine: backends.Backend, of: Rows) -> AttentionState:
    """The keys before CUT, of the document that goes on there, as a scan begins with them."""
    weight = torch.zeros(N, CUT, 1)
    if of.decay is not None:
        weight = weight - of.decay * (torch.arange(CUT, 0, -1)[:, None] - of.delay)
    for out in (of.hidden, None if of.runs is None else of.runs != of.runs[:, CUT : CUT + 1]):
        weight = weight if out is None else weight.masked_fill(out[:, :CUT, None], -torch.inf)
    return engine.sum_up(of.k[:, :CUT], of.v[:, :CUT], None, weight, of.feature_map)


# Triton's kernels are interpreted here, which takes seconds.
KINDS = [(0, ""), (0, "runs"), (5, "decay hidden"), (5, "decay hidden runs")]
CASES = [*((name, *kinds) for name in ENGINES[:2] for kinds in KINDS), ("Triton", *KINDS[-1])]


@pytest.mark.parametrize(("name", "delay", "kinds"), CASES)
def test_a_scan_cut_in_two_is_the_whole(name: str, delay: int, kinds: str) -> None:
    engine, whole = getattr(backends, name)(), rows(delay, kinds)
    first, second = part(whole, 0, CUT), part(whole, CUT, LENGTH)
    scanned = engine.scan_forward(whole, None, True)
    begun = engine.scan_forward(first, None, True)
    gone_on = engine.scan_forward(second, state_of(engine, whole), True)
    assert_close(gone_on.out[:, delay:], scanned.out[:, CUT + delay :])
    assert_close(gone_on.lse[:, delay:], scanned.lse[:, CUT + delay :])
    assert_close(gone_on.log_scale, scanned.log_scale)

    dout = torch.randn(scanned.out.shape, generator=torch.Generator().manual_seed(1))
    dout[:, :delay] = 0  # queries beside the sequence
    dlse = dout.sum(-1, keepdim=True)
    wants = whole.decay is not None
    grads = engine.scan_backward(whole, scanned.out, scanned.inverse_den, scanned.kept, dout, dlse, None, wants)
    d_second, l_second = dout[:, CUT:].clone(), dlse[:, CUT:].clone()
    d_second[:, :delay] = l_second[:, :delay] = 0  # the first part's
    back = engine.scan_backward(second, gone_on.out, gone_on.inverse_den, gone_on.kept, d_second, l_second, None, wants)
    state = state_of(engine, whole)
    faded = state.log_scale if whole.decay is None else state.log_scale - whole.decay * delay
    later = back.initial * torch.exp(begun.log_scale - faded)
    d_first, l_first = dout[:, : CUT + delay], dlse[:, : CUT + delay]
    front = engine.scan_backward(first, begun.out, begun.inverse_den, begun.kept, d_first, l_first, later, wants)
    for mine, theirs, all_ in ((front.q, back.q, grads.q), (front.k, back.k, grads.k), (front.v, back.v, grads.v)):
        total = torch.zeros_like(all_)
        total[:, : CUT + delay] += mine
        total[:, CUT:] += theirs
        assert_close(total, all_)
    if wants:
        assert_close(front.decay + back.decay, grads.decay)


@pytest.mark.parametrize("name", ENGINES[1:])
def test_sums_with_weights_of_their_own_are_those_of_pytorch(name: str) -> None:
    """What is left out may be anything."""
    engine, of = getattr(backends, name)(), rows(0, "")
    last = torch.randn(N, LENGTH, 1, generator=torch.Generator().manual_seed(2))
    weight = torch.linspace(-3, 2, LENGTH)[None, :, None].repeat(N, 1, 1)
    weight[:, ::7] = -torch.inf
    last[:, ::7] = torch.nan
    ours = engine.sum_up(of.k, of.v, last, weight, of.feature_map)
    plain = backends.Torch().sum_up(of.k, of.v, last, weight, of.feature_map)
    assert_close(ours.sums * torch.exp(ours.log_scale), plain.sums * torch.exp(plain.log_scale))


def assert_close(ours: Tensor, other: Tensor) -> None:
    assert ((ours - other).abs().max() / other.abs().max()).item() < 1e-5
