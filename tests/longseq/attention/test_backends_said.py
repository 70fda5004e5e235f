"""That attention runs by PyTorch where our kernels could not is said, once, with the reason."""

from __future__ import annotations

import logging

import torch

from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map


def test_a_fall_back_to_pytorch_is_said_once_with_the_reason(caplog):
    backends._say_once.cache_clear()
    rows = (torch.zeros(1, 4, 8),) * 3
    phi = feature_map("cos", 16, 8)
    with caplog.at_level(logging.WARNING, "longseq"):
        for _ in range(2):
            assert backends.name_of(backends.choose("auto", phi, rows)) == "torch"
    (said,) = caplog.messages
    assert ", not by the native CPU kernels: of the kernels, only softmax" in said
    assert "a loop in Python over chunks" in said


def test_who_asks_for_pytorch_is_told_nothing(caplog):
    backends._say_once.cache_clear()
    rows = (torch.zeros(1, 4, 8),) * 3
    with caplog.at_level(logging.WARNING, "longseq"):
        assert backends.name_of(backends.choose("torch", feature_map("cos", 16, 8), rows)) == "torch"
    assert caplog.messages == []
