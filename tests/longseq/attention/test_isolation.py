"""NaN and Inf reach what sees them, and nothing else: forward and backward, every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longseq.attention import exact_attention, favor_attention
from longseq.attention.call import Call
from longseq.attention.carried import State, carried_attention

HEADS, LENGTH, DIM, FEATURES = 2, 150, 8, 12
BORDERS = (0, 40, 101, LENGTH)
AT = 60  # in the second of three documents
OPTIONS = [
    {},
    {"window": 9},
    {"window": 9, "features": 0},
    {"kernel": "relu"},
    {"kernel": "relu", "window": 9},
    {"exact": True},
]
TILES = [{"tile": 40}, {"tile": 40, "window": 9}, {"tile": 40, "window": 9, "features": 0}]  # causal, one document
options_ = pytest.mark.parametrize("options", OPTIONS, ids=str)
tiles_too = pytest.mark.parametrize("options", [*OPTIONS, *TILES], ids=str)
backends = pytest.mark.parametrize("backend", ["torch", "native"])
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
places = pytest.mark.parametrize("where", [0, 1, 2], ids=["q", "k", "v"])
numbers = pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, LENGTH, DIM, generator=rng) for _ in "qkv"]


def attention(*qkv: Tensor, exact: bool = False, tile: int = 0, **options: object) -> Tensor:
    if exact:
        del options["backend"]
        return exact_attention(*qkv, **options)
    options = {"features": FEATURES, **options}
    if not tile:
        return favor_attention(*qkv, **options)
    assert options.pop("causal")
    state: State = ()
    outs = []
    for start in range(0, LENGTH, tile):
        out, state = carried_attention(*(x[:, :, start : start + tile] for x in qkv), state, Call.of(**options))
        outs.append(out)
    return torch.cat(outs, dim=2)


def attended(qkv: list[Tensor], until: int, **options: object) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of a loss of the positions before ``until`` and after the second document."""
    x = [t.clone().requires_grad_() for t in qkv]
    out = attention(*x, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    weights[:, :, until : BORDERS[2]] = 0.0
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), x))


@backends
@directions
@options_
@places
@numbers
def test_other_documents_and_earlier_positions_are_as_without_it(backend, causal, options, where, number):
    segments = documents()
    clean = inputs()
    bad = [x.clone() for x in clean]
    bad[where][0, 1, AT, 3] = number
    until = AT if causal else BORDERS[1]
    options = {**options, "causal": causal, "backend": backend, "segments": segments}
    expected, wanted = attended(clean, until, **options)
    out, grads = attended(bad, until, **options)
    touched = torch.zeros(2, HEADS, LENGTH, dtype=torch.bool)
    touched[0, 1, AT if causal else BORDERS[1] : BORDERS[2]] = True
    assert not out[0, 1, AT].isfinite().all()
    torch.testing.assert_close(out[~touched], expected[~touched], rtol=0, atol=0)
    for found, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found[~touched], right[~touched], rtol=0, atol=0)


def documents() -> Tensor:
    return torch.bucketize(torch.arange(LENGTH), torch.tensor(BORDERS[1:-1]), right=True).expand(2, -1)


@backends
@tiles_too
@places
def test_earlier_positions_of_one_document_are_as_without_it(backend, options, where):
    clean = inputs()
    bad = [x.clone() for x in clean]
    bad[where][0, 1, AT, 3] = torch.nan

    def result(qkv: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = [t.clone().requires_grad_() for t in qkv]
        out = attention(*x, **options, causal=True, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        weights[0, 1, AT:] = 0.0
        return out.detach(), list(torch.autograd.grad((out * weights).sum(), x))

    (expected, wanted), (out, grads) = result(clean), result(bad)
    reach = options.get("window", 0) if options.get("features") == 0 else LENGTH
    last = AT + (reach if where else 1)  # a query's own NaN is nobody else's
    assert torch.equal(out[0, 1].isnan().any(-1), (torch.arange(LENGTH) >= AT) & (torch.arange(LENGTH) < last))
    out[0, 1, AT:], expected[0, 1, AT:] = 0.0, 0.0
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for found, right in zip(grads, wanted, strict=True):
        found, right = (x.index_fill(2, torch.arange(AT, LENGTH), 0.0) for x in (found, right))
        torch.testing.assert_close(found, right, rtol=0, atol=0)


@backends
@pytest.mark.parametrize(
    ("options", "causal", "packed"),
    [(options, causal, True) for options in OPTIONS for causal in (True, False)]
    + [(options, True, False) for options in TILES],
    ids=str,
)
def test_a_gradient_that_is_nan_reaches_what_its_query_saw(backend, options, causal, packed):
    """As NaN, and nothing else; the loss itself was finite."""
    segments = {"segments": documents()} if packed else {}
    reach = options.get("window", 0) if options.get("features") == 0 else LENGTH
    found = []
    for bad in (False, True):
        x = [t.clone().requires_grad_() for t in inputs()]
        out = attention(*x, **options, **segments, causal=causal, backend=backend)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradient[0, 1, AT] = torch.nan if bad else 0.0
        found.append(torch.autograd.grad(out, x, gradient))
    at = torch.arange(LENGTH)
    seen = (at - AT).abs() < reach
    if causal:
        seen &= at <= AT
    if packed:
        seen &= (at >= BORDERS[1]) & (at < BORDERS[2])
    for name, right, wrong in zip("qkv", *found, strict=True):
        touched = torch.zeros(2, HEADS, LENGTH, dtype=torch.bool)
        touched[0, 1] = at == AT if name == "q" else seen
        assert torch.equal(wrong.isnan().any(-1), touched), name
        torch.testing.assert_close(wrong[~touched], right[~touched], rtol=0, atol=0)


@backends
@directions
@options_
def test_padding_may_hold_anything(backend, causal, options):
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[0, 30:50] = keep[1, 100:] = False
    clean = inputs()
    bad = [x.masked_fill(~keep[:, None, :, None], torch.nan) for x in clean]

    def result(qkv: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = [t.clone().requires_grad_() for t in qkv]
        out = attention(*x, **options, causal=causal, backend=backend, key_padding=keep).transpose(1, 2)[keep]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out.detach(), list(torch.autograd.grad((out * weights).sum(), x))

    (expected, wanted), (out, grads) = result(clean), result(bad)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for found, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.transpose(1, 2)[keep], right.transpose(1, 2)[keep], rtol=0, atol=0)


@backends
@directions
def test_a_nan_that_counts_in_the_loss_reaches_the_gradients_of_what_was_seen(backend, causal):
    q, k, v = (x.requires_grad_() for x in inputs())
    bad = v.detach().clone()
    bad[0, 1, AT] = torch.nan
    favor_attention(q, k, bad, features=FEATURES, causal=causal, backend=backend).sum().backward()
    assert q.grad[0, 1, AT:].isnan().all()
    assert k.grad[0, 1].isnan().all()
    assert q.grad[0, 0].isfinite().all()
    assert k.grad[1].isfinite().all()
    assert not causal or q.grad[0, 1, :AT].isfinite().all()
