"""The one door to attention: checks the request, picks the path and the backend."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import gates, near_and_far
from longseq.attention.arguments import dtypes
from longseq.attention.backends import choice as backends
from longseq.attention.call import Call, document_numbers, per_row
from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.context.halo import neighbourhood
from longseq.attention.context.parallel import relay
from longseq.attention.context.ring import Slices, ring_attention
from longseq.attention.context.whole import whole
from longseq.attention.heads import lay_out
from longseq.attention.isolation import Inputs, Sight, isolated
from longseq.attention.operations import bidirectional_attention, scan, window_attention
from longseq.attention.options import AttentionOptions, OprfA
from longseq.attention.parts import Part, combine
from longseq.attention.scan import Rows


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    kernel: str = "softmax",
    features: int = 256,
    window: int = 0,
    key_padding: Tensor | None = None,
    segments: Tensor | SlicedDocuments | None = None,
    cu_seqlens: Tensor | None = None,
    far_share: Tensor | None = None,
    decay: Tensor | None = None,
    gate: Tensor | None = None,
    seed: int = 0,
    layer: int = 0,
    draw: int = 0,
    projection: str = "orthogonal",
    oprf_a: OprfA = 0.0,
    backend: str = "auto",
    context: ContextGroup | None = None,
) -> Tensor:
    """FAVOR+ attention (Choromanski et al. 2020, arXiv 2009.14794), linear in the length.

    A stand-in for ``F.scaled_dot_product_attention``: ``kernel="softmax"`` approximates it, with an error that falls
    as ``features`` grows and grows steeply with the norms of q and k. With a ``window``, the weights of near keys are
    exact and only those beyond it are approximated, in one numerator and one denominator; ``window >= length`` is
    exact attention.

    Features, sums and denominators are computed in fp32 (float64 for float64 inputs) whatever the inputs' dtype, also
    under autocast; for bf16 and fp16 inputs the projection is rounded to their dtype, once, on all backends. Up to a
    standard deviation of about 4 of q and k (at head_dim 64) the result is that of the quadratic formula to 1e-5 …
    3e-5. Beyond, it stays finite and a weighted mean of the values, but fp32's range no longer holds every product of
    two features.

    Args:
        q, k: (batch, heads, length, head_dim). They are scaled by head_dim^-1/4 each.
        v: (batch, heads, length, value_dim).
        causal: a query sees the keys up to its own position, and is independent of later ones to the last bit.
        kernel: one of :data:`KERNELS`.
        features: number of random features, m. 0, with a window: nothing beyond it is seen.
        window: exact weights for keys less than this many positions away, before (causal) or on both sides.
        key_padding: (batch, length) bool, True where a key is real; False hides it from every query.
        segments: (batch, length) integers, documents packed into one row: a run of equal numbers is a document, and
            no attention crosses its borders.
        cu_seqlens: the same for a batch of one, as the documents' borders: (documents + 1,), from 0 to length.
        far_share: (heads,) log-factor of every weight beyond the window: 0 leaves them unbiased, negative trusts them
            less. May require a gradient.
        decay: (heads,) γ ≥ 0: every weight is multiplied by exp(−γ·distance), as a bias of −γ·distance on the
            logits would do (ALiBi, Press et al. 2021, arXiv 2108.12409). May require a gradient.
        gate: (batch, heads, length) log f ≤ 0, in the place of a decay: the weight of key j for query i is multiplied
            by Π f over the positions j + 1 … i between the two, or i + 1 … j for a later key (Lin et al. 2025, arXiv
            2503.02130). Counted as −100 and more. May require a gradient.
        seed, layer, draw: the projection matrix is a function of these three numbers.
        projection: "orthogonal" (blocks of orthogonal rows) or "iid".
        oprf_a: the constant A ≤ 0 of kernel "oprf" (see :func:`longseq.attention.oprf.oprf_parameter`); of "sderf" and
            "aderf" one a coordinate, for q and k as :class:`longseq.attention.frames.Frame` makes them.
        backend: "torch", "native" (CPU) or "triton" (CUDA), where what they cannot do is an error, or "auto": the
            latter where they can.
        context: the ranks that hold the sequences together: q, k, v, key_padding and segments are this rank's slices,
            equally long on all (pad the last one behind, with key_padding), and so is the result. All ranks call this,
            forward and backward. Gradients of far_share and decay are this rank's part of a sum over the ranks.
            ``segments`` may be what :meth:`ContextGroup.documents` made of them, to ask the other ranks only once.

    Returns:
        (batch, heads, length, value_dim), the dtype of v. A query that sees no key gets zeros.

    Raises:
        ValueError: for an unknown kernel or backend, shapes that do not fit together, or options that exclude each
            other.
    """
    options = AttentionOptions(kernel=kernel, features=features, window=window, projection=projection, backend=backend)
    call = Call(options, causal, seed, layer, draw, oprf_a, far_share, decay, gate)
    return attention(q, k, v, call, key_padding, segments, cu_seqlens, context)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    key_padding: Tensor | None = None,
    segments: Tensor | SlicedDocuments | None = None,
    cu_seqlens: Tensor | None = None,
    context: ContextGroup | None = None,
) -> Tensor:
    """:func:`favor_attention` or :func:`exact_attention`, with the options as one."""
    documents = segments if isinstance(segments, SlicedDocuments) else None
    given = segments.segments if isinstance(segments, SlicedDocuments) else segments
    segments = call.checked(q, k, v, key_padding, given, cu_seqlens)
    k = gates.marked(k, call.gate)
    if call.options.kind == "exact" and (call.gate is None or context is not None):
        return isolated(
            lambda inputs: _exact(inputs, call, key_padding, segments, context),
            (q, k, v),
            None if key_padding is None else ~key_padding[:, None],
            Sight(lambda: _whole_runs(segments, q.shape[1], context), call.causal, context=context),
        )
    backend, causal, (batch, heads) = call.options.backend, call.causal, q.shape[:2]
    with torch.autocast(q.device.type, enabled=False):
        rows = call.rows(q, k, v, key_padding, segments, fades=False)
        if not (q.shape[:3].numel() and k.shape[2] and v.shape[3]):
            backends.choose(backend, rows.phi, rows.qkv)
            return _nothing(q, k, v, call.far_share, call.decay, call.gate)
        if causal and context is None and near_and_far.takes(backend, rows):
            return near_and_far.near_and_far(rows, call, batch, v.dtype)
        rows = replace(rows, decay=near_and_far.rates_of_rows(call, batch, q, dtypes(q, k, v)[1]))
        if context is not None and segments is not None and documents is None:
            documents = context.documents(segments)
        share = per_row(call.far_share, batch, dtypes(q, k, v)[1])

        def attend(inputs: Inputs) -> Tensor:
            q, k, v = inputs
            here = replace(rows, q=q, k=k, v=v)
            if rows.phi and not (causal or rows.delay) and rows.runs is None and rows.fading is None:
                return bidirectional_attention(here, backend) if context is None else whole(backend, here, context)
            if context is not None:
                return _by_slices(backend, here, causal, share, context, documents)
            return _by_parts(backend, here, causal, share)

        sight = Sight(lambda: _whole_runs(segments, heads, context), causal, 0 if rows.phi else rows.delay, context)
        out = isolated(attend, rows.qkv, rows.hidden, sight)
    return lay_out(out, batch, heads, v.dtype)


def _nothing(q: Tensor, k: Tensor, v: Tensor, *per_head: Tensor | None) -> Tensor:
    """Zeros that hang on the inputs, whose gradients are zeros, as those of PyTorch's attention are."""
    none = sum((x[..., :0].sum() for x in (q, k, v, *per_head) if x is not None), q.new_zeros(()))
    return v.new_zeros(*q.shape[:3], v.shape[-1]) + none.to(v.dtype)


