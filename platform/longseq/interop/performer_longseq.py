"""A Performer language model in plain PyTorch: what longseq's own network computes, to rounding, and no more of it.

Everything causal is one function of the next positions and of what is kept of those before: a whole sequence, a prompt
and a token that is decoded take the same way.

Axes: B batch, L length, H heads, D head_dim, E = H · D the width, m features. Masks: True where a position is real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import favor_longseq as favor
from .favor_longseq import FeatureMap, Gate, behind, between, near, rotated, together

# Of a layer: k, v, real and G of the last keys; sums and log-scale of those before; conv's inputs.
Past = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """The attention of a layer: longseq's keys ``attention.*`` (docs/reference/keys)."""

    kind: str  # favor, or exact
    kernel: str
    features: int
    window: int
    qk_norm: bool
    learned_share: bool
    learned_decay: bool
    projection: str  # orthogonal, or iid
    forget_gate: bool = False
    learned_covariance: bool = False


@dataclass(frozen=True)
class Sizes:
    """All that a network is made of: longseq's keys ``model.*``, and which projections are drawn."""

    dim: int
    heads: int
    hidden: int  # units of the MLPs
    layers: tuple[Layer, ...]
    causal: bool
    dropout: float
    position: str
    max_positions: int
    rotary_base: float
    norm: str
    norm_kind: str
    norm_eps: float
    embedding_norm: bool
    attention_bias: bool
    bias: bool
    head: str
    mask_scaling: bool
    ffn: str
    conv: int
    value_residual: bool
    seed: int
    draw: int

    @classmethod
    def of(cls, performer: dict[str, Any]) -> Sizes:
        """Of config.json's entry; TypeError for what this file does not know."""
        return cls(**{**performer, "layers": tuple(Layer(**layer) for layer in performer["layers"])})


@dataclass(frozen=True, eq=False)
class State:
    """What a causal model must know of the tokens so far: of each layer, and the next token's position (B,)."""

    layers: tuple[Past, ...]
    positions: Tensor

    def select(self, sequences: Tensor) -> State:
        """The state of other sequences of the batch, or of one several times."""
        layers = tuple(tuple(x[sequences.to(x.device)] for x in layer) for layer in self.layers)
        return State(layers, self.positions[sequences.to(self.positions.device)])


