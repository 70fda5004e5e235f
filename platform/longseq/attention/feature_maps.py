"""Feature maps φ with κ(q, k) = E[φ(q)ᵀφ(k)], each row split into bounded features and a log-scale.

φ(x) = features · exp(log_scale), the log-scale one number a row. Keeping it apart is what lets attention run in fp32
without an epsilon: sums are formed of features, and the log-scales travel beside them. It is complete: with it, the
product of two rows is an estimate of exp(qᵀk/√d) itself, so features and exact weights can share a denominator.
A row's split depends on that row alone, so no key can influence what comes before it.

Throughout x = q·d^-1/4, u = ωᵀx, and m is the size of the feature axis. :func:`feature_map` builds a kernel by name.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longseq.attention.arguments import HALF
from longseq.attention.operators import is_traced
from longseq.attention.oprf import log_factor, shift, stretch
from longseq.attention.options import FRAMED_KERNELS, OWN_KERNELS, PAIRED_KERNELS, AttentionOptions, OprfA
from longseq.attention.projections import projection_matrix

_LOG2E = math.log2(math.e)

# Features of the exponential maps below e^-40 (float64: e^-340) of the largest of their own row are lifted to it, so
# that the product of any two is a normal number and every denominator with one visible key is positive. For the q and
# k of a trained layer this is far below rounding. It shows where fp32's range ends: beyond a standard deviation of
# about 4 at head_dim 64, where a query and a key may have no large feature in common.
LEAST_POWER = {torch.float32: -40.0 * _LOG2E, torch.float64: -340.0 * _LOG2E}

# The ε of every generalised kernel f(u) + ε (Choromanski et al. 2020, appendix: 1e-3 for ReLU).
EPSILON = 1e-3


Parts = tuple[str, Tensor, Tensor | None, float]


class FeatureMap(ABC):
    """What attention asks of a kernel. Inputs (..., L, d), raw, in the map's dtype: fp32 or float64."""

    @property
    @abstractmethod
    def positive(self) -> bool:
        """No feature is negative, so a denominator with one visible key is positive."""

    @property
    @abstractmethod
    def features(self) -> int:
        """The size of the feature axis, m."""

    @abstractmethod
    def parts(self) -> Parts:
        """Kind, rows, what is added to the exponents, and log C: all that :func:`from_parts` makes it from."""

    @abstractmethod
    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., L, m) and log-scale (..., L, 1) with φ(q) = features · exp(log_scale).

        Both tensors are fresh. The log-scale carries no gradient: see :meth:`queries_vjp`.
        """

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`queries`, for keys."""
        return self.queries(k)

    @abstractmethod
    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """The gradient with respect to q (..., L, d).

        Args:
            q: as given to :meth:`queries`.
            features: as returned by it.
            grad: (..., L, m), dL/dφ · exp(log_scale): the gradient with respect to the features, the log-scale held
                constant. It may be overwritten. The result is nevertheless the gradient through all of
                φ = features · exp(log_scale).
        """

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """As :meth:`queries_vjp`, for keys."""
        return self.queries_vjp(k, features, grad)


@dataclass(frozen=True, eq=False)
class _Projected(FeatureMap):
    """A map that begins with u = ωᵀx."""

    weight: Tensor  # (m, d): rows ω·d^-1/4, so that x enters scaled without a copy of it

    @property
    def features(self) -> int:
        return self.weight.shape[0]

    @cached_property
    def weight_2(self) -> Tensor:
        """The rows in units of log 2, for :func:`_powers`."""
        return self.weight * _LOG2E


@dataclass(frozen=True, eq=False)
class PositiveExponential(_Projected):
    """φ(x) = C · exp(u + s − ‖x‖²/2), s a constant of the feature: softmax, hyperbolic, oprf and smreg.

    They differ in their rows, in s and in C: see :func:`feature_map`.
    """

    shift: Tensor | None  # s, (m,)
    log_constant: float  # log C
    positive = True

    def parts(self) -> Parts:
        return "exponential", self.weight, self.shift, self.log_constant

    @cached_property
    def shift_2(self) -> Tensor | None:
        return None if self.shift is None else self.shift * _LOG2E

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        features, log_top = _powers(F.linear(q, self.weight_2, self.shift_2))
        return features, log_top.sub_(_half_norm(q)).add_(self.log_constant)

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        d_exponent = grad.mul_(features)
        norm_grad = d_exponent.sum(-1, keepdim=True)
        return torch.addcmul(d_exponent @ self.weight, norm_grad, q, value=-(q.shape[-1] ** -0.5))


