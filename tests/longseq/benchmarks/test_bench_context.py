"""``longseq bench context``: what its model says, and what it measures of two processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longseq.benchmarks import context
from longseq.benchmarks.context_model import H100, Cluster, Link, gathers, predict, state_bytes
from longseq.models.performer import PerformerLM

REQUEST = context.ContextRequest(
    lengths=(512, 1024), processes=(1, 2), preset="tiny", features=16, tile=128, gpu=H100, warmups=0
)


def cell(length, processes, seconds):
    states = state_bytes(REQUEST.spec) * (processes > 1)
    return context.Cell(length, processes, [seconds], seconds * processes, 2**28, 3, states, 0, 5.5, 1e-4, 1e9)


CELLS = [cell(512, 1, 1.0), cell(512, 2, 0.6), cell(1024, 1, 2.0), cell(1024, 2, 1.1)]


def test_two_processes_send_what_the_formula_says_and_have_the_loss_of_one(monkeypatch):
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # some megabytes on the stderr of each, more than a pipe holds
    request = replace(REQUEST, lengths=(512,), processes=(2,))
    found = []
    context.measure(request, found.append)
    spec = request.spec
    assert [(c.length, c.processes) for c in found] == [(512, 2)]
    assert found[0].gathered == state_bytes(spec) == spec.heads * (spec.features * (spec.head_dim + 1) + 1) * 4
    assert found[0].gathers == gathers(spec, 256) == 3
    assert found[0].seconds[0] > 0 < found[0].cpu
    assert found[0].memory > 2**26
    torch.manual_seed(0)
    model = PerformerLM(spec)
    tokens = torch.randint(spec.vocabulary, (1, 513), generator=torch.Generator().manual_seed(512))
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0].item() / 512
    assert found[0].loss == pytest.approx(loss, rel=1e-5)


def test_the_model_has_the_time_of_one_process_and_a_link_that_costs():
    here = context.calibrated(CELLS, REQUEST.spec, 1)
    assert predict(REQUEST.spec, here, 1024, 1).seconds == pytest.approx(2.0)
    free = Cluster(here.flops, Link(1e30, 0.0), Link(1e30, 0.0))
    ideal = predict(REQUEST.spec, free, 1024, 2)
    assert ideal.seconds == pytest.approx(ideal.compute + ideal.passes)
    assert ideal.compute == pytest.approx(1.0)
    assert predict(REQUEST.spec, here, 1024, 2).seconds > ideal.seconds


def test_slices_no_longer_than_a_tile_are_computed_once():
    """As the model does, which knows tiles only where a slice has several."""
    several, one = (predict(REQUEST.spec, H100, length, 2) for length in (512, 256))  # tiles of 128
    assert several.compute == pytest.approx(2 * 4 / 3 * one.compute)
    assert several.states == pytest.approx(3 / 2 * one.states)


def test_what_crosses_the_link_does_not_depend_on_the_length():
    short, long = (predict(REQUEST.spec, H100, length, 64) for length in (2**14, 2**20))
    assert short.states == long.states > 0
    assert short.gradient == long.gradient > 0


def test_weak_scaling_on_gpus_is_better_than_strong():
    rows = context.extrapolation(REQUEST)
    assert [row.devices for row in rows] == [8, 16, 32, 64, 128, 256, 512]
    assert all(0 < row.strong_efficiency <= row.weak_efficiency < 1 for row in rows[3:])


def test_table_picture_and_numbers_have_every_cell():
    table = context.table(REQUEST, CELLS)
    assert table.count("1.82×") == 1  # 2.0 / 1.1
    assert f"{state_bytes(REQUEST.spec):,} bytes" in table
    assert len(context.numbers(REQUEST, CELLS)["cells"]) == 4
    pytest.importorskip("matplotlib")
    assert len(context.figure(REQUEST, CELLS).axes) == 3


def test_without_a_second_process_no_link_is_made_up():
    alone = replace(cell(512, 1, 1.0), latency=0.0, bandwidth=0.0)
    assert "no link" in context.table(replace(REQUEST, processes=(1,)), [alone])


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(Exception, match="3 processes do not share"):
        context.measure(replace(REQUEST, processes=(3,)), print)