def _by_parts(backend: str, rows: Rows, causal: bool, share: Tensor | None) -> Tensor:
    """Near keys exactly, those before and those after by features; together they are all keys, each once."""
    near: list[Part] = []
    far: list[Part] = []
    length = rows.q.shape[1]
    window = min(rows.delay, length)
    if window:
        near.append(window_attention(rows, window, causal, backend))
    if rows.phi and window < length:
        far.append(scan(rows, backend))
        if not causal:
            # The keys after: a scan of the reversed row, without the query's own position if the first scan had it.
            out, lse = scan(replace(rows.reversed(), delay=max(1, window)), backend)
            far.append((out.flip(1), lse.flip(1)))
    return _together(near, far, share)


def _by_slices(
    backend: str, rows: Rows, causal: bool, share: Tensor | None, context: ContextGroup,
    documents: SlicedDocuments | None,
) -> Tensor:  # fmt: skip
    """The same for slices: near keys of the neighbours, too, and far ones as states of other ranks."""
    engine = backends.choose(backend, rows.phi, rows.qkv)
    length = rows.q.shape[1] * context.size
    window = min(rows.delay, length)
    right = 0 if causal else max(1, window)  # a query's own position is the first scan's
    around = neighbourhood(context, rows, documents, window, right)
    near: list[Part] = []
    far: list[Part] = []
    if rows.phi and window < length:
        ways = (False,) if causal else (False, True)
        far = [relay(engine, around, context, documents, reverse=reverse) for reverse in ways]
    if window:
        near.append(around.own(window_attention(around.rows, window, causal, backend)))
    return _together(near, far, share)


