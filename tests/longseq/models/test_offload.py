"""What is copied to the CPU for recomputations, on which stream, and that gradients are those of what was there."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from gpu_streams import Streams
from longseq.models import offload
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

SIZES = {"vocabulary": 29, "dim": 16, "depth": 3, "heads": 2, "ffn_dim": 24, "features": 8}


def gradients(activation_offload: bool) -> list[torch.Tensor]:
    spec = PerformerSpec(**SIZES, causal=True, activation_checkpointing=True, activation_offload=activation_offload)
    torch.manual_seed(3)
    model = PerformerLM(spec).train()
    tokens = torch.randint(25, (2, 33))
    model(tokens, targets=tokens)[0].backward()
    return [parameter.grad for parameter in model.parameters()]


def test_each_block_sends_its_input_alone_beside_the_computation(monkeypatch: pytest.MonkeyPatch):
    plain, streams = gradients(activation_offload=False), Streams(monkeypatch)
    begin, fetch = offload._Offloaded.begin, offload._Offloaded.fetch

    def back(self):
        streams.notes.append("back begins")
        begin(self)

    def wanted(self):
        streams.notes.append("wanted")
        return fetch(self)

    monkeypatch.setattr(offload._Offloaded, "begin", back)
    monkeypatch.setattr(offload._Offloaded, "fetch", wanted)
    found = gradients(activation_offload=True)
    assert streams.pinned == [(2, 33, 16)] * 3  # the residual stream, and no table that all blocks share
    assert streams.notes[:12] == ["pinned memory", "beside waits for main", "out on beside", "used by beside"] * 3
    # The last block's input is asked for when it is wanted, those before it while the block behind is computed.
    back = ["main waits for beside", "used by main"]
    following = ["back begins", "wanted", *back]
    assert streams.notes[12:] == ["wanted", "back begins", *back, *following, *following]
    for gradient, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_nothing_is_copied_where_there_is_no_other_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offload, "_Offloaded", mock.Mock(side_effect=AssertionError))
    plain = gradients(activation_offload=False)
    for gradient, expected in zip(gradients(activation_offload=True), plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
