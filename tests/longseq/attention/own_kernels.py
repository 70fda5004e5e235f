"""What the tests of our own kernels share: inputs, and results with all gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import operations
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.gates import running
from longseq.attention.scan import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 24, 40, 100  # no power of two
BLIND = -1e20  # a log-denominator below is that of a query without keys

SCANS = [
    # kernel, length, delay, what else is given
    ("softmax", 1, 0, ()),
    ("softmax", 2, 1, ()),
    ("softmax", 127, 0, ()),
    ("hyperbolic", 128, 0, ("hidden",)),
    ("oprf", 129, 3, ("decay",)),
    ("aderf", 129, 3, ("runs",)),
    ("smreg", 100, 64, ("runs",)),
    ("relu", 129, 0, ("runs", "hidden")),
    ("relu", 127, 70, ("decay",)),
    ("relu_direct", 65, 1, ()),
    ("softmax", 65, 500, ("hidden", "runs", "decay")),
    ("softmax", 301, 37, ("hidden", "runs", "decay")),
    ("softmax", 129, 0, ("gate",)),
    ("relu", 301, 37, ("hidden", "runs", "gate")),
    ("softmax", 65, 500, ("gate",)),
]
BIDIRECTIONALS = [
    # kernel, queries, keys, what else is given
    ("softmax", 1, 1, ()),
    ("softmax", 40, 200, ("hidden",)),
    ("hyperbolic", 70, 2, ()),
    ("oprf", 127, 127, ("hidden",)),
    ("relu", 65, 129, ("hidden",)),
]
WINDOWS = [
    # length, window, what else is given
    (1, 7, ()),
    (2, 1, ()),
    (129, 1, ("hidden",)),
    (129, 64, ("decay",)),
    (127, 500, ("runs",)),
    (301, 65, ("hidden", "runs", "decay")),
    (129, 64, ("gate",)),
    (301, 65, ("hidden", "runs", "gate")),
]


def scan(
    q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, *, delay: int = 0, backend: str = "torch", **given: Tensor
) -> tuple[Tensor, Tensor]:
    """The operations by the names that :func:`rows` gives."""
    return operations.scan(Rows(q, k, v, phi=phi, delay=delay, **given), backend)


def bidirectional_attention(
    q: Tensor, k: Tensor, v: Tensor, phi: FeatureMap, hidden: Tensor | None = None, *, backend: str = "torch"
) -> Tensor:
    return operations.bidirectional_attention(Rows(q, k, v, hidden=hidden, phi=phi), backend)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, causal: bool, backend: str = "torch", **given: Tensor
) -> tuple[Tensor, Tensor]:
    return operations.window_attention(Rows(q, k, v, **given), window, causal, backend)


def rows(length: int, device: str = DEVICE, **kinds: bool) -> dict[str, Tensor]:
    """q, k, v and of the optional arguments those asked for."""
    rng = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    given = {
        "q": random(ROWS, length, HEAD_DIM),
        "k": random(ROWS, length, HEAD_DIM),
        "v": random(ROWS, length, VALUE_DIM),
        "hidden": random(ROWS, length) < -0.5,
        "runs": (random(ROWS, length) > 1.8).cumsum(1),
        "decay": torch.tensor([0.03, 0.4], device=device).view(ROWS, 1, 1),
        "gate": running(F.logsigmoid(random(ROWS, length) + 2)),
    }
    return {name: x for name, x in given.items() if kinds.get(name, name in "qkv")}


def results(operation: Callable[..., Tensor | tuple[Tensor, Tensor]], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse, and the gradients of a fixed function of both, of everything that can have one."""
    given = {n: x.detach().clone().requires_grad_() if x.is_floating_point() else x for n, x in given.items()}
    learned = {name: x for name, x in given.items() if x.requires_grad}
    with torch.enable_grad():
        found = operation(**given)
    out, lse = found if isinstance(found, tuple) else (found, found.new_zeros(1))
    lse = torch.where(lse < BLIND, 0.0, lse)
    rng = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=rng).to(x)).sum() for x in (out, lse))
    grads = torch.autograd.grad(loss, list(learned.values()), materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **{"d" + n: g for n, g in zip(learned, grads, strict=True)}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, x in expected.items():
        error = (found[name].double() - x).norm() / x.norm().clamp_min(1.0)
        assert error < tolerance, f"{name}: {error:.1e}"


def maps(kernel: str, head_dim: int = HEAD_DIM, device: str = DEVICE) -> tuple[FeatureMap, FeatureMap]:
    """In fp32 and in float64."""
    a = {"oprf": -0.05, "aderf": tuple(-0.004 * place for place in range(head_dim))}.get(kernel, 0.0)
    single, double = (
        feature_map(kernel, FEATURES, head_dim, oprf_a=a, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.float64)
    )
    return single, double


def double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def poison_hidden(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """NaN in every hidden k and v: none may be used."""
    if "hidden" not in given:
        return given
    mask = given["hidden"][..., None]
    return {name: x.masked_fill(mask, torch.nan) if name in "kv" else x for name, x in given.items()}
