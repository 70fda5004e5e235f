"""The peak of tensors' memory, against allocations whose size is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.measure.peaks import available, peak

CPU = torch.device("cpu")
MB = 1_000_000


def megabytes(n: int) -> Tensor:
    return torch.empty(n * MB, dtype=torch.uint8)


def test_peak_counts_what_is_alive_at_the_same_time():
    def call() -> tuple[Tensor, ...]:
        a, b = megabytes(4), megabytes(2)
        del a
        return b, megabytes(1)

    assert peak(call, CPU) == (6 * MB, 3 * MB)


def test_peak_leaves_out_what_was_there_before():
    kept = [megabytes(50)]

    def call() -> tuple[Tensor, ...]:
        return (kept[0].clone(),)

    assert peak(call, CPU) == (50 * MB, 50 * MB)


def test_peak_sees_the_memory_that_an_operator_takes_and_releases_inside():
    x = torch.randn(1, 1, 600, 64)

    def call() -> tuple[Tensor, ...]:
        mask = torch.zeros(600, 600)  # takes the path that computes the whole matrix
        return (torch.softmax(F.linear(x, x[0, 0]) + mask, -1) @ x,)

    highest, returned = peak(call, CPU)
    assert returned == 600 * 64 * 4
    assert 3 * 600 * 600 * 4 <= highest <= 4 * 600 * 600 * 4 + returned


def test_peak_includes_the_backward_pass():
    x = torch.ones(MB, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x.exp().sum(), x)

    highest, returned = peak(call, CPU)
    assert returned == 4 * MB
    assert 8 * MB <= highest < 8 * MB + 1000  # exp(x), kept for its derivative, and the gradient


def test_the_recording_ends_with_an_error_inside():
    def call() -> tuple[Tensor, ...]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peak(call, CPU)
    assert peak(lambda: (megabytes(1),), CPU) == (MB, MB)


def test_some_memory_is_available():
    assert available(CPU) > MB
