"""What a layer does to queries and keys first: kernels "sderf" and "aderf", and a learned covariance.

Features of any kernel here estimate exp(x'ᵀy') with x' = R x and y' = R^-T (y − c), which is exp(xᵀy) times a factor of
the query alone: it cancels in attention, whatever R and c are, and windows, decays and states see x' and y' alike. What
R, c and A decide is the variance. With S = I − 4A, A diagonal, the features are

    φ(x') = m^-1/2 · det(S)^1/4 · exp(ωᵀAω + ωᵀS^1/2 x' − ‖x'‖²/2)

(dense-exponential features: Likhosherstov et al. 2023, FAVOR#, arXiv 2302.00787; B = S^1/2 R). With z = x' + y' the
log of E[(φ(x')ᵀφ(y'))²] over its square is, for m = 1 and t = 1 − 8a of each coordinate,

    Σ_i [ log((t_i + 1)/2) − log(t_i)/2 + z_i²/t_i ]

Its mean over queries and keys is least where z has no mean, c = RᵀR μ_x + μ_y, and where z's coordinates are
uncorrelated and small:

- ``sderf``: R a rotation, to the axes of Σ_x + Σ_y; mean z_i² are its eigenvalues.
- ``aderf``: R Σ_x Rᵀ = R^-T Σ_y R^-1 = diag(σ), σ the singular values of Σ_x^1/2 Σ_y^1/2; mean z_i² = 2σ_i.

Then A follows coordinate by coordinate as OPRF's constant does. R and c are of a head; the coordinates are in the order
of their sizes, and A is of the layer, from the mean over its heads, as all heads read the same ω.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longseq.attention.oprf import best_a
from longseq.attention.options import FRAMED_KERNELS, AttentionOptions

# Directions with less than this share of the mean variance count as having it: a rank-deficient batch is no reason to
# stretch what later batches may fill.
_LEAST_SHARE = 1e-4


def frame_moments(q: Tensor, k: Tensor) -> Tensor:
    """Sums that :func:`best_frame` reads: add them over batches and ranks.

    Args:
        q, k: (batch, heads, L, d), as attention gets them.

    Returns:
        (2, heads, d + 1, d + 1) float64: for the queries and for the keys Σ [x, 1] [x, 1]ᵀ.
    """

    def sums(t: Tensor) -> Tensor:
        x = t.detach().double() * t.shape[-1] ** -0.25
        x = torch.cat((x, torch.ones_like(x[..., :1])), -1).transpose(0, 1).flatten(1, 2)
        return x.mT @ x

    return torch.stack((sums(q), sums(k)))


def best_frame(kernel: str, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What makes features vary least, from the sum of any number of :func:`frame_moments`.

    Args:
        kernel: "sderf" or "aderf".

    Returns:
        R and R^-T (heads, d, d), c (heads, d), as raw queries and keys need them, and A's diagonal (d,); float64.
    """
    d = moments.shape[-1] - 1
    sums, mean = moments[..., :d, :d] / moments[..., d:, d:], moments[..., :d, d] / moments[..., d:, d]
    of_x, of_y = sums - mean[..., :, None] * mean[..., None, :]
    if kernel == "sderf":
        sizes, vectors = _axes(of_x + of_y)
        to_x = to_y = vectors.mT
    else:
        (x_sizes, x_axes), (y_sizes, y_axes) = _axes(of_x), _axes(of_y)
        roots = x_sizes.sqrt()[..., None] * x_axes.mT, y_axes * y_sizes.sqrt()[..., None, :]
        turn, values, _ = torch.linalg.svd(roots[0] @ roots[1])
        root = values.sqrt()[..., None]
        to_x = root * turn.mT @ (x_axes / x_sizes.sqrt()[..., None, :]).mT
        to_y = turn.mT @ roots[0] / root
        sizes = 2 * values
    sign = to_x.gather(-1, to_x.abs().argmax(-1, keepdim=True)).sign()  # of an axis: by convention
    to_x, to_y = sign * to_x, sign * to_y
    centre = (to_x.mT @ to_x @ mean[0][..., None])[..., 0] + mean[1]
    a = torch.tensor([best_a(size) for size in sizes.mean(0).tolist()], dtype=torch.float64)
    return to_x, to_y, centre * d**0.25, a


