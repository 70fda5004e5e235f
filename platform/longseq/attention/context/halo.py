"""The keys and values beside a slice: its exact windows reach into the slices of neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import gates
from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.first_order import Saved, first_order
from longseq.attention.parts import Part
from longseq.attention.scan import Rows


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """A slice of keys with those around it that its queries may see one by one.

    Attributes:
        rows: (N, left + n + right, ·): zeros for queries of other slices, and for keys beyond the sequence. Documents
            that none of the slice's queries belongs to may share a number.
        left, right: how many stand before the slice and behind it.
        beyond: with forget gates, log f of the position behind the last, (N, 1, 1).
    """

    rows: Rows
    left: int
    right: int
    beyond: Tensor | None = None

    def own(self, part: Part) -> Part:
        """What belongs to the slice."""
        mine = slice(self.left, self.rows.k.shape[1] - self.right)
        return part[0][:, mine], part[1][:, mine]


def neighbourhood(
    context: ContextGroup, rows: Rows, documents: SlicedDocuments | None, left: int, right: int
) -> Neighbourhood:
    """Get ``left`` keys and values from the ranks before, ``right`` from those behind. All ranks call it.

    Args:
        rows: of this rank; which of them are hidden may differ from rank to rank, documents are numbered from 0.
        documents: how far they reach; goes with ``rows.runs``.
    """
    if not left and not right:
        return Neighbourhood(rows, 0, 0)
    k, v, runs, gate, beyond = rows.k, rows.v, rows.runs, rows.gate, None
    if gate is not None:
        logs = gate.diff(dim=1)
        logs, _, _ = _Halo.apply(logs, logs[..., :0], torch.ones_like(logs), context, left, right + 1)
        gate, beyond = gates.running(logs[:, :-1, 0]), logs[:, -1:]
    real = k.new_ones(*k.shape[:2], 1) if rows.hidden is None else (~rows.hidden[..., None]).to(k)
    k, v, real = _Halo.apply(k, v, real, context, left, right)
    if runs is not None:
        assert documents is not None
        heads = len(runs) // documents.before.shape[1]
        before, after = (x[context.rank].repeat_interleave(heads)[:, None] for x in (documents.before, documents.after))
        ahead = torch.arange(left, 0, -1, device=k.device) <= before
        behind = torch.arange(1, right + 1, device=k.device) <= after
        runs = 1 + torch.cat((ahead.long() - 1, runs, runs[:, -1:] + (~behind).long()), dim=1)
    q = F.pad(rows.q, (0, 0, left, right))
    rows = replace(rows, q=q, k=k, v=v, hidden=real[..., 0] == 0, runs=runs, gate=gate)
    return Neighbourhood(rows, left, right, beyond)


class _Halo(torch.autograd.Function):
    """k, v and which keys are real, (N, n, ·), with those of the ranks before and behind; zeros where none are."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, real: Tensor, context: ContextGroup, left: int, right: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.context, ctx.left, ctx.right, ctx.sizes = context, left, right, (k.shape[-1], v.shape[-1])
        length = k.shape[1]
        whole = [F.pad(x, (0, 0, left, right)) for x in (k, v, real)]

        def edge(where: slice) -> Tensor:
            return torch.cat([x[:, where] for x in (k, v, real)], dim=-1)

        hops = _hops(context, length, left, right)
        received = exchange(context, [(hop.away, edge(hop.kept)) for hop in hops], [hop.whence for hop in hops])()
        for hop, message in zip(hops, received, strict=True):
            if message is not None:
                for target, part in zip(whole, message.split((*ctx.sizes, 1), dim=-1), strict=True):
                    target[:, hop.placed] = part
        ctx.mark_non_differentiable(whole[2])
        return whole[0], whole[1], whole[2]

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dk: Tensor, dv: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mine = slice(ctx.left, dk.shape[1] - ctx.right)
        own = [x[:, mine].clone() for x in (dk, dv)]
        hops = _hops(ctx.context, own[0].shape[1], ctx.left, ctx.right)
        outgoing = [(hop.whence, torch.cat((dk[:, hop.placed], dv[:, hop.placed]), dim=-1)) for hop in hops]
        received = exchange(ctx.context, outgoing, [hop.away for hop in hops])()
        for hop, message in zip(hops, received, strict=True):
            if message is not None:
                for target, part in zip(own, message.split(ctx.sizes, dim=-1), strict=True):
                    target[:, hop.kept] += part
        return own[0], own[1], None, None, None, None


@dataclass(frozen=True)
class _Hop:
    """One message of a halo, over so many ranks: what is sent ``away`` of the slice, and where what comes is placed."""

    away: int  # the rank that it goes to; beyond the group: nobody
    whence: int  # the rank that one like it comes from
    kept: slice  # of the slice
    placed: slice  # of the slice with its halo


def _hops(context: ContextGroup, length: int, left: int, right: int) -> list[_Hop]:
    hops = []
    for width, step in ((left, 1), (right, -1)):
        for far in range(-(-width // length)):
            size = min(length, width - far * length)
            if step == 1:
                kept, end = slice(length - size, length), left - far * length
                placed = slice(end - size, end)
            else:
                kept, start = slice(0, size), left + length + far * length
                placed = slice(start, start + size)
            hops.append(_Hop(context.rank + step * (far + 1), context.rank - step * (far + 1), kept, placed))
    return hops


def exchange(
    context: ContextGroup, outgoing: list[tuple[int, Tensor]], whence: list[int]
) -> Callable[[], list[Tensor | None]]:
    """Send messages to ranks of the group and receive as many, of the same sizes; ranks beyond it are left out.

    What it returns waits for what is received.
    """
    inside = range(context.size)
    received: list[Tensor | None] = []
    operations, sent = [], []
    for (to, message), source in zip(outgoing, whence, strict=True):
        if to in inside:
            message = message.contiguous()
            sent.append(message)
            context.traffic.halo += message.nbytes
            operations.append(dist.P2POp(dist.isend, message, dist.get_global_rank(context.group, to), context.group))
        space = None
        if source in inside:
            space = torch.empty_like(message, memory_format=torch.contiguous_format)
            peer = dist.get_global_rank(context.group, source)
            operations.append(dist.P2POp(dist.irecv, space, peer, context.group))
        received.append(space)
    under_way = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> list[Tensor | None]:
        for work in under_way:
            work.wait()
        sent.clear()  # until now it had to stay
        return received

    return wait
