"""The log-scales of a scan by Triton's kernels, found for all chunks before any sums are formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import triton_kernels as kernels
from longseq.attention.state import NOTHING

# Rows that a program holds at a time; more overflow the registers of 4 warps.
CHUNK = 64


@dataclass(frozen=True)
class Frames:
    """The log-scales of a scan: those of its keys, and of the state before and after each chunk.

    "Of positions" is (N, T): T is the length in whole chunks, and key j stands at position t = j + delay.
    """

    key_scale: Tensor  # b of positions, −inf where no key is, decay included
    before: Tensor  # c (N, chunks)
    after: Tensor  # c'
    same: Tensor | None  # whether the state before the chunk is of the document of its last key: (N, chunks) bool
    last: Tensor | None  # whether a position is of that document: (N, chunks, C) bool
    run_before: Tensor | None  # the document of the state: (N, chunks) int32

    @classmethod
    def of(
        cls,
        log_scale: Tensor,
        length: int,
        delay: int,
        runs: Tensor | None,
        decay: Tensor | None,
        initial: Tensor | None,
    ) -> Frames:
        key_scale = at_positions(log_scale, length, delay, fill=-torch.inf)
        if decay is not None:
            offsets = torch.arange(key_scale.shape[1], device=key_scale.device) % CHUNK
            key_scale = torch.addcmul(key_scale, decay[:, :, 0], offsets.to(key_scale))
        by_chunk = key_scale.unflatten(1, (-1, CHUNK))  # (N, chunks, C)
        same = last = run_before = None
        if runs is not None:
            key_runs = at_positions(runs, length, delay, fill=0)  # no key, or the initial state: of the first document
            ends = torch.arange(CHUNK, key_runs.shape[1] + 1, CHUNK, device=runs.device).clamp_(max=length) - 1
            ending = key_runs[:, ends]
            run_before = F.pad(ending[:, :-1], (1, 0), value=0).contiguous()
            same = ending == run_before
            last = key_runs.unflatten(1, (-1, CHUNK)) == ending[..., None]
            by_chunk = by_chunk.masked_fill(~last, -torch.inf)
        chunk_scale = by_chunk.amax(-1)
        before, after = torch.empty_like(chunk_scale), torch.empty_like(chunk_scale)
        fade = chunk_scale.new_zeros(len(chunk_scale)) if decay is None else decay.flatten() * CHUNK
        first = torch.full_like(fade, NOTHING) if initial is None else initial.flatten().contiguous()
        kernels.carry[(len(chunk_scale),)](
            chunk_scale, chunk_scale if same is None else same.view(torch.uint8), fade, first, before, after,
            chunk_scale.shape[1], RUNS=runs is not None, num_warps=1,
        )  # fmt: skip
        return cls(key_scale, before, after, same, last, run_before)

    def __getitem__(self, rows: slice) -> Frames:
        return Frames(
            self.key_scale[rows],
            self.before[rows],
            self.after[rows],
            None if self.same is None else self.same[rows],
            None if self.last is None else self.last[rows],
            None if self.run_before is None else self.run_before[rows],
        )

    def entering(self) -> Tensor:
        """e^{b_t − c'} of positions."""
        weights = torch.exp(self.key_scale.unflatten(1, (-1, CHUNK)) - self.after[..., None])
        return (weights if self.last is None else weights.masked_fill_(~self.last, 0.0)).flatten(1)

    def left(self) -> Tensor:
        """e^{c − c'} of each chunk."""
        left = torch.exp(self.before - self.after)
        return left if self.same is None else left.masked_fill_(~self.same, 0.0)

    def carried(self, row_scale: Tensor, runs: Tensor | None) -> Tensor:
        """e^{c − M_i} of positions."""
        weights = torch.exp(self.before[..., None] - row_scale.unflatten(1, (-1, CHUNK)))
        if self.run_before is not None and runs is not None:
            own = at_positions(runs, runs.shape[1], 0, fill=-2).unflatten(1, (-1, CHUNK))
            weights.masked_fill_(own != self.run_before[..., None], 0.0)
        return weights.flatten(1)


def at_positions(x: Tensor, length: int, delay: int, *, fill: float) -> Tensor:
    """x (N, L) moved ``delay`` positions on, in whole chunks: (N, T)."""
    return F.pad(x[:, : length - delay], (delay, -length % CHUNK), value=fill)
