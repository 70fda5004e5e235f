"""Multi-head self-attention as a module: FAVOR+ or exact softmax over the weights of a plain Transformer.

Axes in names and comments: B batch, L length, H heads, D head_dim, E = H · D the width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from longseq.attention.arguments import floating
from longseq.attention.call import Call
from longseq.attention.carried import State, carried_attention
from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.convolution import ShortConvolution
from longseq.attention.frames import exchanged, frame_of, summed_over_ranks
from longseq.attention.functional import attention
from longseq.attention.gates import ForgetGate, log_rates
from longseq.attention.heads import split_heads
from longseq.attention.narrow import Linear
from longseq.attention.operators import is_traced
from longseq.attention.oprf import oprf_a_from_moments, oprf_moments
from longseq.attention.options import AttentionOptions, integer
from longseq.attention.recurrent import RecurrentState, decode, following, read
from longseq.attention.tiles import pointwise

# OPRF's constant is kept as an integer, in units of 1e-9: half-precision training casts every floating-point buffer.
_NOT_YET = 1
_UNIT = 1e-9


class FavorAttention(nn.Module):
    """Multi-head self-attention, linear in the length.

    The weights are ``qkv`` (3E, E) and ``out`` (E, E), as of exact attention: a checkpoint trained with one ``kind``
    loads into the other unchanged. ``draw`` selects the projection matrix of the random features. It is set from the
    optimiser step (never from a random generator), so accumulation, recompute and ranks agree.

    Args:
        dim: width, E.
        heads: attention heads, H; must divide ``dim``.
        causal: position i sees the positions up to i.
        bias: whether the linear maps have biases.
        conv: width of a :class:`~longseq.attention.convolution.ShortConvolution` on queries, keys and values; 0: none.
        value_residual: layers but the first (layer 0) mix its values into theirs, by a learned share of each head
            (Zhou et al. 2024, arXiv 2410.17897).
        seed, layer: with ``draw``, what the projections are a function of.
        options: of attention, as a whole.
        more: options by name, which replace those: ``kind`` ("favor", or "exact" for softmax attention by
            ``F.scaled_dot_product_attention``), ``kernel``, ``features``, ``window``, ``projection``, ``backend`` as of
            :func:`longseq.attention.favor_attention`, ``qk_norm`` (queries and keys of unit length and a learned
            temperature τ a head: qᵀk/√d becomes τ · cosine), ``learned_share`` (a learned factor a head on every weight
            beyond the window), ``learned_decay`` (a learned decay a head, e^{−γ·distance} on every weight) and
            ``forget_gate`` (a factor f = sigmoid(w·x + b) of each token and head on all weights that pass it; at the
            beginning w = 0, and f are the factors e^{−γ} of the learned decay's beginning) and ``learned_covariance``
            (of each head's projections: see :class:`longseq.attention.frames.Frame`).

    Raises:
        ValueError: for sizes that do not divide, and options that attention refuses.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = False,
        conv: int = 0,
        value_residual: bool = False,
        seed: SupportsIndex = 0,
        layer: SupportsIndex = 0,
        options: AttentionOptions | None = None,
        **more: Any,
    ):
        super().__init__()
        dim, heads = integer("dim", dim, least=1), integer("heads", heads, least=1)
        if dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}")
        self.options = options = AttentionOptions(**more) if options is None else replace(options, **more)
        options.check(causal=causal)
        self.heads, self.head_dim, self.causal = heads, dim // heads, causal
        self.seed, self.layer = integer("seed", seed), integer("layer", layer)
        self.draw = 0
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)
        self.conv = ShortConvolution(3 * dim, conv, causal) if conv else None
        # Half of each, where the paper begins.
        self.value_residual = value_residual
        self.value_mix = nn.Parameter(torch.full((heads, 1, 1), 0.5)) if value_residual and layer else None
        # The random features' variance grows with e^{4τ}: τ = 2 is sharp enough to select and cheap to approximate.
        self.log_temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(2.0))) if options.qk_norm else None
        # Features estimate each far weight without bias but with noise: begin by trusting them little.
        self.log_share = nn.Parameter(torch.full((heads,), -3.0)) if options.learned_share and options.window else None
        self.log_decay = nn.Parameter(log_rates(heads)) if options.learned_decay else None
        self.gate = ForgetGate(dim, heads) if options.forget_gate else None
        if self._finds_a:
            self.register_buffer("oprf_constant", torch.tensor(_NOT_YET, dtype=torch.int64))
        self._oprf_a: float | None = None
        self.frame = frame_of(options, heads, self.head_dim)
        self.context: ContextGroup | None = None  # set: forward takes this rank's slices of longer sequences

    def forward(
        self,
        x: Tensor,
        *,
        padding: Tensor | None = None,
        segments: Tensor | SlicedDocuments | None = None,
        rotary: Tensor | None = None,
        norm: nn.Module | None = None,
        tile: int = 0,
        carried: State | None = None,
        wide: bool = False,
        first: Tensor | None = None,
    ) -> Any:
        """Self-attention over x.

        Args:
            x: (B, L, E).
            padding: (B, L) bool, True where a position is real, or None.
            segments: (B, L) integers; runs of equal numbers are documents that do not see each other, or None.
            rotary: (2, L, D/2) from :func:`longseq.attention.rotary_table`, (2, B, 1, L, D/2) where each row has its
                own positions, or None for no rotary positions. With random features a document's result depends on
                its positions themselves, not on their differences alone: let each begin at 0.
            norm: applied to x first, or None.
            tile: positions that the norm and the linear maps compute at a time; what they keep for the backward pass
                are x, q, k, v and what :meth:`mix` gives. 0: all at once.
            carried: x is the next tile of a sequence, and this is the state that the tile before has left, () before
                the first: see :mod:`longseq.attention.carried`. For causal layers, without padding and segments.
            wide: carry the state's sums in float64, without gradients.
            first: the first layer's values, for ``value_residual``.

        Returns:
            (B, L, E); with ``carried`` also the state behind the tile; and of a layer with ``value_residual``, as of
            its :meth:`prefill` and :meth:`decode`, last the values (B, H, L, D) that the next one gets as ``first``.
        """
        if carried is not None:
            return self._carry(x if norm is None else norm(x), rotary, carried, wide, first)
        if not tile or x.shape[1] <= tile:
            x = x if norm is None else norm(x)
            q, k, v, *gate = *self.project(x, rotary, padding, segments), *self._gates(x)
        else:
            q, k, v, *gate = self._project_tiles(x, rotary, padding, segments, norm, tile)
        v, first = self.with_first(v, first)
        mixed = self.mix(q, k, v, padding, segments, *gate)
        if not tile or x.shape[1] <= tile:
            out = self.merge(mixed)
        else:
            (out,) = pointwise(lambda x: (self.merge(x),), tile, (mixed,), list(self.out.parameters()))
        return (out, first) if self.value_residual else out

    def _carry(
        self, x: Tensor, rotary: Tensor | None, carried: State, wide: bool, first: Tensor | None
    ) -> tuple[Any, ...]:
        qkv, rest, gate = self.qkv(x), carried, self._gates(x)
        if self.conv is not None:
            qkv, before = self.conv.following(qkv, carried[-1] if carried else None)
            rest = carried[:-1]
        q, k, v = self._heads(qkv, rotary)
        v, first = self.with_first(v, first)
        q, k = self.framed(q, k)
        mixed, state = carried_attention(q, k, v, rest, self.call(*gate), wide=wide)
        return self._results(self.merge(mixed), state if self.conv is None else (*state, before), first)

    @torch.no_grad()
    def decoding_state(self, carried: State, batch: int) -> RecurrentState:
        """What :meth:`decode` goes on with behind tiles that have left this state."""
        rest, before = (carried, None) if self.conv is None else (carried[:-1], carried[-1])
        none = self.out.weight.new_empty(batch, self.heads, 0, self.head_dim)
        return replace(following(rest, none, self.call()), before=before)

    def _results(self, out: Tensor, state: Any, first: Tensor) -> tuple[Any, ...]:
        return (out, state, first) if self.value_residual else (out, state)

    @property
    def reach(self) -> tuple[int, int]:
        """How many positions before and behind its own each query, key and value is made of."""
        return (0, 0) if self.conv is None else (self.conv.left, self.conv.right)

    def inside(
        self, x: Tensor, beside: tuple[int, int], rotary: Tensor | None, first: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Call], Tensor]:
        """q, k, v (B, H, T, D) of a part of a sequence and what is asked for there; and the first layer's values.

        beside: so many positions at x's beginning and end are none of the T, and are read by the convolution alone.
        """
        qkv, (before, behind) = self.qkv(x), beside
        q, k, v = self._heads(qkv if self.conv is None else self.conv.inside(qkv, beside), rotary)
        v, first = self.with_first(v, first)
        q, k = self.framed(q, k)
        call = self.call(*(gate[..., before : x.shape[1] - behind] for gate in self._gates(x)))
        return (q, k, v, call), first

    def _project_tiles(
        self,
        x: Tensor,
        rotary: Tensor | None,
        padding: Tensor | None,
        segments: Tensor | SlicedDocuments | None,
        norm: nn.Module | None,
        tile: int,
    ) -> tuple[Tensor, ...]:
        """:meth:`project` a tile at a time, but for the convolution, which reads neighbours."""
        parts = [self.qkv, *(part for part in (norm, self.gate) if part is not None)]
        learned = [parameter for part in parts for parameter in part.parameters()]
        normed = [] if self.log_temperature is None else [self.log_temperature]
        tables = () if rotary is None else (rotary,)

        def project(x: Tensor, *table: Tensor) -> tuple[Tensor, ...]:
            x = x if norm is None else norm(x)
            qkv = self.qkv(x)
            columns = (gate[..., None] for gate in self._gates(x))  # positions are the last axis but one
            return *(self._heads(qkv, *table) if self.conv is None else (qkv,)), *columns

        if self.conv is None:
            q, k, v, *gate = pointwise(project, tile, (x, *tables), learned + normed)
        else:
            qkv, *gate = pointwise(project, tile, (x,), learned)
            mixed = self.conv(qkv, padding, segments, self.context)
            q, k, v = pointwise(self._heads, tile, (mixed, *tables), normed)
        return q, k, v, *(column[..., 0] for column in gate)

    def merge(self, mixed: Tensor) -> Tensor:
        """The heads' results (B, H, L, D) to (B, L, E), by the output's map."""
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    @torch.no_grad()
    def prefill(
        self,
        x: Tensor,
        *,
        padding: Tensor | None = None,
        rotary: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Any:
        """The forward pass over a prompt, and the state to go on from with :meth:`decode`. No gradients.

        The state keeps the projections of this moment. Its size is fixed, except for ``kind="exact"``: there it is a
        key-value cache.

        Raises:
            ValueError: if not causal.
        """
        qkv, before = self._following(self.qkv(x), None, padding)
        q, k, v = self._heads(qkv, rotary)
        v, first = self.with_first(v, first)
        q, k = self.framed(q, k)
        out, state = read(q, k, v, self.call(*self._gates(x)), padding)
        return self._results(self.merge(out), replace(state, before=before), first)

    @torch.no_grad()
    def decode(
        self, x: Tensor, state: RecurrentState, *, rotary: Tensor | None = None, first: Tensor | None = None
    ) -> Any:
        """The next position x (B, 1, E), or the next few. ``rotary`` is the table of their positions."""
        qkv, before = self._following(self.qkv(x), state.before, None)
        q, k, v = self._heads(qkv, rotary)
        v, first = self.with_first(v, first)
        q, k = self.framed(q, k)
        out, state = decode(q, k, v, state, *self._gates(x))
        return self._results(self.merge(out), replace(state, before=before), first)

    def _following(self, qkv: Tensor, before: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.conv is None or not self.causal:  # which decoding refuses
            return qkv, None
        return self.conv.following(qkv, before, padding)

    def project(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        padding: Tensor | None = None,
        segments: Tensor | SlicedDocuments | None = None,
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, L, D) of x (B, L, E), normalised and rotated."""
        floating(x=x)
        qkv = self.qkv(x)
        return self._heads(qkv if self.conv is None else self.conv(qkv, padding, segments, self.context), rotary)

    def _gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """log f (B, H, L) of x (B, L, E), if there are forget gates."""
        return () if self.gate is None else (self.gate(x),)

    def _heads(self, qkv: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, ...]:
        return split_heads(qkv, self.heads, rotary, self.log_temperature, self.options.backend)

    def with_first(self, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """This layer's values, those of the first layer mixed in if it does so; and the first layer's."""
        if self.value_mix is None or first is None:
            return v, v
        # lerp() would keep both, which are parts of larger tensors.
        return v + self.value_mix.to(v.dtype) * (first - v), first

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        segments: Tensor | SlicedDocuments | None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Attention proper, (B, H, L, D) each; with forget gates log f (B, H, L)."""
        options, whole = self.options, k.shape[2] * (self.context.size if self.context else 1)
        if self.log_share is not None and self.training and (options.kind == "exact" or options.window >= whole):
            v = v + 0 * self.log_share.sum()  # nothing is far: a gradient of 0, as DDP waits for every parameter's
        if self.training and not self.calibrated:
            self._calibrate(q, k, padding)
        q, k = self.framed(q, k)
        return attention(q, k, v, self.call(gate), padding, segments, context=self.context)

    def call(self, gate: Tensor | None = None) -> Call:
        """What this layer asks of attention at this moment, with forget gates of these positions."""
        draw = self._draw if is_traced() else self.draw
        a = self.oprf_a or (self.frame and self.frame.a) or 0.0
        learned = self.log_share, self.log_decay, gate
        return Call(self.options, self.causal, self.seed, self.layer, draw, a, *learned, log_decay=True)

    @property
    def draw(self) -> int:
        """How often the projections were drawn anew, from 0."""
        return int(self._draw)

    @draw.setter
    def draw(self, value: SupportsIndex) -> None:
        # A tensor, so that one compiled program serves all draws; no buffer, as it is a function of the step.
        self._draw = torch.tensor(integer("draw", value), dtype=torch.int64, device="cpu")

    @property
    def decay(self) -> Tensor | None:
        """γ of each head, (H,)."""
        return None if self.log_decay is None else self.log_decay.float().exp()

    @property
    def carried_tensors(self) -> int:
        """How many tensors ``carried`` holds behind a tile."""
        recent = (2 + self.options.forget_gate) * (self.options.window > 0)
        return 2 * self.options.has_features + recent + (self.conv is not None)

    @property
    def _finds_a(self) -> bool:
        return self.options.kernel == "oprf" and self.options.kind == "favor"

    @property
    def calibrated(self) -> bool:
        """Whether its kernel has the constants that the first training step fixes, or has none."""
        return (not self._finds_a or self.oprf_a is not None) and (self.frame is None or self.frame.calibrated)

    def framed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as features and scores read them: see :class:`longseq.attention.frames.Frame`."""
        return (q, k) if self.frame is None else self.frame(q, k)

    @property
    def oprf_a(self) -> float | None:
        """OPRF's constant A, or None before the first training step has fixed it."""
        if self._finds_a and self._oprf_a is None:
            stored = int(self.oprf_constant)  # type: ignore[arg-type]
            self._oprf_a = None if stored == _NOT_YET else stored * _UNIT
        return self._oprf_a

    @torch.no_grad()
    def _calibrate(self, q: Tensor, k: Tensor, padding: Tensor | None) -> None:
        """Fix constants for good from this batch, the same on all ranks (arXiv 2205.15317 estimates A likewise)."""
        if padding is not None:
            q, k = (t.transpose(1, 2)[padding].transpose(0, 1)[None] for t in (q, k))  # (1, H, real positions, D)
        if self.frame is not None and not self.frame.calibrated:
            self.frame.find(q, k)
            return
        moments = summed_over_ranks(oprf_moments(*self.framed(q, k)))
        if moments[..., -1].min() == 0:
            return  # padding alone, on all ranks: the next batch decides
        a = oprf_a_from_moments(moments)
        if math.isfinite(a):  # else q or k have overflowed: leave it to a later batch
            self.oprf_constant.fill_(round(a / _UNIT))  # type: ignore[operator]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of another kernel has no constants: they are fixed at the first training step here.
        open_a = torch.tensor(_NOT_YET, dtype=torch.int64) if self._finds_a else None
        exchanged(state_dict, prefix + "oprf_constant", open_a)
        exchanged(state_dict, prefix + "frame.constants", None if self.frame is None else self.frame.open_constants)
        self._oprf_a = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
