"""CUDA streams, played: copies on a stream of its own are made when somebody has waited for it, and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from longseq import pinned


class Stream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def wait_stream(self, other: Stream) -> None:
        self.streams.notes.append(f"{self.name} waits for {other.name}")
        other.streams.catch_up(other)

    def synchronize(self) -> None:
        """In a thread that writes: as late as it can be, which is when the training has waited, or has ended."""
        self.streams.held.wait(1.0)
        self.streams.catch_up(self)


class Streams:
    """Notes, in their order: what waits for what, and which copies are asked for on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.notes: list[str] = []
        self.pinned: list[tuple[int, ...]] = []
        self.held = threading.Event()  # the computation has waited since the last copy was asked for
        self.main, self.beside = Stream(self, "main"), Stream(self, "beside")
        self._now, self._work, self._lock = self.main, list[Callable[[], Any]](), threading.Lock()
        empty, copy = torch.empty, torch.Tensor.copy_

        def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            if not pin_memory:
                return empty(*args, **kwargs)
            self.pinned.append(tuple(args[0]))
            self.notes.append("pinned memory")
            return empty(*args, **kwargs).fill_(77)  # which nobody may read

        def copy_(to: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> torch.Tensor:
            if not (non_blocking and self._now is self.beside):
                return copy(to, source, non_blocking)
            self.notes.append("out on beside")
            self.held.clear()
            with self._lock:
                self._work.append(lambda: copy(to, source))
            return to

        monkeypatch.setattr(pinned, "on_gpu", lambda x: True)
        monkeypatch.setattr(pinned, "stream_for", lambda purpose, device: self.beside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch, "empty", make)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        used = "record_stream"
        monkeypatch.setattr(torch.Tensor, used, lambda tensor, stream: self.notes.append(f"used by {stream.name}"))

    def catch_up(self, stream: Stream) -> None:
        if stream is self.beside:
            with self._lock, torch.no_grad():
                for work in self._work:
                    work()
                self._work.clear()
            self.held.set()

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._now = self._now, stream
        yield
        self._now = before
