"""The output layer: logits, or the loss of targets without ever holding the logits of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention.first_order import Saved, first_order, origin

IGNORE = -100  # a target that is not scored
LOGITS = 2**24  # at a time, in fp32: 64 MiB
MOST_ROWS = 8192


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits may exist together."""
    return max(1, min(MOST_ROWS, max(256, LOGITS // vocabulary)))


class Head(nn.Linear):
    """(..., E) to logits (..., vocabulary); with targets, to the sum of their losses and how many are most probable."""

    def __init__(self, dim: int, vocabulary: int, bias: bool = False):
        super().__init__(dim, vocabulary, bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
            x: (..., E).
            targets: (...) token ids, −100 where nothing is scored, or None.

        Returns:
            Logits; or Σ cross entropy (nats, fp32) and the number of targets that have the largest logit (int64).
        """
        if targets is None:
            return F.linear(x, self.weight, self.bias)
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return _Loss.apply(x, self.weight, self.bias, targets, learns)


class TransformHead(nn.Module):
    """BERT's head: linear, GELU and norm, then logits with a bias."""

    def __init__(self, dim: int, vocabulary: int, eps: float = 1e-5):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.logits = Head(dim, vocabulary, bias=True)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As of :class:`Head`."""
        return self.logits(self.norm(F.gelu(self.dense(x))), targets)


class _Loss(torch.autograd.Function):
    """Cross entropy over tiles of rows. A tile's logits are gone when the next one's come, so their gradient is taken
    in the forward pass: it is that of the sum, and the backward pass only multiplies."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, learns: bool
    ) -> tuple[Tensor, Tensor]:
        rows, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        size = rows_at_once(len(weight))
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        dx = torch.empty_like(rows) if learns and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if learns else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        for start in range(0, len(rows), size):
            tile = slice(start, start + size)
            logits = F.linear(rows[tile], weight, bias)
            narrow = logits.dtype  # what autocast has made of it
            logits = logits.float()
            scored = wanted[tile] != IGNORE
            ids = wanted[tile].clamp(min=0)[:, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += ((log_sum - logits.gather(1, ids))[:, 0] * scored).sum()
            correct += ((logits.argmax(-1) == wanted[tile]) & scored).sum()
            if d_weight is None:
                continue
            d_logits = logits.sub_(log_sum).exp_()
            d_logits.scatter_add_(1, ids, d_logits.new_full((1, 1), -1.0).expand(len(ids), 1))
            d_logits = d_logits.mul_(scored[:, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(narrow)
            d_weight += d_logits.mT @ rows[tile]
            if dx is not None:
                dx[tile] = d_logits @ weight
        ctx.shape = x.shape
        ctx.save_for_backward(origin(weight), origin(x), None if bias is None else origin(bias), dx, d_weight, d_bias)
        ctx.mark_non_differentiable(correct)
        return loss.float(), correct

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        like, _, _, dx, d_weight, d_bias = saved
        if dx is not None:
            scaled = torch.empty_like(dx)
            for start in range(0, len(dx), MOST_ROWS):  # in fp32: rounded to bf16, the factor alone is off by 0.4 %
                scaled[start : start + MOST_ROWS] = dx[start : start + MOST_ROWS].float() * grad
            dx = scaled.view(ctx.shape)
        d_weight = (d_weight * grad).to(like.dtype) if ctx.needs_input_grad[1] else None
        d_bias = (d_bias * grad).to(like.dtype) if ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias, None, None
