"""Context parallelism: the ranks of a group hold a slice each of the same sequences.

A linear attention needs no other rank's keys and values, only their sum: what crosses between ranks is one state a
head, as large for 4 thousand tokens as for 4 million. The structure is that of LASP-2 (Sun et al. 2025, arXiv
2502.07563), with the normaliser and the log-scales of this package.

With Ṽ = [V, 1], L the lower triangle of ones, and rank r's slices Q_r, K_r (their features) and V_r:

    M_r  = K_rᵀ Ṽ_r                                        ``own``: the state of this rank's keys       all-gather
    P_r  = Σ_{j<r} M_j                                     ``before``: of all keys before the slice
    Õ_r  = ((Q_r K_rᵀ) ⊙ L) Ṽ_r + Q_r P_r                  numerator, and denominator in the last column

and backward, with dÕ = [dO, dlse − Σ(dO ⊙ O)] / den:

    G_r  = Q_rᵀ dÕ_r                                       ``wanted``: the gradient of P_r              all-gather
    N_r  = Σ_{j>r} G_j                                     ``after``: the gradient of M_r
    A_r  = (Q_r K_rᵀ) ⊙ L,   dA_r = (dÕ_r Ṽ_rᵀ) ⊙ L
    dQ_r = dA_r K_r + dÕ_r P_rᵀ,   dK_r = dA_rᵀ Q_r + Ṽ_r N_rᵀ,   dṼ_r = A_rᵀ dÕ_r + K_r N_r

Local products are the scan's (:mod:`longseq.attention.scan`): it begins with P_r as its state, and backward with N_r as
its R, so neither costs anything extra; M_r and G_r cost one pass over the keys and one over the queries. Every state
has its log-scale beside it, G_r too, whose terms weigh e^{−lse_i}: (sums, c) merge after both are brought to the larger
c. A message is thus B · H · (m · (e + 1) + 1) numbers, forward and backward, whatever the length.

- While a message travels, the first positions of the slice (``_Work.early``) attend to the slice alone; what P_r adds
  to them is combined with that afterwards, by their log-denominators. In the backward pass likewise. The states of the
  keys of these positions and of the rest are ``first`` and ``second``; ``inner`` is the one that the rest begins with.
- An exact window of w: keys enter the state w positions late, so the slice of keys that a rank sums up lies w before
  its queries. The w keys and values before the slice come from the left neighbour (from several, where w is longer than
  a slice): :mod:`longseq.attention.context.halo`.
- A decay multiplies a state by e^{−γ·distance} on the way: it is taken from the log-scale, slice by slice. Of forget
  gates each rank tells the sum over its slice. (These compute no positions early.)
- Packed documents: P_r are keys of the document that the slice begins in, so M_j counts in it only if that document
  reaches back as far as the end of slice j. :class:`SlicedDocuments` knows.
- Keys on both sides: without positions to tell them apart one sum of all M_r, read by all queries; else one scan in
  each direction, the second over the reversed ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import gates
from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.context.halo import Neighbourhood
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.first_order import Saved, first_order
from longseq.attention.parts import Part, combine, combine_vjp
from longseq.attention.scan import CHUNK, Rows, Scanned
from longseq.attention.state import NOTHING, AttentionState, widened

if TYPE_CHECKING:
    from longseq.attention.backends.choice import Backend

# While states travel, a 32nd of a slice is computed, in whole chunks. No more than that: these queries read P_r in a
# scan of their own, which one process does without.
_EARLY = 32


def relay(
    engine: Backend, near: Neighbourhood, context: ContextGroup, documents: SlicedDocuments | None, *,
    reverse: bool = False,
) -> Part:  # fmt: skip
    """Attention of this rank's queries over all keys at least ``near.left`` positions before them, by features.

    With ``reverse``, over those at least ``near.right`` positions behind them. All ranks of the group call it.

    Args:
        near: its queries, keys and values.
        documents: goes with the documents of its rows.

    Returns:
        out (N, n, e) and lse (N, n, 1).
    """
    end = near.rows.k.shape[1] - near.right
    length, delay = end - near.left, near.right if reverse else near.left
    rows = near.rows.at(slice(near.left, None) if reverse else slice(0, end))
    reach = None
    if rows.runs is not None:
        assert documents is not None
        reach = documents.after.flip(0) if reverse else documents.before
        reach = reach.repeat_interleave(len(rows.q) // reach.shape[1], dim=1)
    gate = rows.gate
    rows = rows.reversed() if reverse else rows
    if gate is not None and reverse:
        rows = replace(rows, gate=gates.turned(gate, near.beyond if near.beyond is not None else 0.0))
    through = None if rows.gate is None else context.gather_rows(rows.gate[:, length, None].detach())
    chain = _Chain(context, reverse, length, delay, reach, through)
    learned = *rows.qkv, rows.fading
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    out, lse = _Relay.apply(*learned, rows.hidden, rows.runs, rows.phi, engine, chain, learns)
    return (out.flip(1), lse.flip(1)) if reverse else (out, lse)


@dataclass(frozen=True, eq=False)
class _Chain:
    """The ranks in the order of a scan, and which states reach which of them."""

    context: ContextGroup
    reverse: bool
    length: int  # of a slice
    delay: int
    reach: Tensor | None  # (P, N) how far back the document goes that each slice begins in, in the order of the scan
    through: Tensor | None = None  # with gates, what each rank's keys take from a log-scale, (P, N, 1, 1) float64

    @property
    def place(self) -> int:
        return self._turned(self.context.rank)

    def before(self, states: list[AttentionState], decay: Tensor | None) -> AttentionState:
        """P of this rank, from M of all: as seen from its first key."""
        earlier = [self._on_the_way(states, at, at, self.place, decay) for at in range(self.place)]
        return functools.reduce(AttentionState.merge, earlier, _nothing_like(states[0]))

    def after(self, wanted: list[AttentionState], decay: Tensor | None) -> AttentionState:
        """N of this rank, from G of all: as seen from behind its last key."""
        later = [self._on_the_way(wanted, at, self.place, at, decay) for at in range(self.place + 1, len(wanted))]
        return functools.reduce(AttentionState.merge, later, _nothing_like(wanted[0]))

    def slices_between(self, own: AttentionState, wanted: list[AttentionState], decay: Tensor | None) -> Tensor:
        """How many whole slices lie between this rank's keys and later ones' queries, given G of all: the sum, weighted
        by the gradients of their log-weights, (N, 1, 1) float64."""
        total = torch.zeros_like(own.log_scale, dtype=torch.float64)
        for at in range(self.place + 2, len(wanted)):
            total += (at - self.place - 1) * _flow(own, self._on_the_way(wanted, at, self.place, at, decay))
        return total

    def _on_the_way(
        self, states: list[AttentionState], of: int, source: int, to: int, decay: Tensor | None
    ) -> AttentionState:
        """The state of slice ``of``, faded from the end of slice ``source`` to the beginning of slice ``to``; nothing
        of it where a document ends between the two."""
        state, between = states[self._turned(of)], (to - source - 1) * self.length
        if self.through is not None:
            ranks = [self._turned(at) for at in range(source + 1, to)]
            state = state.faded(self.through[ranks].sum(0).to(state.log_scale))
        elif decay is not None:
            state = state.faded(-decay * between)
        if self.reach is None:
            return state
        return _only(state, self.reach[to] > between + self.delay)

    def _turned(self, at: int) -> int:
        return self.context.size - 1 - at if self.reverse else at


class _Relay(torch.autograd.Function):
    """A slice's scan between other ranks' states. q, k, v (N, delay + n, ·); the first ``delay`` queries are unused."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
        feature_map: FeatureMap, engine: Backend, chain: _Chain, learns: bool,
    ) -> Part:  # fmt: skip
        rows = Rows(q, k, v, None, hidden, runs, feature_map, chain.delay).faded_by(decay)
        work = _Work(rows, engine, chain)
        early = work.early
        first, second = work.sum_up(0, early), work.sum_up(early, chain.length)
        own = second
        if early:
            own = _only(work.faded(first, chain.length - early), work.same(early - 1, chain.length - 1)).merge(second)
        states = chain.context.gather(own)
        local = engine.scan_forward(work.rows(0, early), None, learns) if early else None
        before = inner = chain.before(states(), decay)
        read = None
        if local is not None:
            read = engine.scan_forward(work.rows(0, early, keys=False), work.initial(before), learns)
            through = _only(work.faded(before, early), work.same(0, early - 1)).merge(first)
            inner = _only(through, work.same(early - 1, early))
        rest = engine.scan_forward(work.rows(early, chain.length), work.initial(inner), learns)
        parts = [part for part in (local, read, rest) if part is not None]
        ctx.feature_map, ctx.engine, ctx.chain = feature_map, engine, chain
        ctx.kept = [len(part.kept) for part in parts]
        ctx.save_for_backward(
            q, k, v, decay, hidden, runs,
            *(t for state in (own, before, inner) for t in (state.sums, state.log_scale)),
            *(t for part in parts for t in (part.out, part.lse, part.inverse_den, part.log_scale, *part.kept)),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return _together(parts, chain.delay)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, hidden, runs, *states = saved
        own, before, inner = (AttentionState(*states[at : at + 2]) for at in range(0, 6, 2))
        parts, left = [], states[6:]
        for kept in ctx.kept:
            out, lse, inverse_den, log_scale = left[:4]
            parts.append(Scanned(out, lse, inverse_den, left[4 : 4 + kept], log_scale))
            left = left[4 + kept :]
        chain = ctx.chain
        rows = Rows(q, k, v, None, hidden, runs, ctx.feature_map, chain.delay).faded_by(decay)
        work = _Work(rows, ctx.engine, chain)
        early, delay, rest = work.early, chain.delay, parts[-1]
        out, lse = _together(parts, delay)
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        wanted = work.wanted(dout, dlse, out, lse, rest.inverse_den[:, delay:])
        everyone_wants = chain.context.gather(wanted)

        sums = _Gradients(work, ctx.needs_input_grad[3])
        if early:
            whole, d_whole = (out[:, :early], lse[:, :early]), (dout[:, :early], dlse[:, :early])
            for part, keys in zip(parts[:2], (True, False), strict=True):
                d_part = combine_vjp((part.out[:, delay:], part.lse[:, delay:]), whole, *d_whole)
                sums.add(work.rows(0, early, keys=keys), part, 0, d_part, None)
        gradients = everyone_wants()
        after = chain.after(gradients, decay)
        d_rest = dout[:, early:], dlse[:, early:]
        d_inner = sums.add(work.rows(early, chain.length), rest, early, d_rest, _at(after, rest.log_scale))
        of_inner = AttentionState(d_inner, torch.where(inner.log_scale > 0.5 * NOTHING, -inner.log_scale, NOTHING))
        if early:
            behind = _only(of_inner, work.same(early - 1, early))
            sums.add(work.rows(0, early), parts[0], 0, None, _at(behind, parts[0].log_scale))
        if sums.decay is not None and rows.gate is None:
            # A scan counts from its first key to its queries, and from its keys to behind the last one. What came
            # before the slice skips the early positions on its way to the rest, and reaches other ranks by itself.
            entered = before
            if early:
                entered = _only(work.faded(before, early), work.same(0, early - 1))
                entered = _only(entered, work.same(early - 1, early))
            through = _only(work.faded(entered, chain.length - early), work.same(early, chain.length - 1))
            sums.decay += chain.length * _flow(through, after) - early * _flow(entered, of_inner)
            sums.decay -= chain.length * chain.slices_between(own, gradients, decay)
        return sums.q, sums.k, sums.v, None if sums.decay is None else sums.decay.to(decay), *[None] * 6


class _Gradients:
    """The gradients of a slice's rows, summed over the scans that it was computed by."""

    def __init__(self, work: _Work, wants_decay: bool):
        rows = work.all
        self.work = work
        self.q, self.k, self.v = (torch.empty_like(widened(x)) for x in (rows.q, rows.k, rows.v))
        self.shared = work.early + work.chain.delay if work.early else 0  # the positions of several scans
        for total in (self.q, self.k, self.v):
            total[:, : self.shared] = 0
        self.decay: Tensor | None = None
        if rows.fading is not None and wants_decay:
            self.decay = torch.zeros_like(rows.fading, dtype=torch.float64)

    def add(self, rows: Rows, part: Scanned, start: int, grads: Part | None, later: Tensor | None) -> Tensor:
        """Go back through the scan of the rows from ``start`` on.

        Args:
            grads: of the part's out (N, n, e) and lse (N, n, 1), without the unused queries; None: zeros.
            later: R, as of :func:`longseq.attention.scan.scan_backward`.

        Returns:
            The gradient of the state that it began with, (N, m, e + 1).
        """
        dout, dlse = (None, None) if grads is None else (_behind(x, self.work.chain.delay) for x in grads)
        wants_decay = self.decay is not None
        back = self.work.engine.scan_backward(
            rows, part.out, part.inverse_den, part.kept, dout, dlse, later, wants_decay
        )
        for total, grad in ((self.q, back.q), (self.k, back.k), (self.v, back.v)):
            total[:, start : self.shared] += grad[:, : self.shared - start]
            total[:, self.shared : start + grad.shape[1]] = grad[:, self.shared - start :]
        if self.decay is not None and back.decay is not None:
            self.decay += back.decay
        assert back.initial is not None
        return back.initial


@dataclass(frozen=True, eq=False)
class _Work:
    """One rank's scan, in parts. Positions count from the first key, which lies ``delay`` before the first query."""

    all: Rows
    engine: Backend
    chain: _Chain

    @property
    def early(self) -> int:
        """How many positions are computed while states travel; parts of signed features do not combine."""
        length = self.chain.length
        if length < 4 * CHUNK or not self.all.feature_map.positive or self.all.gate is not None:
            return 0
        return max(1, length // _EARLY // CHUNK) * CHUNK

    def rows(self, start: int, stop: int, *, keys: bool = True) -> Rows:
        """The queries that the keys of [start, stop) become visible to one by one, with these keys or without any."""
        rows = self.all.at(slice(start, stop + self.chain.delay))
        if not keys:
            rows = replace(rows, hidden=torch.ones(*rows.q.shape[:2], dtype=torch.bool, device=rows.q.device))
        return rows if rows.runs is None else replace(rows, runs=rows.runs - rows.runs[:, :1])

    def sum_up(self, start: int, stop: int) -> AttentionState:
        """The state of the keys of [start, stop), those of the last one's document, as seen from ``stop``."""
        return self.engine.state(self.all.at(slice(start, stop)))

    def wanted(self, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, inverse_den: Tensor) -> AttentionState:
        """G: what the queries want of the state before the first key, as seen from it."""
        rows, delay = self.all, self.chain.delay
        blind = lse[..., 0] <= 0.5 * NOTHING
        if rows.runs is not None:
            blind = blind | (rows.runs[:, delay:] != rows.runs[:, :1])
        last = dlse - (dout * out).sum(-1, keepdim=True)
        if not rows.feature_map.positive:  # lse has lost the denominator's sign
            dout, last = dout * inverse_den.sign(), last * inverse_den.sign()
        log_weight = widened(dout[..., :1]).new_zeros(*dout.shape[:2], 1)
        if rows.decay is not None:
            distances = torch.arange(delay, delay + dout.shape[1], device=dout.device)[:, None]
            log_weight = torch.addcmul(log_weight, rows.decay, distances.to(log_weight), value=-1)
        if rows.gate is not None:
            log_weight = rows.gate[:, 1 + delay :].to(log_weight)
        log_weight = log_weight.masked_fill(blind[..., None], -torch.inf)
        q = rows.q[:, delay:]
        return self.engine.sum_up(q, dout, last, log_weight - lse.masked_fill(blind[..., None], 0.0), rows.feature_map)

    def initial(self, state: AttentionState) -> AttentionState:
        """A state as a scan begins with it: seen from ``delay`` positions before the first key, or from its last."""
        return self.faded(state, -self.chain.delay)

    def faded(self, state: AttentionState, distance: int) -> AttentionState:
        return state if self.all.decay is None else state.faded(-self.all.decay * distance)

    def same(self, one: int, other: int) -> Tensor | None:
        """(N,) whether two keys are of one document; None: all are."""
        runs = self.all.runs
        return None if runs is None else runs[:, one] == runs[:, other]


def _together(parts: list[Scanned], delay: int) -> Part:
    """The slice's queries: of the first ones both what the slice tells them and what came before it, and the others."""
    pieces = [(part.out[:, delay:], part.lse[:, delay:]) for part in parts]
    if len(pieces) == 1:
        return pieces[0]
    began, rest = combine(pieces[:2]), pieces[2]
    return torch.cat((began[0], rest[0]), dim=1), torch.cat((began[1], rest[1]), dim=1)


def _nothing_like(state: AttentionState) -> AttentionState:
    return AttentionState(torch.zeros_like(state.sums), torch.full_like(state.log_scale, NOTHING))


def _only(state: AttentionState, where: Tensor | None) -> AttentionState:
    """The state in those rows of N, and none in the others."""
    if where is None:
        return state
    rows = where[:, None, None]
    return AttentionState(state.sums.masked_fill(~rows, 0.0), state.log_scale.masked_fill(~rows, NOTHING))


def _at(gradient: AttentionState, log_scale: Tensor) -> Tensor:
    """The gradient with respect to the sums of a state of that log-scale."""
    return gradient.sums * torch.exp(gradient.log_scale + log_scale)


def _flow(state: AttentionState, gradient: AttentionState) -> Tensor:
    """Σ of the gradients of the log-weights of the state's keys, (N, 1, 1) float64."""
    scale = torch.exp(state.log_scale + gradient.log_scale).double()
    return scale * (state.sums.double() * gradient.sums).sum((1, 2), keepdim=True)


def _behind(x: Tensor, delay: int) -> Tensor:
    """x (N, L, ·) behind zeros for the unused queries."""
    return F.pad(x, (0, 0, delay, 0)) if delay else x
