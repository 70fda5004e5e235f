"""Empty inputs and arguments that cannot be: the same for function, module, tiles, prefill and decode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import FavorAttention, decode, exact_attention, favor_attention, prefill, prefill_exact
from longseq.attention.call import Call
from longseq.attention.carried import carried_attention

HEADS, LENGTH, DIM = 2, 5, 8


def tile(*qkv: Tensor, **options: object) -> Tensor:
    return carried_attention(*qkv, (), Call.of(**options))[0]


def causal(*qkv: Tensor, **options: object) -> Tensor:
    return favor_attention(*qkv, causal=True, **options)


def prompt(*qkv: Tensor, **options: object) -> Tensor:
    return prefill(*qkv, **options)[0]


WAYS = [favor_attention, causal, tile, prompt]
ways = pytest.mark.parametrize("way", WAYS)
Way = Callable[..., Tensor]


def inputs(batch: int = 1, heads: int = HEADS, length: int = LENGTH, value_dim: int = DIM) -> list[Tensor]:
    return [torch.randn(batch, heads, length, dim, requires_grad=True) for dim in (DIM, DIM, value_dim)]


@ways
@pytest.mark.parametrize("name", ["q", "k", "v", "decay"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_real_numbers_are_refused_by_name(way: Way, name: str, dtype: torch.dtype) -> None:
    given = dict(zip("qkv", inputs(), strict=True)) | {"decay": torch.ones(HEADS)}
    given[name] = given[name].detach().to(dtype)
    with pytest.raises(TypeError, match=f"^{name} must be a tensor of float16, bfloat16, float32, float64; got "):
        way(given["q"], given["k"], given["v"], decay=given["decay"])


@ways
@pytest.mark.parametrize("name", ["features", "window", "seed", "layer", "draw"])
@pytest.mark.parametrize(
    ("number", "error"), [(-1, ValueError), (2**63, ValueError), (1.0, TypeError), (1j, TypeError)]
)
def test_numbers_that_are_not_sizes_are_refused_by_name(way: Way, name: str, number: object, error: type) -> None:
    with pytest.raises(error, match=f"^{name} must be an integer"):
        way(*inputs(), **{name: number})


@pytest.mark.parametrize("name", ["dim", "heads", "features", "window", "seed", "layer"])
@pytest.mark.parametrize(("number", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_module_refuses_them_when_it_is_made(name: str, number: object, error: type) -> None:
    with pytest.raises(error, match=f"^{name} must be an integer"):
        FavorAttention(**{"dim": 16, "heads": 2, name: number})


def test_a_module_takes_numpys_integers_and_refuses_integer_inputs() -> None:
    layer = FavorAttention(16, 2, seed=torch.tensor(3), causal=True)
    with pytest.raises(TypeError, match=r"^x must be a tensor"):
        layer(torch.ones(1, 4, 16, dtype=torch.int64))


@ways
def test_a_share_of_what_lies_beyond_needs_a_window(way: Way) -> None:
    with pytest.raises(ValueError, match="far_share weighs the keys beyond a window"):
        way(*inputs(), far_share=torch.zeros(HEADS))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_decoding_refuses_integers(name: str) -> None:
    _, state = prefill(*inputs())
    given = dict(zip("qkv", inputs(length=1), strict=True))
    given[name] = given[name].detach().long()
    with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
        decode(*given.values(), state)


SIZES = [(0, 2, 5, 8), (2, 0, 5, 8), (1, 2, 0, 8), (1, 2, 5, 0), (0, 0, 0, 8)]
sizes = pytest.mark.parametrize(("batch", "heads", "length", "value_dim"), SIZES)


@sizes
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3, "features": 0}])
@pytest.mark.parametrize("more", [False, True])
def test_nothing_gives_nothing_and_gradients_of_zero_as_sdpa_does(
    batch: int, heads: int, length: int, value_dim: int, backend: str, options: dict, more: bool
) -> None:
    qkv = inputs(batch, heads, length, value_dim)
    given: dict[str, Tensor] = {}
    if more:
        given = {"decay": torch.ones(heads, requires_grad=True)}
        if "window" in options:
            given["far_share"] = torch.zeros(heads, requires_grad=True)
        masks = {"key_padding": torch.ones(batch, length).bool(), "segments": torch.zeros(batch, length).long()}
    out = favor_attention(*qkv, **options, **given, **(masks if more else {}), backend=backend)
    assert out.shape == F.scaled_dot_product_attention(*qkv).shape
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (*qkv, *given.values()))
    exact_attention(*qkv, causal=options.get("causal", False)).sum().backward()


def test_queries_without_keys_get_zeros_and_gradients() -> None:
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for length in (5, 0, 0))
    out = favor_attention(q, k, v)
    out.sum().backward()
    assert not out.any()
    assert all(not x.grad.any() for x in (q, k, v))


@sizes
@pytest.mark.parametrize("read", [prefill, prefill_exact])
def test_an_empty_prompt_can_be_continued(
    batch: int, heads: int, length: int, value_dim: int, read: Callable[..., tuple]
) -> None:
    out, state = read(*inputs(batch, heads, length, value_dim), key_padding=torch.ones(batch, length).bool())
    assert out.shape == (batch, heads, length, value_dim)
    after, state = decode(*inputs(batch, heads, 2, value_dim), state)
    assert after.shape == (batch, heads, 2, value_dim)
    assert state.select(torch.arange(batch)).shape == state.shape