@dataclass(frozen=True, eq=False)
class Trigonometric(_Projected):
    """φ(x) = (m/2)^-1/2 · exp(+‖x‖²/2) · [cos u, sin u], as cos(u − phase) with each ω twice. Signed."""

    phase: Tensor  # (m,): 0 for the first half, π/2 for the second
    positive = False

    def parts(self) -> Parts:
        return "trigonometric", self.weight, self.phase, 0.0

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        features = F.linear(q, self.weight, -self.phase).cos_()
        return features, _half_norm(q).sub_(0.5 * math.log(self.features / 2))

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        half = self.features // 2
        (cos, sin), (d_cos, d_sin) = features.split(half, -1), grad.split(half, -1)
        d_u = (d_sin * cos).addcmul_(d_cos, sin, value=-1)
        norm_grad = (grad * features).sum(-1, keepdim=True)
        return torch.addcmul(d_u @ self.weight[:half], norm_grad, q, value=q.shape[-1] ** -0.5)


@dataclass(frozen=True, eq=False)
class ShiftedExponential(_Projected):
    """φ(x) = m^-1/2 · (exp(u) + ε): the generalised kernel of f = exp, with the row's log-scale carried."""

    positive = True

    def parts(self) -> Parts:
        return "exp", self.weight, None, 0.0

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        features, log_top = _powers(q @ self.weight_2.T)
        # Both terms over max exp(u) + ε. A row of hugely negative u is all ε, not 0.
        over_epsilon = log_top - math.log(EPSILON)
        features.mul_(over_epsilon.sigmoid()).add_((-over_epsilon).sigmoid_())
        return features, F.softplus(over_epsilon).add_(math.log(EPSILON) - 0.5 * math.log(self.features))

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        exponentials, log_top = _powers(q @ self.weight_2.T)
        exponentials.mul_((log_top - math.log(EPSILON)).sigmoid_())  # the features less their ε
        return exponentials.mul_(grad) @ self.weight


@dataclass(frozen=True)
class _Activation:
    """f of a generalised kernel, and its derivative."""

    name: str
    value: Callable[[Tensor], Tensor]  # f(u); may overwrite u
    vjp: Callable[[Tensor, Tensor], Tensor]  # (grad, f(u) + ε) -> grad · f′(u)
    positive: bool = True
    needs_u: bool = False  # the derivative does not follow from f(u): vjp is (grad, u) -> grad · f′(u)

    def __reduce__(self) -> tuple[Callable[[str], _Activation], tuple[str]]:
        return _activation, (self.name,)  # functions have no pickle; a decoding state that holds one must


@dataclass(frozen=True, eq=False)
class Generalised(_Projected):
    """φ(x) = C · (f(u) + ε) (Choromanski et al. 2020, section 2.2 with h = 1 and one f)."""

    activation: _Activation
    log_constant: float  # log C

    @property
    def positive(self) -> bool:
        return self.activation.positive

    def parts(self) -> Parts:
        return self.activation.name, self.weight, None, self.log_constant

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        features = self.activation.value(q @ self.weight.T).add_(EPSILON)
        return features, q.new_full((*q.shape[:-1], 1), self.log_constant)

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        of = q @ self.weight.T if self.activation.needs_u else features
        return self.activation.vjp(grad, of) @ self.weight


def _sigmoid_vjp(grad: Tensor, features: Tensor) -> Tensor:
    f = features - EPSILON
    return torch.addcmul(f, f, f, value=-1).mul_(grad)


