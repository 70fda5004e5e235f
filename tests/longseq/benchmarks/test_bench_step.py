"""`longseq bench step`: one model, its attention exchanged, each step a real one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from command_line import longseq
from longseq.attention.options import AttentionOptions
from longseq.benchmarks import step
from longseq.benchmarks.request import STEP_USUAL, StepRequest
from longseq.models.compiling import missing_compiler
from longseq.models.performer import PerformerLM

REQUEST = StepRequest(
    lengths=(40, 80), directions=("causal",), contenders=STEP_USUAL, preset="tiny", features=16, window=9
)


def test_a_table_and_its_numbers_are_kept(tmp_path):
    arguments = ["--preset", "tiny", "--lengths", "32,64", "--rounds", 3, "--threads", 1, "--features", 16]
    done = longseq("bench", "step", *arguments, folder=tmp_path)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "bench/step/step.json").read_text())
    measured = {(m["direction"], m["contender"], m["length"]) for m in numbers["measurements"]}
    assert measured == {(d, c, n) for d in ("causal", "bidirectional") for c in STEP_USUAL for n in (32, 64)}
    assert all(m["memory"] > 0 and m["flops"] is None for m in numbers["measurements"])
    causal = numbers["summary"][0]
    assert causal["ratio_to_opt"].keys() == {"favor", "window", "exact"}
    assert causal["ratio_to_opt"]["favor"].keys() == {"32", "64"}
    assert "× OPT" in done.out
    assert (tmp_path / "bench/step/step.png").stat().st_size > 10_000


PLAN = (AttentionOptions(features=16), AttentionOptions(kind="exact"))  # of two layers


@pytest.mark.parametrize(
    ("contender", "fields"),
    [
        ("favor", {}),
        ("window", {"window": 9}),
        ("exact", {"kind": "exact"}),
        ("plan", {"layers": PLAN}),
        ("gate", {"forget_gate": True}),
    ],
)
def test_a_contenders_step_is_that_of_the_model_built_for_it(contender, fields):
    trainer = step.make_trainer(REQUEST, causal=True)
    built = PerformerLM(dataclasses.replace(trainer.model.spec, **fields))
    built.load_state_dict(trainer.model.state_dict(), strict=contender != "gate")  # whose gates are new
    tokens, targets = step.make_inputs(REQUEST, 40)
    expected = F.cross_entropy(built(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(trainer.step(contender, tokens, targets), expected.detach())


def test_every_contender_trains_the_same_weights():
    trainer = step.make_trainer(REQUEST, causal=True)
    count = sum(p.numel() for p in trainer.model.parameters())
    for name in STEP_USUAL:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.step(name, *step.make_inputs(REQUEST, 40))
        after = list(trainer.model.parameters())
        assert sum(p.numel() for p in after) == count == trainer.model.spec.parameter_count
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_opt_mixes_no_positions():
    trainer = step.make_trainer(REQUEST, causal=False)
    (attention, *_), x = trainer.attentions["opt"], torch.randn(1, 7, trainer.model.spec.dim)
    torch.testing.assert_close(attention(x)[:, 3], attention(x[:, 3:4])[:, 0])


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler")
def test_compiled_blocks_make_the_step_of_those_that_are_not():
    trainer = step.make_trainer(dataclasses.replace(REQUEST, contenders=("favor", "compiled")), causal=True)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    found = []
    for name in ("favor", "compiled"):
        trainer.model.load_state_dict(before)
        trainer.optimizer.state.clear()
        losses = [trainer.step(name, *step.make_inputs(REQUEST, 40)).item() for _ in range(2)]
        found.append((losses, [p.detach().clone() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
