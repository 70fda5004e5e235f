"""What attention may be asked for: one dataclass, its check and its help texts. No torch here.

The configuration's section ``attention``, a model's spec, a layer and a call all hold these options as a whole.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, SupportsIndex

LARGEST = 2**63 - 1

OprfA = float | tuple[float, ...]  # A of the kernels oprf, sderf and aderf

KINDS = ("favor", "exact")
KERNELS = (
    "softmax", "hyperbolic", "oprf", "sderf", "aderf", "trigonometric", "smreg", "relu_direct", "exp",
    "relu", "sigmoid", "abs", "gelu", "cos", "tanh", "identity", "elu",
)  # fmt: skip
PAIRED_KERNELS = ("hyperbolic", "trigonometric")  # two features a projection
SIGNED_KERNELS = ("trigonometric", "gelu", "cos", "tanh", "identity")  # their denominators may vanish
FRAMED_KERNELS = ("sderf", "aderf")  # a number A a coordinate, and constants of each head
OWN_KERNELS = (  # written in C++ and in Triton
    "softmax", "hyperbolic", "oprf", *FRAMED_KERNELS, "smreg", "relu", "relu_direct",
)  # fmt: skip
PROJECTIONS = ("orthogonal", "iid")
BACKENDS = ("auto", "torch", "native", "triton")


def integer(name: str, value: SupportsIndex, least: int = 0) -> int:
    """A plain int of whatever is one: Python's, NumPy's, or a tensor of one integer. 3.0 and True are none.

    Raises:
        TypeError: for anything else.
        ValueError: below ``least`` or above 2^63 − 1.
    """
    if type(value) is not int:
        is_bool = isinstance(value, bool) or str(getattr(value, "dtype", None)) in ("bool", "torch.bool")
        try:
            number = None if is_bool else operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None:
            raise TypeError(f"{name} must be an integer, got {value!r}, a {type(value).__name__}")
        value = int(number)
    if not least <= value <= LARGEST:
        raise ValueError(f"{name} must be an integer from {least} to 2^63 - 1, got {value}")
    return value


def option(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
) -> Any:
    """A field that carries its meaning and its limits."""
    metadata = {"meaning": meaning, "choices": choices, "at_least": at_least, "below": below}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The options of a layer; each is explained by its help text."""

    kind: str = option("favor", "FAVOR+, or exact softmax attention over the same weights", choices=KINDS)
    kernel: str = option("softmax", "feature map of FAVOR+", choices=KERNELS)
    features: int = option(256, "random features per head (m)", at_least=1)
    qk_norm: bool = option(
        False, "unit-length queries and keys with a learned temperature per head (next to no effect with kernel relu)"
    )
    window: int = option(
        0, "exact attention to keys nearer than this many positions, features beyond; 0: none", at_least=0
    )
    learned_share: bool = option(False, "a learned factor a head on all weights beyond the window")
    learned_decay: bool = option(False, "weights decay with the distance, at a rate that each head learns")
    forget_gate: bool = option(
        False, "weights decay at a rate that each head learns to read off the token: forget gates (arXiv 2503.02130)"
    )
    learned_covariance: bool = option(
        False, "each head learns the covariance of its projections, which begins as 1: DARKFormer (arXiv 2603.04127)"
    )
    projection: str = option("orthogonal", "rows of the random projections", choices=PROJECTIONS)
    backend: str = option(
        "auto",
        "auto: our own kernels where they can (Triton on CUDA, native C++ on CPU), else PyTorch",
        choices=BACKENDS,
    )
    redraw_every: int = option(1000, "optimiser steps between draws of the projections; 0: never", at_least=0)

    def check(
        self, *, causal: bool = True, documents: str = "", decays: str = "", oprf_a: OprfA = 0.0, at: str = ""
    ) -> None:
        """Refuse what no attention can do.

        Args:
            documents, decays: what asks for documents in a row, or for a decay; empty: there are none.
            oprf_a: the constant of kernel ``oprf``; of ``sderf`` and ``aderf`` a tuple, or 0.
            at: written before an option's name, as ``attention.`` in a configuration.

        Raises:
            ValueError: for names that are not known, and options that exclude each other.
            TypeError: for sizes that are no integers.
        """
        favor, kernel, window = self.kind == "favor", self.kernel, self.window
        for name in ("kind", "backend", *(("kernel", "projection") if favor else ())):
            if getattr(self, name) not in CHOICES[name]:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; the {name}s are {', '.join(CHOICES[name])}")
        integer(f"{at}window", window)
        integer(f"{at}features", self.features, least=0 if window else 1)
        if self.forget_gate and self.learned_decay:
            raise ValueError(
                f"{at}forget_gate=true and {at}learned_decay=true: a gate begins as the decay does and learns more; "
                "take one of them"
            )
        if not favor:
            return
        if kernel in PAIRED_KERNELS and self.features % 2:
            raise ValueError(
                f"{at}features={self.features} is odd; kernel {kernel} has two features a projection: take an even one"
            )
        if self.signed and window and self.features:
            raise ValueError(
                f"{at}window={window} and {at}kernel={kernel}: its features have both signs and cannot share a "
                "denominator with exact weights; take kernel softmax, or window 0"
            )
        own = next((name for name in ("learned_decay", "forget_gate") if getattr(self, name)), "")
        asked = documents or decays or (f"{at}{own}=true" if own else "")
        if self.signed and asked and not causal:
            raise ValueError(
                f"{asked} and {at}kernel={kernel} with a masked objective (keys on both sides): features of both signs "
                "cannot share two denominators; take kernel softmax or relu"
            )
        each = oprf_a if isinstance(oprf_a, tuple) else (oprf_a,)
        if not all(math.isfinite(a) and a <= 0 for a in each):
            raise ValueError(f"oprf_a must be a finite number, 0 or below; got {oprf_a}")
        if isinstance(oprf_a, tuple) and kernel not in FRAMED_KERNELS:
            raise ValueError(f"oprf_a is one number for kernel {kernel!r}; only sderf and aderf have one a coordinate")
        if any(each) and kernel not in ("oprf", *FRAMED_KERNELS):
            raise ValueError(f"oprf_a belongs to kernel 'oprf'; kernel {kernel!r} got {oprf_a}, set it to 0")

    @property
    def has_features(self) -> bool:
        """Whether it sees keys by features."""
        return self.kind == "favor" and self.features > 0

    @property
    def signed(self) -> bool:
        """Whether its features have both signs, which no two denominators can share."""
        return self.kind == "favor" and self.kernel in SIGNED_KERNELS

    def draw_at(self, step: int) -> int:
        """Which draw of the projections optimiser step ``step`` uses."""
        return step // self.redraw_every if self.redraw_every else 0


OPTIONS = tuple(field.name for field in dataclasses.fields(AttentionOptions))
CHOICES = {field.name: field.metadata["choices"] for field in dataclasses.fields(AttentionOptions)}