_ACTIVATIONS = {
    activation.name: activation
    for activation in (
        # One fused pass; a product with a mask is seven times slower on CPUs.
        _Activation(
            "relu", torch.relu_, lambda grad, features: torch.ops.aten.threshold_backward(grad, features, EPSILON)
        ),
        _Activation("sigmoid", torch.sigmoid_, _sigmoid_vjp),
        _Activation("abs", torch.abs_, lambda grad, u: grad * u.sign(), needs_u=True),
        _Activation("gelu", F.gelu, torch.ops.aten.gelu_backward, positive=False, needs_u=True),
        _Activation("cos", torch.cos_, lambda grad, u: grad * u.sin().neg_(), positive=False, needs_u=True),
        _Activation(
            "tanh", torch.tanh_, lambda grad, features: grad * (1 - (features - EPSILON).square_()), positive=False
        ),
        _Activation("identity", lambda u: u, lambda grad, features: grad, positive=False),
        _Activation(
            "elu", lambda u: F.elu_(u).add_(1.0), lambda grad, features: (features - EPSILON).clamp_(max=1.0).mul_(grad)
        ),
    )
}


def _activation(name: str) -> _Activation:
    return _ACTIVATIONS[name]


def not_written(feature_map: FeatureMap | None, language: str) -> str | None:
    """Why our own kernels do not have this map; None if they do."""
    if feature_map is None or feature_map.parts()[0] in ("exponential", "relu"):
        return None
    return f"of the kernels, only {', '.join(OWN_KERNELS)} are written in {language}"


def from_parts(kind: str, weight: Tensor, shift: Tensor | None, log_constant: float) -> FeatureMap:
    """The map that :meth:`FeatureMap.parts` took apart."""
    if kind == "exponential":
        return PositiveExponential(weight, shift, log_constant)
    if kind == "trigonometric":
        assert shift is not None
        return Trigonometric(weight, shift)
    if kind == "exp":
        return ShiftedExponential(weight)
    return Generalised(weight, _ACTIVATIONS[kind], log_constant)


def feature_map(
    kernel: str,
    features: int,
    head_dim: int,
    *,
    seed: int = 0,
    layer: int = 0,
    draw: int | Tensor = 0,
    projection: str = "orthogonal",
    oprf_a: OprfA = 0.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    operands: torch.dtype | None = None,
) -> FeatureMap:
    """The feature map of a kernel (Choromanski et al. 2020, arXiv 2009.14794, unless said otherwise).

    Unbiased for exp(qᵀk/√d):

    - ``softmax``: m^-1/2 · exp(u − ‖x‖²/2) (Lemma 1).
    - ``hyperbolic``: m^-1/2 · exp(−‖x‖²/2) · [exp(u), exp(−u)] from m/2 projections.
    - ``oprf``: m^-1/2 · (1−4A)^{d/4} · exp(A‖ω‖² + √(1−4A)·u − ‖x‖²/2), A = ``oprf_a`` ≤ 0 (FAVOR++, Likhosherstov et
      al. 2022, arXiv 2205.15317). A = 0 is ``softmax``; :func:`longseq.attention.oprf.oprf_parameter`
      gives the A of least variance.
    - ``sderf``, ``aderf``: the same with A diagonal, ``oprf_a`` a number a coordinate, for q and k that
      :class:`longseq.attention.frames.Frame` has turned to the coordinates of least variance (FAVOR#, Likhosherstov et
      al. 2023, arXiv 2302.00787).
    - ``trigonometric``: (m/2)^-1/2 · exp(+‖x‖²/2) · [cos u, sin u] from m/2 projections. Signed, so that denominators
      may vanish: for comparison.

    Kernels of their own:

    - ``smreg``: ``softmax`` with rows of length √d, the regularised softmax kernel.
    - ``relu``, ``sigmoid``, ``exp``, ``abs``, ``elu`` (elu(u) + 1), and the signed ``gelu``, ``cos``, ``tanh``,
      ``identity``: m^-1/2 · (f(u) + 1e-3), u of the same scaled input.
    - ``relu_direct``: ReLU(x) + 1e-3, no projection.

    Args:
        kernel: one of :data:`longseq.attention.KERNELS`.
        features: size of the feature axis, m: what the kernel costs. ``relu_direct`` has head_dim features whatever is
            asked for.
        head_dim: d.
        seed, layer, draw: the projection is a function of these three numbers.
        projection: "orthogonal" (blocks of d orthogonal rows) or "iid".
        oprf_a: A, for ``oprf``, or a tuple of head_dim of them for ``sderf`` and ``aderf``.
        device: of the inputs to come.
        dtype: what features are computed in; fp32 or float64.
        operands: what the inputs to come are. For bf16 and fp16 the rows ω·d^-1/4 are rounded to it, once, so that all
            backends multiply by the same numbers. They are held in ``dtype`` all the same.

    Raises:
        ValueError: for a name that is not known or a number that the kernel cannot have.
    """
    AttentionOptions(kernel=kernel, features=features, projection=projection).check(oprf_a=oprf_a)
    if dtype not in LEAST_POWER:
        raise ValueError(f"feature maps compute in torch.float32 or torch.float64; got {dtype}")
    scale = head_dim**-0.25
    half = operands in HALF
    exact = torch.float64 if half else dtype  # rounded once, not twice

    if kernel == "relu_direct":
        weight = torch.eye(head_dim, device=device, dtype=exact) * scale
        return Generalised(weight.to(operands).to(dtype) if half else weight, _ACTIVATIONS["relu"], 0.0)
    omega = projection_matrix(
        features // 2 if kernel in PAIRED_KERNELS else features,
        head_dim,
        seed=seed,
        layer=layer,
        draw=draw,
        orthogonal=projection == "orthogonal",
        rows="sqrt_d" if kernel == "smreg" else "chi",
        device=device,
        dtype=exact,
    )
    log_constant, factors = -0.5 * math.log(features), (scale, stretch(oprf_a)) if oprf_a else (scale,)
    if half and operands is not None:
        weight = (_rounded if is_traced() else _kept_rounded)(omega, factors, operands, dtype)
    else:
        weight = _scaled(omega, factors)
    if kernel in ("softmax", "smreg"):
        return PositiveExponential(weight, None, log_constant)
    if kernel == "hyperbolic":
        return PositiveExponential(torch.cat((weight, -weight)), None, log_constant)
    if kernel in ("oprf", *FRAMED_KERNELS):
        return PositiveExponential(weight, shift(omega, oprf_a, dtype), log_constant + log_factor(oprf_a, head_dim))
    if kernel == "trigonometric":
        phase = torch.zeros_like(weight[:, 0])
        return Trigonometric(torch.cat((weight, weight)), torch.cat((phase, phase + math.pi / 2)))
    if kernel == "exp":
        return ShiftedExponential(weight)
    return Generalised(weight, _ACTIVATIONS[kernel], log_constant)


