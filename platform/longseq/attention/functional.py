"""The one door to attention: checks the request, picks the path and the backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import near_and_far
from longseq.attention.arguments import checked, dtypes
from longseq.attention.backends import choice as backends
from longseq.attention.bidirectional_operator import bidirectional_attention
from longseq.attention.context.group import ContextGroup, GatherSequence, SlicedDocuments
from longseq.attention.context.halo import neighbourhood
from longseq.attention.context.parallel import relay
from longseq.attention.context.whole import whole
from longseq.attention.feature_maps import KERNELS, FeatureMap, feature_map
from longseq.attention.heads import lay_out
from longseq.attention.isolation import Inputs, Sight, isolated
from longseq.attention.parts import Part, combine
from longseq.attention.scan_operator import scan
from longseq.attention.window_operator import window_attention


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
    seed: int = 0,
    layer: int = 0,
    draw: int = 0,
    projection: str = "orthogonal",
    oprf_a: float = 0.0,
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
        seed, layer, draw: the projection matrix is a function of these three numbers.
        projection: "orthogonal" (blocks of orthogonal rows) or "iid".
        oprf_a: the constant A ≤ 0 of kernel "oprf" (see :func:`longseq.attention.oprf.oprf_parameter`).
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
    documents = segments if isinstance(segments, SlicedDocuments) else None
    given = segments.segments if isinstance(segments, SlicedDocuments) else segments
    segments = checked(
        q, k, v, causal, window, features, key_padding, given, cu_seqlens, far_share=far_share, decay=decay
    )
    operands, dtype = dtypes(q, k, v)
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")
    phi = None
    if features or not window:
        phi = feature_map(
            kernel,
            features,
            q.shape[-1],
            seed=seed,
            layer=layer,
            draw=draw,
            projection=projection,
            oprf_a=oprf_a,
            device=q.device,
            dtype=dtype,
            operands=operands,
        )
    if window and phi and not phi.positive:
        raise ValueError(f"kernel {kernel!r} has features of both signs and cannot share a denominator with a window")
    if phi and not phi.positive and not causal and (segments is not None or decay is not None):
        raise ValueError(
            f"kernel {kernel!r} has features of both signs: bidirectional attention over documents or with a decay "
            "adds two denominators, which needs features of one sign"
        )
    batch, heads, length = q.shape[:3]
    nothing = _nothing(q, k, v, far_share, decay) if not (q.shape[:3].numel() and k.shape[2] and v.shape[3]) else None
    hidden = None if key_padding is None else ~key_padding.repeat_interleave(heads, dim=0)
    runs = None if segments is None else _runs(segments).repeat_interleave(heads, dim=0)
    with torch.autocast(q.device.type, enabled=False):
        rates = per_row(decay, batch, dtype)
        q, k, v_ = (t.flatten(0, 1).to(operands) for t in (q, k, v))
        rows = q, k, v_
        if nothing is not None:
            backends.choose(backend, phi, rows)
            return nothing
        if causal and context is None and near_and_far.takes(backend, phi, rows, window):
            assert phi is not None
            return near_and_far.near_and_far(*rows, phi, window, hidden, runs, rates, far_share, batch, v.dtype)
        share = per_row(far_share, batch, dtype)
        plain = phi is not None and not causal and not window and runs is None and rates is None
        if context is not None and segments is not None and documents is None:
            documents = context.documents(segments)

        def attend(rows: Inputs) -> Tensor:
            if plain:
                assert phi is not None
                q, k, v = rows
                if context is not None:
                    return whole(backend, (q, k, v), phi, hidden, context)
                return bidirectional_attention(q, k, v, phi, hidden, backend=backend)
            if context is not None:
                return _by_slices(backend, rows, phi, causal, window, hidden, runs, rates, share, context, documents)
            return _by_parts(backend, rows, phi, causal, min(window, length), hidden, runs, rates, share)

        sight = Sight(lambda: _whole_runs(segments, heads, context), causal, 0 if phi else window, context)
        out = isolated(attend, rows, hidden, sight)
    return lay_out(out, batch, heads, v.dtype)


def _nothing(q: Tensor, k: Tensor, v: Tensor, *per_head: Tensor | None) -> Tensor:
    """Zeros that hang on the inputs, whose gradients are zeros, as those of PyTorch's attention are."""
    none = sum((x[..., :0].sum() for x in (q, k, v, *per_head) if x is not None), q.new_zeros(()))
    return v.new_zeros(*q.shape[:3], v.shape[-1]) + none.to(v.dtype)


