"""Forget gates: a decay that depends on the token (Lin et al. 2025, arXiv 2503.02130).

With f_l in (0, 1] of each token and head, the weight of key j for a later query i is multiplied by

    Π_{l=j+1…i} f_l = e^{G_i − G_j},   G_i = Σ_{l≤i} log f_l

and that of a key behind the query by e^{G_j − G_i}; a decay γ is log f_l = −γ. Every operation reads G in float64 and
takes differences from a place nearby, so that they are right in fp32 wherever in a long row. The gradient needs no
products of its own: a factor on all weights of a query changes nothing but its log-denominator. So with B_j the
gradient of key j's log-weight, φ(k_j)ᵀdφ(k_j) of features, dG_i = dlse_i − B_i in a causal scan, and autograd sums dG
to that of log f.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention.isolation import is_looked_for
from longseq.attention.state import widened

# More than this is forgotten nowhere: e^-100 is nothing next to a weight of 1, and small numbers are exact.
_LEAST = -100.0


class ForgetGate(nn.Linear):
    """log f (B, H, L) = logsigmoid(w·x + b) of x (B, L, E), in fp32 (float64).

    At the beginning w is 0, and f = e^{−γ} at every position, with the rates that a learned decay begins at.
    """

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(-log_rates(self.out_features).exp().expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        logits = widened(F.linear(x, self.weight)) + widened(self.bias)  # half precision would round f to 1
        return F.logsigmoid(logits).mT


def log_rates(heads: int) -> Tensor:
    """log γ of each head: ALiBi's slopes (Press et al. 2021, arXiv 2108.12409), half-lives from a few positions to
    hundreds."""
    return -8 * math.log(2) * torch.arange(1, heads + 1) / heads


def marked(k: Tensor, gate: Tensor | None) -> Tensor:
    """k (B, H, L, d) with NaN where log f (B, H, L) is: it reaches the queries that see this key, and no others.

    Where nothing is looked for (see isolation), ``running`` lets a NaN pass on to all later positions.
    """
    if gate is None or not is_looked_for(k) or not bool(gate.detach().sum().isnan()):
        return k
    return k.masked_fill(gate.isnan()[..., None], torch.nan)


def running(log_gates: Tensor) -> Tensor:
    """log f (N, L) as :class:`longseq.attention.scan.Rows` holds it: (N, L + 1, 1) float64, Σ of those before each."""
    sound = log_gates.clamp(_LEAST, 0.0)
    if is_looked_for(log_gates):
        sound = sound.nan_to_num(nan=0.0)  # the keys are NaN: marked
    return F.pad(sound.double().cumsum(1), (1, 0))[..., None]


def part(gate: Tensor, where: slice) -> Tensor:
    """Of some of the positions."""
    start, stop, _ = where.indices(gate.shape[1] - 1)
    return gate[:, start : max(start, stop) + 1] - gate[:, start : start + 1]


def turned(gate: Tensor, beyond: Tensor | float = 0.0) -> Tensor:
    """Of the row from the last position to the first; ``beyond``: log f of the one behind the last, (N, 1, 1)."""
    return F.pad(gate[:, -1:] - gate[:, 1:].flip(1) + beyond, (0, 0, 1, 0))


def anchors(gate: Tensor, first: int, step: int, count: int) -> Tensor:
    """G before the positions first, first + step, ..., those of the row's ends beyond them: (count, N, 1, 1)."""
    at = torch.arange(first, first + step * count, step, device=gate.device).clamp(0, gate.shape[1] - 1)
    return gate[:, at].transpose(0, 1)[..., None]