def _axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors as columns."""
    sizes, axes = torch.linalg.eigh(covariance)
    least = (_LEAST_SHARE * sizes.mean(-1, keepdim=True)).clamp(min=1e-12)
    return torch.maximum(sizes, least).flip(-1), axes.flip(-1)


class Frame(nn.Module):
    """R, c and A of a layer, frozen once they are found; and a learned covariance (DARKFormer, arXiv 2603.04127).

    The covariance is Σ = MᵀM of a head: ω of N(0, Σ) in the place of N(0, I), for the kernel exp(xᵀΣy). That is
    x → M x and y → M y for all weights, near and far. M = I + ``covariance``, which begins at 0.

    Args:
        heads, head_dim: H, D.
        kernel: one of FRAMED_KERNELS; empty: there are no constants.
        learned: with a learned covariance.
    """

    constants: Tensor

    def __init__(self, heads: int, head_dim: int, kernel: str, *, learned: bool):
        super().__init__()
        self.kernel = kernel
        self.covariance = nn.Parameter(torch.zeros(heads, head_dim, head_dim)) if learned else None
        if self.kernel:  # the bits of float64 numbers, as half-precision training casts every floating-point buffer
            self.register_buffer("constants", torch.zeros(heads, 2 * head_dim + 2, head_dim, dtype=torch.int64))
        self._a: tuple[float, ...] | None = None

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """x' and y' of raw q and k, (B, H, L, D) each; until constants are found, q and k with the covariance alone."""
        with torch.autocast(q.device.type, enabled=False):
            if self.covariance is not None:
                metric = _wide(self.covariance) + torch.eye(q.shape[-1], device=q.device)
                q, k = _turned(q, metric), _turned(k, metric)
            if self.kernel and self.calibrated:
                d = q.shape[-1]
                to_x, to_y, centre, _ = self._numbers.split((d, d, 1, 1), dim=1)
                q, k = _turned(q, to_x), _turned(k, to_y, centre)
        return q, k

    @property
    def _numbers(self) -> Tensor:
        made: Tensor = self.constants.view(torch.float64)
        return made

    @property
    def open_constants(self) -> Tensor | None:
        """As they are before they are found."""
        return torch.zeros_like(self.constants) if self.kernel else None

    @property
    def calibrated(self) -> bool:
        """Whether the constants are found, or none are needed."""
        return not self.kernel or self.a is not None

    @property
    def a(self) -> tuple[float, ...] | None:
        """A's diagonal, or None before the first training step has fixed it, and for other kernels."""
        if self.kernel and self._a is None:
            stored = self._numbers[0, -1].tolist()
            self._a = tuple(stored) if any(stored) else None
        return self._a

    @torch.no_grad()
    def find(self, q: Tensor, k: Tensor) -> None:
        """Fix the constants from raw q and k (B, H, L, D) of all ranks; all ranks call it."""
        moments = summed_over_ranks(frame_moments(*self(q, k))).cpu()
        if moments[:, :, -1, -1].min() == 0 or not moments.isfinite().all():
            return  # padding alone, or an overflow: a later batch decides
        to_x, to_y, centre, a = best_frame(self.kernel, moments)
        rows = torch.cat((to_x, to_y, centre[:, None], a.expand(len(centre), 1, -1)), dim=1)
        found = rows.contiguous().view(torch.int64).to(q.device)
        if dist.is_available() and dist.is_initialized():  # axes are found up to signs, by each machine's own LAPACK
            dist.broadcast(found, 0)
        self.constants.copy_(found)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = prefix + "constants"
        if self.kernel and _kernel_of(state_dict.get(name)) not in ("", self.kernel):
            state_dict[name] = torch.zeros_like(state_dict[name])  # to be found anew; the caller's own dict is a copy
        self._a = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _kernel_of(constants: Tensor | None) -> str:
    """Which kernel found them; "" for open ones. A rotation takes queries and keys alike, to the bit."""
    if constants is None or constants.ndim != 3 or not constants[:, -1].any():
        return ""
    d = constants.shape[-1]
    return "sderf" if torch.equal(constants[:, :d], constants[:, d : 2 * d]) else "aderf"


def frame_of(options: AttentionOptions, heads: int, head_dim: int) -> Frame | None:
    """What a layer of these options needs."""
    kernel = options.kernel if options.kind == "favor" and options.kernel in FRAMED_KERNELS else ""
    learned = options.learned_covariance
    return Frame(heads, head_dim, kernel, learned=learned) if kernel or learned else None


def exchanged(state: dict[str, Tensor], name: str, unset: Tensor | None) -> None:
    """Make weights of a layer with another kernel loadable: constants it lacks are ``unset``; or it has none."""
    if unset is None:
        state.pop(name, None)
    else:
        state.setdefault(name, unset)


def _turned(x: Tensor, matrix: Tensor, centre: Tensor | None = None) -> Tensor:
    """matrix · (x − centre) of rows x (B, H, L, D), in fp32 (float64)."""
    wide = _wide(x)
    if centre is not None:
        wide = wide - centre.to(wide)
    return (wide @ matrix.to(wide).mT).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summed_over_ranks(moments: Tensor) -> Tensor:
    """Their sum over all ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(moments)
    return moments
