"""TF32 is for linear layers: attention's fp32 products stay fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode

from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map
from longseq.attention.scan import Rows


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class Products(TorchFunctionMode):
    """Notes what is allowed wherever fp32 matrices are multiplied."""

    NAMES = ("linear", "bmm", "matmul", "baddbmm", "baddbmm_", "__matmul__", "addmm")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.seen.append(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


def test_attention_multiplies_in_fp32_and_leaves_the_setting() -> None:
    q, k, v = (torch.randn(2, 150, 16) for _ in "qkv")
    phi = feature_map("softmax", 32, 16)
    engine, rows = backends.choose("torch", phi, (q, k, v)), Rows(q, k, v, None, None, None, phi, 0)

    def scanned() -> None:
        done = engine.scan_forward(rows, None, True)
        engine.scan_backward(rows, done.out, done.inverse_den, done.kept, done.out, None, None, False)

    def whole() -> None:
        out, kept = engine.bidirectional_forward(rows, None)
        engine.bidirectional_backward(rows, None, out, kept, out)

    def near() -> None:
        out, lse = engine.window_forward(rows, 9, True)
        engine.window_backward(rows, 9, True, out, lse, out, None, False)

    for operation in (scanned, whole, near, lambda: engine.sum_up(k, v, None, None, phi)):
        with Products() as products:
            operation()
        assert set(products.seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
