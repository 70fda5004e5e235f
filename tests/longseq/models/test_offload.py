"""What is copied to the CPU for recomputations, on which stream, and that gradients are those of what was there.

Streams are played: work on them is done at once, and noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from longseq.models import offload
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

SIZES = {"vocabulary": 29, "dim": 16, "depth": 3, "heads": 2, "ffn_dim": 24, "features": 8}


class Streams:
    """Notes, in their order: what waits for what, and which copies are made on which stream."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.now = "main"
        self.pinned: list[tuple[int, ...]] = []

    def stream(self, name: str) -> mock.Mock:
        found = mock.Mock()
        found.name_ = name
        found.wait_stream = lambda other: self.notes.append(f"{name} waits for {other.name_}")
        return found

    @contextmanager
    def on(self, stream: mock.Mock) -> Iterator[None]:
        before, self.now = self.now, stream.name_
        yield
        self.now = before

    def empty(self, *args, pin_memory=False, make=torch.empty, **kwargs):
        if pin_memory:
            self.pinned.append(tuple(args[0]))
            self.notes.append("pinned memory")
        return make(*args, **kwargs)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    main, beside = streams.stream("main"), streams.stream("beside")
    monkeypatch.setattr(offload, "on_gpu", lambda x: True)
    monkeypatch.setattr(offload, "_stream", lambda device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(torch, "empty", streams.empty)
    kept, begin, fetch = torch.Tensor.copy_, offload._Offloaded.begin, offload._Offloaded.fetch

    def copy(tensor, *args, non_blocking=False, **kwargs):
        if non_blocking:
            streams.notes.append(f"out on {streams.now}")
        return kept(tensor, *args, **kwargs)

    def back(self):
        streams.notes.append("back begins")
        begin(self)

    def wanted(self):
        streams.notes.append("wanted")
        return fetch(self)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: streams.notes.append(f"used by {stream.name_}")
    )
    monkeypatch.setattr(offload._Offloaded, "begin", back)
    monkeypatch.setattr(offload._Offloaded, "fetch", wanted)
    return streams


def gradients(activation_offload: bool) -> list[torch.Tensor]:
    spec = PerformerSpec(**SIZES, causal=True, activation_checkpointing=True, activation_offload=activation_offload)
    torch.manual_seed(3)
    model = PerformerLM(spec).train()
    tokens = torch.randint(25, (2, 33))
    model(tokens, targets=tokens)[0].backward()
    return [parameter.grad for parameter in model.parameters()]


def test_each_block_sends_its_input_alone_beside_the_computation(streams):
    found = gradients(activation_offload=True)
    assert streams.pinned == [(2, 33, 16)] * 3  # the residual stream, and no table that all blocks share
    out = ["pinned memory", "beside waits for main", "out on beside", "used by beside"]
    assert streams.notes[:12] == out * 3
    # The last block's input is asked for when it is wanted, those before it while the block behind is computed.
    back = ["main waits for beside", "used by main"]
    following = ["back begins", "wanted", *back]
    assert streams.notes[12:] == ["wanted", "back begins", *back, *following, *following]
    for gradient, plain in zip(found, gradients(activation_offload=False), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=0)


def test_nothing_is_copied_where_there_is_no_other_memory(monkeypatch):
    monkeypatch.setattr(offload, "_Offloaded", mock.Mock(side_effect=AssertionError))
    plain = gradients(activation_offload=False)
    for gradient, expected in zip(gradients(activation_offload=True), plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
