"""Documents packed into one row: as if each were alone."""

from __future__ import annotations

import pytest
import torch
from tests.longseq.attention.cases import BATCH, FEATURES, HEADS, POSITIVE, SIGNED, assert_equals_reference, inputs
from torch import Tensor

from longseq.attention import exact_attention, favor_attention
from longseq.attention.backends.native import build

directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])

# Borders on, before and after those of chunks (64) and groups of chunks (256); documents of one position.
LENGTHS = [1, 62, 1, 64, 1, 127, 3, 300, 40]


def documents() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand(BATCH, -1)


@directions
@pytest.mark.parametrize("reach", [0, 5, 64, 200])
def test_packed_documents_equal_each_document_alone(causal, reach):
    q, k, v = inputs(sum(LENGTHS))
    options = {"causal": causal, "window": reach, "features": FEATURES}
    packed = favor_attention(q, k, v, segments=documents(), **options)
    direction = torch.randn_like(packed)
    gradients = torch.autograd.grad(packed, (q, k, v), direction)
    start = 0
    for length in LENGTHS:
        at = slice(start, start + length)
        alone = [t.detach()[:, :, at].requires_grad_() for t in (q, k, v)]
        out = favor_attention(*alone, **options)
        torch.testing.assert_close(packed[:, :, at], out, rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(out, alone, direction[:, :, at])
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got[:, :, at], want, rtol=1e-4, atol=1e-5)
        start += length


@directions
@pytest.mark.parametrize("kernel", POSITIVE)
def test_every_positive_kernel_equals_the_reference(causal, kernel):
    segments = torch.tensor([[4] * 60 + [9] * 70 + [4] * 3, [0] * 1 + [1] * 131 + [0] * 1])
    assert_equals_reference(*inputs(133), kernel=kernel, causal=causal, segments=segments)


@directions
@pytest.mark.parametrize("reach", [0, 20])
def test_documents_padding_decay_and_share_together_equal_the_reference(causal, reach):
    segments = torch.tensor([[4] * 60 + [9] * 70 + [4] * 3, [0] * 1 + [1] * 131 + [0] * 1])
    keep = torch.rand(BATCH, 133, generator=torch.Generator().manual_seed(0)) > 0.2
    options = {"far_share": torch.tensor([-1.0, 0.0, 0.5]) if reach else None, "decay": torch.tensor([0.1, 0.0, 0.01])}
    assert_equals_reference(*inputs(133), causal=causal, window=reach, segments=segments, key_padding=keep, **options)


@directions
def test_nothing_of_one_document_reaches_another_to_the_last_bit(causal):
    q, k, v = inputs(300)
    segments = torch.cat((torch.zeros(100), torch.ones(130), torch.zeros(70))).long().expand(BATCH, -1)
    out = favor_attention(q, k, v, causal=causal, features=FEATURES, segments=segments)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, :, 100:230] *= 1e4
    changed_v[:, :, 100:230] = 1e6
    changed = favor_attention(q, changed_k, changed_v, causal=causal, features=FEATURES, segments=segments)
    for at in (slice(0, 100), slice(230, 300)):
        assert torch.equal(out[:, :, at], changed[:, :, at])


@directions
@pytest.mark.parametrize("reach", [0, 30])
def test_what_stands_in_padding_never_matters_not_even_nan(causal, reach):
    q, k, v = (t.detach() for t in inputs(200))
    keep = torch.ones(BATCH, 200, dtype=torch.bool)
    keep[0, 50:90], keep[1, 150:] = False, False
    options = {"causal": causal, "window": reach, "key_padding": keep, "features": FEATURES}
    out = favor_attention(q, k, v, **options)
    hidden = ~keep[:, None, :, None]
    q, k, v = (t.requires_grad_() for t in (q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)))
    poisoned = favor_attention(q, k, v, **options)
    assert torch.equal(out, poisoned)
    poisoned.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert all(torch.all(t.grad.masked_select(hidden) == 0) for t in (k, v))


