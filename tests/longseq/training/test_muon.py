"""Muon: steps of matrices that are orthogonal, those that torch's Muon makes, and AdamW's of all other weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.config.training import OptimConfig
from longseq.errors import ConfigError
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.training.muon import MuonAdamW, orthogonal
from longseq.training.optim import bind, build_optimizer, build_schedule, follow_config
from longseq.training.optimizer_state import holder_of
from longseq.training.shards import restore, shard_name, snapshot, write

SPEC = PerformerSpec(vocabulary=7, dim=16, depth=2, heads=2, ffn_dim=24, causal=True, qk_norm=True, ffn="swiglu")
NEAR_ONE = 0.6, 1.3  # what the five iterations leave of singular values that were not tiny


def singular_values(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 16, 16)])
def test_singular_values_become_nearly_one_and_their_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(x)
    values = singular_values(found)
    assert NEAR_ONE[0] < values.min() < values.max() < NEAR_ONE[1]
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert (found * (u @ vh)).sum() / math.prod(values.shape) > 0.7
    diagonal = u.mT @ found @ vh.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert not orthogonal(torch.zeros(shape)).any()


def trained(steps: int, seed: int = 0, **changes: object) -> tuple[PerformerLM, MuonAdamW]:
    torch.manual_seed(seed)
    model = PerformerLM(SPEC)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.02, **changes), SPEC.dim)
    bind(model, optimizer)
    go_on(model, optimizer, 0, steps)
    return model, optimizer


def go_on(model: PerformerLM, optimizer: MuonAdamW, start: int, stop: int) -> None:
    for step in range(start, stop):
        tokens = torch.randint(7, (3, 40), generator=torch.Generator().manual_seed(step))
        model(tokens, targets=tokens.roll(1, 1))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_each_map_of_a_block_is_stepped_by_an_orthogonal_matrix():
    model, optimizer = trained(2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    go_on(model, optimizer, 2, 3)
    maps = {"qkv": 3, "out": 1, "mlp.0": 2, "mlp.2": 1}
    found = 0
    for name, p in model.named_parameters():
        count = next((n for part, n in maps.items() if name.endswith(f"{part}.weight")), 0)
        if not count:
            continue
        step = ((p.detach() - before[name]) / (0.02 * 0.2)).view(count, -1, p.shape[1])
        values = singular_values(step) / math.sqrt(max(step.shape[1:]))
        # Few tokens: a gradient of low rank has singular values that five iterations do not reach.
        assert NEAR_ONE[0] < values.median() < values.max() < NEAR_ONE[1], name
        found += count
    assert found == 2 * 7


def test_it_makes_the_steps_of_torchs_muon_and_of_torchs_adamw():
    model, _ = trained(0)
    ours, theirs = trained(0, weight_decay=0.3)[0], trained(0)[0]
    settings = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-9}
    hidden = [p for b in theirs.blocks for p in (b.attention.out.weight, b.mlp[2].weight)]
    others = [p for n, p in theirs.named_parameters() if n in ("embedding.weight", "norm.weight")]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": [theirs.head.weight]}],
                             weight_decay=0.3, **settings)  # fmt: skip
    optimizer = build_optimizer(
        ours, OptimConfig(name="muon", weight_decay=0.3, **{**settings, "betas": [0.9, 0.98]}), ours.spec.dim
    )
    bind(ours, optimizer)
    named, start = dict(ours.named_parameters()), dict(model.named_parameters())
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for name, p in theirs.named_parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad, named[name].grad = grad, grad.clone()
        for one in (muon, adam, optimizer):
            one.step()
    for name, p in theirs.named_parameters():
        moved = (p - start[name]).norm()
        error = (p - named[name]).norm() / moved.clamp_min(1e-12)
        if any(p is x for x in hidden):
            assert error < 0.05, name  # torch's iterations are in bf16
        elif any(p is x for x in (*others, theirs.head.weight)):
            assert error < 1e-6, name


def test_matrices_of_blocks_are_muons_and_embedding_head_norms_and_biases_adamws():
    model, optimizer = trained(0)
    names = {p: name for name, p in model.named_parameters()}
    muon = {names[p] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert muon == {n for n in names.values() if n.startswith("blocks.") and n.endswith(".weight") and "norm" not in n}
    assert {names[p] for group in optimizer.param_groups for p in group["params"]} == set(names.values())
    decayed = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decayed.items() if decay} == {*muon, "head.weight"}


def test_a_restored_muon_makes_the_same_next_steps(tmp_path: Path):
    model, optimizer = trained(3)
    write(tmp_path / shard_name(0), snapshot(holder_of(model, optimizer), 0))
    other, fresh = trained(0, seed=5)
    restore(holder_of(other, fresh), tmp_path)
    for state in fresh.state.values():
        state["step"] = torch.tensor(3.0)
    go_on(model, optimizer, 3, 6)
    go_on(other, fresh, 3, 6)
    for (name, one), other_one in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, other_one), name


def test_a_closure_is_called_once_and_gradients_that_are_gone_are_no_step():
    model, optimizer = trained(1)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append(1)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert calls == [1]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_matrix_that_it_does_not_know_is_an_error_and_not_a_wrong_step():
    torch.manual_seed(0)
    model = PerformerLM(SPEC)
    optimizer = build_optimizer(model, OptimConfig(name="muon"), SPEC.dim)
    model(torch.zeros(1, 5, dtype=torch.long), targets=torch.ones(1, 5, dtype=torch.long))[0].backward()
    with pytest.raises(RuntimeError, match="bind"):
        optimizer.step()


def test_a_restored_muon_follows_the_configuration():
    model, config = PerformerLM(SPEC), Config()
    config.optim.name = "muon"
    optimizer = build_optimizer(model, config.optim, model.spec.dim)
    schedule = build_schedule(optimizer, config.optim, config.trainer.max_steps)
    config.optim.momentum, config.optim.weight_decay, config.optim.lr = 0.8, 0.3, 0.5
    follow_config(optimizer, schedule, config, step=500)
    muon, decayed, plain = optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"], decayed["weight_decay"], plain["weight_decay"]) == (
        0.8,
        0.3,
        0.3,
        0,
    )
    assert muon["lr"] == decayed["lr"] == plain["lr"] > 0


@pytest.mark.parametrize(
    "override", ["optim.implementation=fused", "trainer.offload_optimizer=cpu", "trainer.offload_optimizer=nvme"]
)
def test_what_muon_cannot_do_is_refused_in_a_sentence(folder, override):
    more = ["trainer.zero_stage=3", "trainer.offload_path=."] if "nvme" in override else []
    with pytest.raises(ConfigError, match=f"optim.name=muon and {override}".replace(".", r"\.")):
        load_config("small.yaml", ["data.train=proteins.fasta", "optim.name=muon", override, *more]).check()


def test_a_model_without_blocks_is_adamws():
    optimizer = build_optimizer(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)), OptimConfig(name="muon"), 4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1, 2]