def _scaled(omega: Tensor, factors: tuple[OprfA, ...]) -> Tensor:
    for factor in factors:
        by = torch.tensor(factor, dtype=omega.dtype, device=omega.device) if isinstance(factor, tuple) else factor
        omega = omega * by
    return omega


def _rounded(omega: Tensor, factors: tuple[OprfA, ...], operands: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rows of 16-bit operands, in ``dtype``."""
    with torch.inference_mode(False), torch.no_grad():
        return _scaled(omega, factors).to(operands).to(dtype)


_narrow = WeakTensorKeyDictionary()  # a layer's rows are cached, and so are these as long as they live


def as_operands(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A map's rows, contiguous and in the operands' dtype, to which they are rounded already: cast once for a draw."""
    if weight.dtype == dtype or is_traced(weight):
        return weight.to(dtype).contiguous()
    found: dict[torch.dtype, Tensor] = _narrow.setdefault(weight, {})
    if dtype not in found:
        with torch.inference_mode(False):
            found[dtype] = weight.detach().to(dtype).contiguous()
    return found[dtype]


_kept_rounded = functools.lru_cache(maxsize=512)(_rounded)  # ω is a cached tensor: each layer's is found by identity


def _powers(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent over the largest of its row, floored, in place; and the natural log of that largest (..., 1)."""
    # exp2 is three to four times quicker than exp on a CPU.
    top = exponent.amax(-1, keepdim=True)
    return exponent.sub_(top).clamp_(min=LEAST_POWER[exponent.dtype]).exp2_(), top.mul_(math.log(2))


def _half_norm(q: Tensor) -> Tensor:
    """‖x‖²/2 (..., 1) of x = q·d^-1/4."""
    return q.square().sum(-1, keepdim=True).mul_(0.5 * q.shape[-1] ** -0.5)