def _by_parts(
    backend: str,
    rows: Inputs,
    phi: FeatureMap | None,
    causal: bool,
    window: int,
    hidden: Tensor | None,
    runs: Tensor | None,
    decay: Tensor | None,
    share: Tensor | None,
) -> Tensor:
    """Near keys exactly, those before and those after by features; together they are all keys, each once."""
    near: list[Part] = []
    far: list[Part] = []
    q, k, v = rows
    if window:
        near.append(
            window_attention(
                q,
                k,
                v,
                window=window,
                causal=causal,
                hidden=hidden,
                runs=runs,
                decay=decay,
                backend=backend,
                beyond=phi,
            )
        )
    if phi and window < rows[0].shape[1]:
        far.append(scan(q, k, v, phi, delay=window, hidden=hidden, runs=runs, decay=decay, backend=backend))
        if not causal:
            # The keys after: a scan of the reversed row, without the query's own position if the first scan had it.
            q, k, v = (t.flip(1) for t in (q, k, v))
            hidden = None if hidden is None else hidden.flip(1)
            runs = None if runs is None else runs[:, -1:] - runs.flip(1)
            delay = max(1, window)
            out, lse = scan(q, k, v, phi, delay=delay, hidden=hidden, runs=runs, decay=decay, backend=backend)
            far.append((out.flip(1), lse.flip(1)))
    if near and share is not None:
        far = [(out, lse + share) for out, lse in far]
    return combine(near + far)[0]


def _by_slices(
    backend: str,
    rows: Inputs,
    phi: FeatureMap | None,
    causal: bool,
    window: int,
    hidden: Tensor | None,
    runs: Tensor | None,
    decay: Tensor | None,
    share: Tensor | None,
    context: ContextGroup,
    documents: SlicedDocuments | None,
) -> Tensor:
    """The same for slices: near keys of the neighbours, too, and far ones as states of other ranks."""
    q, k, v = rows
    engine = backends.choose(backend, phi, rows)
    window = min(window, q.shape[1] * context.size)
    right = 0 if causal else max(1, window)  # a query's own position is the first scan's
    around = neighbourhood(context, k, v, hidden, runs, documents, window, right)
    near: list[Part] = []
    far: list[Part] = []
    if phi and window < q.shape[1] * context.size:
        ways = (False,) if causal else (False, True)
        far = [relay(engine, q, around, phi, decay, context, documents, reverse=reverse) for reverse in ways]
    if window:
        part = window_attention(
            around.queries(q),
            around.k,
            around.v,
            window=window,
            causal=causal,
            hidden=around.hidden,
            runs=around.runs,
            decay=decay,
            backend=backend,
            beyond=phi,
        )
        near.append(around.own(part))
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
    context: ContextGroup | None = None,
) -> Tensor:
    """Softmax attention by ``F.scaled_dot_product_attention``: arguments and result as of :func:`favor_attention`.

    With a ``context`` every rank gathers all keys and values, and holds a mask of its queries by all keys.
    """
    segments = segments.segments if isinstance(segments, SlicedDocuments) else segments
    segments = checked(q, k, v, causal, key_padding=key_padding, segments=segments, decay=decay)
    hidden = None if key_padding is None else ~key_padding[:, None]

    def attend(rows: Inputs) -> Tensor:
        q, k, v = rows
        return _exact(q, k, v, causal, key_padding, segments, decay, context)

    sight = Sight(lambda: _whole_runs(segments, q.shape[1], context), causal, context=context)
    return isolated(attend, (q, k, v), hidden, sight)


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    key_padding: Tensor | None,
    segments: Tensor | None,
    decay: Tensor | None,
    context: ContextGroup | None,
) -> Tensor:
    if key_padding is None and segments is None and decay is None and context is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    first = 0
    own = slice(0, q.shape[2])
    if context is not None:
        first = context.rank * q.shape[2]
        own = slice(first, first + q.shape[2])
        real = k.new_ones(len(k), k.shape[2], dtype=torch.bool) if key_padding is None else key_padding
        key_padding = context.gather_rows(real.int()).transpose(0, 1).flatten(1).bool()
        segments = None if segments is None else context.gather_rows(segments).transpose(0, 1).flatten(1)
        k, v = GatherSequence.apply(k, context), GatherSequence.apply(v, context)
    visible = torch.ones(1, 1, q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(first)
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
        hidden = ~key_padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)  # 0 · NaN would be NaN
    if segments is not None:
        runs = _runs(segments)
        visible = visible & (runs[:, None, own, None] == runs[:, None, None, :])
    blind = ~visible.any(-1, keepdim=True)  # such a row would be NaN
    mask = visible | blind
    if decay is not None:
        positions = torch.arange(k.shape[-2], device=q.device)
        distance = (positions[own, None] - positions).abs()
        bias = -decay.to(q.dtype).view(1, -1, 1, 1) * distance
        mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(blind, 0.0)


def per_row(per_head: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """A number a head, (heads,), for each of N = batch · heads rows: (N, 1, 1)."""
    return None if per_head is None else per_head.to(dtype)[None].expand(batch, -1).reshape(-1, 1, 1)


def _whole_runs(segments: Tensor | None, heads: int, context: ContextGroup | None) -> Tensor | None:
    """The same of whole rows, for each of N = batch · heads; all ranks of a context call it."""
    if segments is None:
        return None
    if context is not None:
        segments = context.gather_rows(segments).transpose(0, 1).flatten(1)
    return _runs(segments).repeat_interleave(heads, dim=0)


def _runs(segments: Tensor) -> Tensor:
    """The number of each position's document, counted along the row: (batch, length), never decreasing."""
    border = segments[:, 1:] != segments[:, :-1]
    return F.pad(border.cumsum(1), (1, 0))