def _together(near: list[Part], far: list[Part], share: Tensor | None) -> Tensor:
    if near and share is not None:
        far = [(out, lse + share) for out, lse in far]
    return combine(near + far)[0]


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding: Tensor | None = None,
    segments: Tensor | SlicedDocuments | None = None,
    decay: Tensor | None = None,
    gate: Tensor | None = None,
    context: ContextGroup | None = None,
) -> Tensor:
    """Softmax attention by ``F.scaled_dot_product_attention``: arguments and result as of :func:`favor_attention`.

    With a ``gate`` it is a window as long as the row, whose scores exist for one block at a time. With a ``context``
    slices of keys and values go from rank to rank: :mod:`longseq.attention.context.ring`.
    """
    call = Call(AttentionOptions(kind="exact"), causal, decay=decay, gate=gate)
    return attention(q, k, v, call, key_padding, segments, context=context)


def _exact(
    inputs: Inputs, call: Call, key_padding: Tensor | None, segments: Tensor | None, context: ContextGroup | None
) -> Tensor:
    (q, k, v), causal, decay = inputs, call.causal, call.rates
    if key_padding is None and segments is None and decay is None and context is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if context is not None:
        return _exact_by_slices(inputs, call, key_padding, segments, context)
    visible = torch.ones(1, 1, q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
        hidden = ~key_padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)  # 0 · NaN would be NaN
    if segments is not None:
        runs = document_numbers(segments)
        visible = visible & (runs[:, None, :, None] == runs[:, None, None, :])
    blind = ~visible.any(-1, keepdim=True)  # such a row would be NaN
    mask = visible | blind
    if decay is not None:
        positions = torch.arange(k.shape[-2], device=q.device)
        distance = (positions[:, None] - positions).abs()
        bias = -decay.to(q.dtype).view(1, -1, 1, 1) * distance
        mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(blind, 0.0)


def _exact_by_slices(
    inputs: Inputs, call: Call, key_padding: Tensor | None, segments: Tensor | None, context: ContextGroup
) -> Tensor:
    q, k, v = inputs
    batch, _, length, _ = k.shape
    padding = k.new_zeros(batch, length, dtype=torch.uint8) if key_padding is None else (~key_padding).byte()
    hidden = context.gather_rows(padding).bool()  # (P, B, n)
    runs = _whole_runs(segments, 1, context)
    if runs is not None:
        runs = runs.unflatten(1, (context.size, length)).transpose(0, 1)
    own = everyones = None
    if call.gate is not None:
        own = gates.running(call.gate.flatten(0, 1))[:, 1:].view(call.gate.shape)
        everyones = context.gather_rows(own.detach())  # (P, B, H, n)
        everyones = everyones + F.pad(everyones[:-1, ..., -1:].cumsum(0), (0, 0, 0, 0, 0, 0, 1, 0))
    slices = Slices(context, call.causal, hidden if bool(hidden.any()) else None, runs, everyones)
    with torch.autocast(q.device.type, enabled=False):
        operands, _ = dtypes(q, k, v)
        out = ring_attention(q.to(operands), k.to(operands), v.to(operands), slices, call.rates, own)
    return out.to(v.dtype)


def _whole_runs(segments: Tensor | None, heads: int, context: ContextGroup | None) -> Tensor | None:
    """The same of whole rows, for each of N = batch · heads; all ranks of a context call it."""
    if segments is None:
        return None
    if context is not None:
        segments = context.gather_rows(segments).transpose(0, 1).flatten(1)
    return document_numbers(segments).repeat_interleave(heads, dim=0)
