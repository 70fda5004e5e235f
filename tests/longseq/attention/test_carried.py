"""A sequence in tiles, each with the state that the one before has left, against the sequence as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longseq.attention import favor_attention
from longseq.attention.call import Call
from longseq.attention.carried import State, carried_attention

LENGTH, HEADS = 53, 2


def tiled(q: Tensor, k: Tensor, v: Tensor, tile: int, wide: bool = False, **options: object) -> Tensor:
    state: State = ()
    parts = []
    for start in range(0, q.shape[2], tile):
        own = (x[:, :, start : start + tile] for x in (q, k, v))
        out, state = carried_attention(*own, state, Call.of(**options), wide=wide)
        parts.append(out)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(("tile", "window"), [(20, 0), (9, 9), (26, 7), (52, 7), (LENGTH, 60)])
def test_tiles_give_the_outputs_and_gradients_of_the_whole(tile: int, window: int) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, LENGTH, 8, generator=rng, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    decay = torch.tensor([0.02, 0.3], dtype=torch.float64, requires_grad=True)
    share = torch.tensor([-0.5, 0.2], dtype=torch.float64, requires_grad=True)
    options = {"features": 12, "window": window, "decay": decay, "far_share": share if window else None}
    learned = [q, k, v, decay, *([share] if 0 < window < LENGTH else [])]
    wanted = favor_attention(q, k, v, causal=True, **options)
    found = tiled(q, k, v, tile, **options)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(wanted.shape, generator=rng, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), learned) for out in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_a_tile_that_does_not_fill_the_window_must_be_the_last() -> None:
    q, k, v = (torch.randn(1, HEADS, LENGTH, 8) for _ in "qkv")
    with pytest.raises(ValueError, match=r"a tile of 10 positions is shorter than window=11"):
        tiled(q, k, v, 10, window=11)


@pytest.mark.parametrize(("tile", "window"), [(20, 0), (9, 9), (26, 7), (52, 7)])
def test_wide_tiles_give_the_whole(tile: int, window: int) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, LENGTH, 8, generator=rng) for _ in "qkv")
    options = {"features": 12, "window": window, "decay": torch.tensor([0.02, 0.3])}
    wanted = favor_attention(*(x.double() for x in (q, k, v)), causal=True, **options)
    torch.testing.assert_close(tiled(q, k, v, tile, wide=True, **options).double(), wanted, rtol=1e-5, atol=1e-5)


def test_wide_sums_do_not_lose_keys_however_many_there_were() -> None:
    """512 tiles of one and the same key: fp32 sums round at every tile, and here to the same side."""
    q, k, v = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3, 2), 0.3), torch.full((1, 1, 3, 2), 0.7)
    call, errors = Call.of(features=2, backend="torch"), {}
    for wide in (False, True):
        (_, one), state = carried_attention(q, k, v, (), call, wide=wide), ()
        for _ in range(2**9):
            _, state = carried_attention(q, k, v, state, call, wide=wide)
        exact = one[0].double() * 2**9
        errors[wide] = float(((state[0].double() - exact) / exact).abs().max())
    assert errors[True] < 1e-12
    assert errors[False] > 1e-6


def test_a_state_keeps_no_more_of_a_tile_than_its_window() -> None:
    q, k, v = (torch.randn(1, HEADS, LENGTH, 8) for _ in "qkv")
    _, state = carried_attention(q, k, v, (), Call.of(features=12, window=5))
    assert [x.untyped_storage().nbytes() for x in state] == [x.nbytes for x in state]
    assert state[-1].shape == (HEADS, 5, 8)
