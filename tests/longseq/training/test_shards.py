"""The training state in files: safetensors that anybody can read, and pieces that fit whoever needs them."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from longseq.config.training import OptimConfig
from longseq.errors import RunError
from longseq.training.optim import build_optimizer
from longseq.training.optimizer_state import Piece, holder_of, optimizer_step, set_optimizer_step
from longseq.training.shards import pack, restore, shard_name, snapshot, unpack, write


class Cut:
    """A holder of some range of a weight "w" of 10 elements."""

    replicated, base = False, None

    def __init__(self, start: int, end: int, fill: bool):
        values = torch.arange(10.0)[start:end] if fill else torch.full((end - start,), -1.0)
        self.piece = Piece("w", start, {"fp32": values, "exp_avg": values + 100, "exp_avg_sq": values + 200})

    def pieces(self):
        yield self.piece

    def refresh(self) -> None:
        pass


@pytest.mark.interfaces
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_what_is_written_is_what_safetensors_reads(tmp_path, dtype):
    tensors = {"a": torch.arange(7).to(dtype), "b c": torch.arange(6).to(dtype).view(2, 3).T, "none": torch.ones(0, 2)}
    written = write(tmp_path / "deeper" / "x.safetensors", tensors)
    content = (tmp_path / "deeper" / "x.safetensors").read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    read = load_file(tmp_path / "deeper" / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


@pytest.mark.parametrize("written", [(0, 10), (0, 4, 10), (0, 1, 5, 9, 10), (0, 3, 6, 10)])
@pytest.mark.parametrize("read", [(0, 10), (0, 5, 10), (0, 2, 3, 7, 10)])
def test_pieces_cut_anywhere_fit_pieces_cut_elsewhere(tmp_path, written, read):
    for rank, (start, end) in enumerate(pairwise(written)):
        write(tmp_path / shard_name(rank), snapshot(Cut(start, end, fill=True), rank))
    for start, end in pairwise(read):
        holder = Cut(start, end, fill=False)
        restore(holder, tmp_path)
        assert holder.piece.tensors["fp32"].tolist() == list(range(start, end))
        assert holder.piece.tensors["exp_avg_sq"].tolist() == [200 + i for i in range(start, end)]


def test_a_piece_that_nobody_wrote_is_named(tmp_path):
    write(tmp_path / shard_name(0), snapshot(Cut(0, 6, fill=True), 0))
    with pytest.raises(RunError, match="no fp32 of w from element 6 on"):
        restore(Cut(3, 8, fill=False), tmp_path)


def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    optimizer = build_optimizer(model, OptimConfig(), 4)
    for _ in range(steps):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_restored_optimiser_makes_the_same_next_step(tmp_path):
    model, optimizer = trained(3)
    holder = holder_of(model, optimizer)
    write(tmp_path / shard_name(0), snapshot(holder, 0))
    assert snapshot(holder, 1) == {}, "every rank has the same: the first one writes it"
    again, other = trained(0)
    fresh = holder_of(again, other)
    restore(fresh, tmp_path)
    set_optimizer_step(fresh, optimizer_step(holder))
    for module, adam in ((model, optimizer), (again, other)):
        module(torch.arange(5)).square().sum().backward()
        adam.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_snapshot_does_not_follow_the_weights(tmp_path):
    model, optimizer = trained(1)
    taken = snapshot(holder_of(model, optimizer), 0)
    before = {name: tensor.clone() for name, tensor in taken.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(taken[name], before[name]) for name in before)


def test_a_second_snapshot_takes_the_memory_of_the_first_and_the_values_of_now():
    model, optimizer = trained(1)
    first = snapshot(holder_of(model, optimizer), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    second = snapshot(holder_of(model, optimizer), 0, into=first)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == {n: t.data_ptr() for n, t in first.items()}
    assert all(
        torch.equal(second[f"fp32:0:{name}"], parameter.flatten()) for name, parameter in model.named_parameters()
    )


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/evil"),))


def test_counters_are_read_without_executing_what_a_stranger_put_there(tmp_path):
    (tmp_path / "good.pt").write_bytes(pack({"step": 3, "loops": {"a": [1, 2.5, None]}, "t": torch.ones(2)}))
    assert unpack(tmp_path / "good.pt")["loops"] == {"a": [1, 2.5, None]}
    (tmp_path / "evil.pt").write_bytes(pack({"step": Evil()}))
    with pytest.raises(Exception, match="Weights only load failed"):
        unpack(tmp_path / "evil.pt")