def test_cu_seqlens_are_the_borders_of_the_documents():
    q, k, v = (t.detach()[:1] for t in inputs(sum(LENGTHS)))
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    by_borders = favor_attention(q, k, v, causal=True, features=FEATURES, cu_seqlens=borders.int())
    by_segments = favor_attention(q, k, v, causal=True, features=FEATURES, segments=documents()[:1])
    assert torch.equal(by_borders, by_segments)


@directions
def test_exact_attention_keeps_to_documents_too(causal):
    q, k, v = (t.detach() for t in inputs(sum(LENGTHS)))
    exact = exact_attention(q, k, v, causal=causal, segments=documents())
    near = favor_attention(q, k, v, causal=causal, segments=documents(), window=sum(LENGTHS), features=FEATURES)
    torch.testing.assert_close(exact, near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"segments": torch.zeros(BATCH, 4, dtype=torch.long)}, r"segments must be integers of shape \(2, 5\)"),
        ({"segments": torch.zeros(BATCH, 5)}, "segments must be integers"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "a batch of one"),
        ({"cu_seqlens": torch.tensor([0, 5]), "segments": torch.zeros(BATCH, 5, dtype=torch.long)}, "not both"),
    ],
)
def test_documents_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        favor_attention(*inputs(5), **change)


@pytest.mark.parametrize("borders", [[0, 4], [1, 5], [0, 4, 3, 5], [[0, 5]]])
def test_borders_that_do_not_fit_are_refused(borders):
    q, k, v = (t[:1] for t in inputs(5))
    with pytest.raises(ValueError, match="cu_seqlens must be integers that rise from 0 to the length 5"):
        favor_attention(q, k, v, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize("kernel", SIGNED)
@pytest.mark.parametrize("option", ["segments", "decay"])
def test_signed_kernels_refuse_what_needs_two_denominators(kernel, option):
    given = {"segments": torch.zeros(BATCH, 5, dtype=torch.long), "decay": torch.zeros(HEADS)}[option]
    with pytest.raises(ValueError, match="both signs"):
        favor_attention(*inputs(5), kernel=kernel, features=FEATURES, **{option: given})


@pytest.mark.parametrize("kernel", SIGNED)
def test_signed_kernels_keep_to_documents_when_causal(kernel):
    segments = torch.tensor([[4] * 60 + [9] * 73, [0] * 1 + [1] * 132])
    q, k, v = inputs(133, 0.1, common=0.5)
    assert_equals_reference(q, k, v, tolerance=1e-4, kernel=kernel, causal=True, segments=segments)


LONG = 16_384
ROWS_OF_LONG = {
    "one document": {},
    "documents of 32": {"segments": (torch.arange(LONG) // 32)[None]},
    "a window, documents of 64": {"segments": (torch.arange(LONG) // 64)[None], "window": 16},
}


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("rows", ROWS_OF_LONG)
def test_the_gradient_of_a_decay_keeps_its_digits_in_long_rows(rows, backend):
    if backend == "native" and build.unavailable():
        pytest.skip("there is no compiler here")
    rng = torch.Generator().manual_seed(0)
    qkv_and_direction = [torch.randn(1, 2, LONG, 16, generator=rng, dtype=torch.float64) for _ in range(4)]

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        *qkv, direction = (x.to(dtype) for x in qkv_and_direction)
        decay = torch.tensor([0.02, 0.002], dtype=dtype, requires_grad=True)
        options = {"causal": True, "features": 32, "decay": decay, **ROWS_OF_LONG[rows]}
        out = favor_attention(*qkv, backend=backend, **options)
        return torch.autograd.grad(out, decay, direction)[0].double()

    exact = gradient(torch.float64, "torch")
    error = (gradient(torch.float32, backend) - exact).abs() / exact.abs()
    assert error.max() < 1e-4  # counted from the row's start it was 1e-3