class Performer(nn.Module):
    """Token ids in, what the head reads out; ``head`` makes logits of it."""

    def __init__(self, config: Any):
        super().__init__()
        s = self.sizes = Sizes.of(config.performer)
        self.mask_token = config.mask_token_id
        self.embedding = nn.Embedding(config.vocab_size, s.dim)
        self.positions = nn.Embedding(s.max_positions, s.dim) if s.position == "learned" else None
        self.embedding_norm = _norm(s) if s.embedding_norm else None
        self.dropout = nn.Dropout(s.dropout)
        self.blocks = nn.ModuleList(Block(s, number) for number in range(len(s.layers)))
        self.norm = _norm(s) if s.norm == "pre" else nn.Identity()
        linear = s.head != "transform"
        self.head = nn.Linear(s.dim, config.vocab_size, bias=False) if linear else TransformHead(s, config.vocab_size)
        self.gradient_checkpointing = False  # transformers sets it, and the function
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint
        for name, parameter in self.named_parameters():
            if ".attention.gate." in name:
                continue  # begins as a decay
            if parameter.ndim == 2:
                shrink = math.sqrt(2 * len(s.layers)) if name.endswith(("attention.out.weight", "mlp.2.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor, real: Tensor | None = None, *, states: list[Tensor] | None = None) -> Tensor:
        """What the head reads, (B, L, E), of tokens (B, L); real: (B, L), None: all are.

        states: gets what enters the first block, what each block but the last gives, and what is returned.
        """
        return self._through(tokens, self._positions(tokens, real), real, None, states)[0]

    @torch.no_grad()
    def read(
        self, tokens: Tensor, real: Tensor | None = None, *, states: list[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """The same of a prompt, padded in front, and the state to go on from."""
        positions = self._positions(tokens, real)
        hidden, layers = self._through(tokens, positions, real, (None,) * len(self.blocks), states)
        return hidden, State(layers, positions.expand(tokens.shape)[:, -1] + 1)

    @torch.no_grad()
    def decode(self, token: Tensor, state: State, *, states: list[Tensor] | None = None) -> tuple[Tensor, State]:
        """The next token (B,) to the logits of its successor (B, vocabulary), and the state behind it."""
        hidden, layers = self._through(token[:, None], state.positions[:, None], None, state.layers, states)
        return self.head(hidden[:, 0]), State(layers, state.positions + 1)

    def _positions(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Counted from the first real token: (L,) or (B, L)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if real is None:
            return positions
        return (positions - (real.cumsum(1) == 0).sum(1, keepdim=True)).clamp(min=0)

    def _through(
        self, tokens: Tensor, positions: Tensor, real: Tensor | None, before: Sequence[Past | None] | None,
        states: list[Tensor] | None,
    ) -> tuple[Tensor, tuple[Past, ...]]:  # fmt: skip
        """What the head reads; and what each layer keeps, unless ``before`` is None."""
        x, rotary = self._embed(tokens, positions, real), self._rotary(positions)
        kept, first = [], None
        for number, block in enumerate(self.blocks):
            if states is not None:
                states.append(x)
            past = None if before is None else before[number]
            if self.gradient_checkpointing and self.training:
                x, first, past = self._gradient_checkpointing_func(block, x, real, rotary, first, past)
            else:
                x, first, past = block(x, real, rotary, first, past)
            if before is not None:
                kept.append(past)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x, tuple(kept)

    def _embed(self, tokens: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        if self.sizes.mask_scaling:  # ESM's "token dropout": masked tokens embed as 0, and the others are scaled
            masked = tokens == self.mask_token
            there = torch.ones_like(masked) if real is None else real
            share = (masked & there).sum(1) / there.sum(1).clamp(min=1)
            scale = (1 - 0.15 * 0.8) / (1 - share).clamp(min=1e-6)
            x = (x.masked_fill(masked[..., None], 0.0) * scale[:, None, None]).to(x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions if real is None else positions.where(real, 0))
        return self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))

    def _rotary(self, positions: Tensor) -> Tensor | None:
        """Cosines and sines of the angles, (2, L, D/2) or (2, B, 1, L, D/2) fp32; None where positions are learned."""
        if self.positions is not None:
            return None
        half = self.sizes.dim // self.sizes.heads // 2
        places = torch.arange(half, device=positions.device, dtype=torch.float64)
        angles = positions[..., None].double() * self.sizes.rotary_base ** (-places / half)
        table = torch.stack((angles.cos(), angles.sin())).float()
        return table if positions.ndim == 1 else table.unsqueeze(2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); post-norm: norm(x + attention(x)), and so on."""

    def __init__(self, s: Sizes, number: int):
        super().__init__()
        self.post_norm = s.norm == "post"
        self.attention_norm, self.attention, self.mlp_norm = _norm(s), Attention(s, number), _norm(s)
        wide = 2 * s.hidden if s.ffn == "swiglu" else s.hidden
        self.mlp = nn.Sequential(
            nn.Linear(s.dim, wide, bias=s.bias), Activation(s.ffn), nn.Linear(s.hidden, s.dim, bias=s.bias)
        )
        self.dropout = nn.Dropout(s.dropout)

    def forward(
        self, x: Tensor, real: Tensor | None, rotary: Tensor | None, first: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor | None, Past]:
        """x (B, L, E) to the same; with value_residual the first layer's values; what attention keeps of the past."""
        mixed, first, past = self.attention(x if self.post_norm else self.attention_norm(x), real, rotary, first, past)
        x = x + self.dropout(mixed)
        if self.post_norm:
            x = self.attention_norm(x)
            return self.mlp_norm(x + self.dropout(self.mlp(x))), first, past
        return x + self.dropout(self.mlp(self.mlp_norm(x))), first, past


class Activation(nn.Module):
    """GELU; SwiGLU, (..., 2n) to (..., n), the first half times silu of the second; or the square of a ReLU."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            value, gate = x.chunk(2, dim=-1)
            return value * F.silu(gate)
        return F.gelu(x) if self.kind == "gelu" else F.relu(x).square()


class TransformHead(nn.Module):
    """BERT's head: linear, GELU and norm, then logits with a bias."""

    def __init__(self, s: Sizes, vocabulary: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(s.dim, s.dim), nn.LayerNorm(s.dim, eps=s.norm_eps)
        self.logits = nn.Linear(s.dim, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(F.gelu(self.dense(x))))


class Attention(nn.Module):
    """Multi-head self-attention: FAVOR+, with exact weights in a window if there is one, or exact in all."""

    oprf_constant: Tensor

    def __init__(self, s: Sizes, number: int):
        super().__init__()
        self.sizes, self.number, self.options = s, number, s.layers[number]
        o, heads = self.options, s.heads
        self.qkv = nn.Linear(s.dim, 3 * s.dim, bias=s.attention_bias)
        self.out = nn.Linear(s.dim, s.dim, bias=s.attention_bias)
        self.conv = Convolution(3 * s.dim, s.conv, s.causal) if s.conv else None
        self.value_mix = nn.Parameter(torch.full((heads, 1, 1), 0.5)) if s.value_residual and number else None
        self.log_temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(2.0))) if o.qk_norm else None
        self.log_share = nn.Parameter(torch.full((heads,), -3.0)) if o.learned_share and o.window else None
        slopes = -8 * math.log(2) * torch.arange(1, heads + 1) / heads
        self.log_decay = nn.Parameter(slopes) if o.learned_decay else None
        self.gate = Gate(s.dim, slopes.exp()) if o.forget_gate else None
        if o.kernel == "oprf" and o.kind == "favor":  # its constant A in units of 1e-9; 1: not found yet, counts as 0
            self.register_buffer("oprf_constant", torch.tensor(1, dtype=torch.int64))
        self.frame = favor.Frame(heads, s.dim // heads, o.kernel if o.kind == "favor" else "", o.learned_covariance)
        self._maps: dict[tuple[Any, ...], FeatureMap] = {}

    def forward(
        self, x: Tensor, real: Tensor | None, rotary: Tensor | None, first: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor | None, Past]:
        """x (B, L, E); see :class:`Block`."""
        qkv, inputs = self.qkv(x), ()
        if self.conv is not None:
            qkv, *inputs = self.conv(qkv, real, *(past[-1:] if past else ()))
        q, k, v = (t.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        if self.log_temperature is not None:
            scale = torch.exp(0.5 * self.log_temperature) * q.shape[-1] ** 0.25
            q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) * scale for t in (q, k))
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        if self.sizes.value_residual:
            first = v if first is None else first
        if self.value_mix is not None:
            v = v + self.value_mix.to(v.dtype) * (first - v)
        with torch.autocast(x.device.type, enabled=False):
            q, k = self.frame(q.to(v.dtype), k.to(v.dtype))
            attend = self._exact if self.options.kind == "exact" else self._favor
            mixed, keys = attend(q, k, v, real, self._forgotten(x), past)
        return self.out(mixed.to(v.dtype).transpose(1, 2).flatten(2)), first, (*keys, *inputs)

    @property
    def forgets(self) -> bool:
        return self.gate is not None or self.log_decay is not None

    def _forgotten(self, x: Tensor) -> Tensor:
        """G (B, H, L) float64, Σ log f of the positions up to each: e^{G − G'} of what was there is left. A decay γ is
        log f = −γ. Zeros where nothing is forgotten."""
        log_gates = x.new_zeros(x.shape[0], self.sizes.heads, x.shape[1], dtype=torch.float32)
        if self.gate is not None:
            log_gates = self.gate(x)
        elif self.log_decay is None:
            return log_gates
        else:
            log_gates = log_gates - self.log_decay.float().exp()[:, None]
        return log_gates.clamp(-100.0, 0.0).double().cumsum(2)

    def _exact(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, forgotten: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """Softmax attention. All keys and values are kept."""
        causal, plain = self.sizes.causal, past is None and real is None and not self.forgets
        of_queries = forgotten
        k, v, there, forgotten = behind(k, v, real, forgotten, past)
        kept = k, v, there, forgotten - forgotten[..., -1:]
        if plain:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal), kept
        ahead = favor.distance(q, k)
        seen = there[:, None, None, :] & ((ahead >= 0) | (not causal))  # (B, 1, L, L of keys)
        blind = ~seen.any(-1, keepdim=True)  # such a row would be NaN
        mask = seen | blind
        if not self.forgets:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(blind, 0.0), kept
        outs = []
        for start in range(0, q.shape[2], favor.CHUNK):  # each head has a bias of its own
            at = slice(start, start + favor.CHUNK)
            bias = -between(of_queries[:, :, at], forgotten).to(q.dtype)
            bias = bias.masked_fill(~mask[:, :, at], -torch.inf)
            outs.append(F.scaled_dot_product_attention(q[:, :, at], k, v, attn_mask=bias))
        return torch.cat(outs, dim=2).masked_fill(blind, 0.0), kept

    def _favor(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, forgotten: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """FAVOR+. The keys of the window are kept, the sums of those before, and the sums' log-scale."""
        window, causal, length = self.options.window, self.sizes.causal, q.shape[2]
        phi = self._feature_map(q) if self.options.features else None
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        if past is None:  # empty places of the window
            none = k.new_zeros(*k.shape[:2], window, k.shape[3])
            past = none, none, none[:, 0, :, 0].bool(), none[..., 0].to(forgotten)
        of_queries = forgotten
        k, v, there, forgotten = behind(k, v, real, forgotten, past)  # (B, H, window + L, D)
        if phi is not None and not (causal or window or self.forgets):
            return favor.bidirectional(phi, q, k, v, there), ()
        parts = [near(q, k, v, there, window, causal, forgotten if self.forgets else None)] if window else []
        sums: tuple[Tensor, ...] = ()
        if phi is not None:
            share = 0.0 if self.log_share is None else self.log_share[:, None, None]
            far = slice(0, length)
            keys = k[:, :, far], v[:, :, far], there[:, far]
            out, lse, *kept = favor.scan(phi, q, *keys, of_queries, forgotten[..., far], past[4:6])
            sums = tuple(kept)
            parts.append((out, lse + share))
            if not causal:  # keys behind the query; its own position is the first scan's where there is no window
                delay = max(1, window)
                k_back, v_back = (F.pad(t[:, :, window:].flip(2), (0, 0, delay, 0))[:, :, far] for t in (k, v))
                there_back = F.pad(there[:, window:].flip(1), (delay, 0))[:, far]
                back = -of_queries.flip(2)
                of_keys = torch.cat((back[..., :1].expand(*back.shape[:2], delay), back), dim=2)[..., far]
                out, lse, *_ = favor.scan(phi, q.flip(2), k_back, v_back, there_back, back, of_keys)
                parts.append((out.flip(2), lse.flip(2) + share))
        left = (forgotten - forgotten[..., -1:])[..., length:]
        return together(parts), (*(t[:, :, length:] for t in (k, v)), there[:, length:], left, *sums)

    def _feature_map(self, like: Tensor) -> FeatureMap:
        if (like.device, like.dtype) not in self._maps:
            o, s, rows = self.options, self.sizes, None
            if o.kernel != "relu_direct":
                number = o.features // 2 if o.kernel in ("hyperbolic", "trigonometric") else o.features
                how = s.seed, self.number, s.draw, o.projection == "orthogonal", o.kernel == "smreg"
                rows = favor.projections(number, like.shape[-1], *how)
            stored = int(self.oprf_constant) if o.kernel == "oprf" else 1
            a = self.frame.a + (0.0 if stored == 1 else stored * 1e-9)
            with torch.inference_mode(False):  # a training may follow
                self._maps[like.device, like.dtype] = FeatureMap(o.kernel, rows, o.features, like, a)
        return self._maps[like.device, like.dtype]


class Convolution(nn.Module):
    """A depthwise convolution along the length, (B, L, C) to (B, L, C); causal, or centred."""

    def __init__(self, channels: int, width: int, causal: bool):
        super().__init__()
        self.causal, self.left = causal, width - 1 if causal else width // 2
        identity = torch.zeros(channels, 1, width)
        identity[..., self.left] = 1.0
        self.weight = nn.Parameter(identity)

    def forward(self, x: Tensor, real: Tensor | None, before: Tensor | None = None) -> tuple[Tensor, ...]:
        """The convolution; and of a causal one its last inputs, ``before`` of the next positions."""
        if real is not None:
            x = x.masked_fill(~real[..., None], 0.0)
        length, right = x.shape[1], self.weight.shape[-1] - 1 - self.left
        x = F.pad(x, (0, 0, self.left, right)) if before is None else torch.cat((before, x), dim=1)
        wide = torch.promote_types(x.dtype, torch.float32)
        made = F.conv1d(x.mT.to(wide), self.weight.to(wide), groups=x.shape[2]).mT.to(x.dtype)
        return (made, x[:, length:]) if self.causal else (made,)


def _norm(s: Sizes) -> nn.Module:
    return (
        nn.RMSNorm(s.dim, eps=s.norm_eps) if s.norm_kind == "rmsnorm" else nn.LayerNorm(s.dim, s.norm_eps, bias=s.bias)
    )
