"""The learning rate over the steps, and which weights decay."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from longseq.config.schema import Config
from longseq.config.training import OptimConfig
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.training.optim import build_optimizer, build_schedule, follow_config
from longseq.training.schedule import learning_rate_share, schedule_change

SPEC = PerformerSpec(vocabulary=7, dim=8, depth=2, heads=2, ffn_dim=6, causal=True, qk_norm=True)


def shares(max_steps: int, **changes: object) -> list[float]:
    config = OptimConfig(**changes)  # type: ignore[arg-type]
    return [learning_rate_share(step, config, max_steps) for step in range(max_steps)]


def test_the_warm_up_is_linear_and_ends_at_the_peak():
    assert shares(9, warmup_steps=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_cosine_falls_from_the_peak_by_way_of_the_middle_to_the_final_rate():
    found = shares(110, warmup_steps=10, final_lr=0.2)
    assert found[10] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert found[35] == pytest.approx(0.2 + 0.8 * (2 + 2**0.5) / 4)  # 45 degrees
    assert found[-1] == pytest.approx(0.2, abs=1e-3)
    assert all(later < earlier for earlier, later in pairwise(found[10:]))


def test_the_rate_stays_at_its_end_when_a_run_goes_on_after_its_last_step():
    config = OptimConfig(warmup_steps=0, final_lr=0.2)
    assert learning_rate_share(10, config, 10) == pytest.approx(0.2)
    assert learning_rate_share(999, config, 10) == pytest.approx(0.2)


def test_a_constant_rate_stays_at_the_peak():
    assert shares(6, warmup_steps=2, schedule="constant") == pytest.approx([0.5, 1, 1, 1, 1, 1])


def test_wsd_stays_at_the_peak_and_falls_over_the_last_share_of_the_steps():
    found = shares(100, warmup_steps=10, schedule="wsd", decay_fraction=0.25, final_lr=0.1)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:75] == [1.0] * 65
    assert found[75:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(k / 25)) for k in range(1, 26)])
    assert shares(20, warmup_steps=4, schedule="wsd", decay_fraction=0)[4:] == [1.0] * 16
    longer = OptimConfig(warmup_steps=10, schedule="wsd", final_lr=0.1)
    assert learning_rate_share(500, longer, 100) == pytest.approx(0.1)


def test_wsd_whose_warm_up_reaches_into_the_decay_still_ends_at_the_final_rate():
    found = shares(20, warmup_steps=15, schedule="wsd", decay_fraction=0.5, final_lr=0.0)
    assert found[:15] == pytest.approx([(step + 1) / 15 for step in range(15)])
    assert found[15:] == pytest.approx([1 - math.sqrt(k / 5) for k in range(1, 6)])
    assert shares(5, warmup_steps=9, schedule="wsd") == pytest.approx([(step + 1) / 9 for step in range(5)])


def test_the_inverse_square_root_begins_at_the_peak_and_halves_over_four_times_the_steps():
    found = shares(401, warmup_steps=100, schedule="inverse_sqrt")
    assert found[99] == 1.0
    assert found[399] == pytest.approx(0.5)
    assert found[100:] == pytest.approx([math.sqrt(100 / (step + 1)) for step in range(100, 401)])
    assert shares(4, warmup_steps=0, schedule="inverse_sqrt") == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


def test_no_warm_up_starts_at_the_peak():
    assert shares(5, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("warmup_steps", [5, 6, 100])
def test_a_warm_up_as_long_as_the_run_is_no_error(warmup_steps):
    assert shares(5, warmup_steps=warmup_steps) == pytest.approx([(step + 1) / warmup_steps for step in range(5)])


def test_the_optimiser_takes_the_scheduled_rates():
    config = OptimConfig(lr=0.3, warmup_steps=3, final_lr=0.1)
    optimizer = build_optimizer(PerformerLM(SPEC), config, SPEC.dim)
    schedule = build_schedule(optimizer, config, max_steps=8)
    for step in range(8):
        rate = 0.3 * learning_rate_share(step, config, 8)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate])
        optimizer.step()
        schedule.step()


def test_matrices_decay_and_embeddings_norms_biases_and_temperatures_do_not():
    model = PerformerLM(SPEC)
    optimizer = build_optimizer(model, OptimConfig(lr=0.3, betas=[0.8, 0.7], eps=1e-5, weight_decay=0.04), SPEC.dim)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    matrices = ("qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight", "head.weight")
    assert decays == {name: 0.04 if name.endswith(matrices) else 0.0 for name in decays}
    assert sum(decay > 0 for decay in decays.values()) == 2 * 4 + 1
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-5)


def test_convolutions_and_mixes_of_values_do_not_decay():
    model = PerformerLM(replace(SPEC, conv=3, value_residual=True, norm_kind="rmsnorm", ffn="swiglu", bias=False))
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimConfig(name=name), SPEC.dim)
        plain = {p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
        names = {name for name, p in model.named_parameters() if p in plain}
        assert {n for n in names if "conv" in n or "mix" in n} == {
            *(f"blocks.{layer}.attention.conv.weight" for layer in (0, 1)), "blocks.1.attention.value_mix"
        }  # fmt: skip
        assert not any("mlp." in n or "qkv" in n or "out." in n for n in names)


def test_a_restored_optimiser_follows_the_configuration():
    """Resumed with half the rate, other betas and decay: what was saved with the optimiser does not win."""
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3))
    old, new = Config(), Config()
    new.optim.lr, new.optim.betas, new.optim.weight_decay = old.optim.lr / 2, [0.8, 0.9], 0.3
    saved = build_optimizer(model, old.optim, 4)
    saved_schedule = build_schedule(saved, old.optim, old.trainer.max_steps)
    optimizer = build_optimizer(model, new.optim, 4)
    schedule = build_schedule(optimizer, new.optim, new.trainer.max_steps)
    optimizer.load_state_dict(saved.state_dict())
    schedule.load_state_dict(saved_schedule.state_dict())

    follow_config(optimizer, schedule, new, step=200)
    decayed, plain = optimizer.param_groups
    assert decayed["lr"] == new.optim.lr * learning_rate_share(200, new.optim, new.trainer.max_steps)
    assert (decayed["betas"], decayed["weight_decay"], plain["weight_decay"]) == ((0.8, 0.9), 0.3, 0.0)
    schedule.step(300)
    assert plain["lr"] == pytest.approx(new.optim.lr * learning_rate_share(300, new.optim, new.trainer.max_steps))


def test_a_longer_cosine_says_both_rates_and_an_unchanged_rate_says_nothing(task):
    def config(*overrides):
        return task("optim.lr=1e-3", "optim.final_lr=0.1", "optim.warmup_steps=1", *overrides).config

    six, twenty = config("trainer.max_steps=6"), config("trainer.max_steps=20")
    last = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))  # the sixth step: 5, counted from 0
    first = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 5 / 19)))
    said = schedule_change(six, twenty, 6)
    assert f"from {last:.3g} at step 6 to {first:.3g} at step 7" in said
    assert "cosine is now that of 20 steps (before: 6)" in said
    constant = "optim.schedule=constant"
    assert schedule_change(config(constant, "trainer.max_steps=6"), config(constant, "trainer.max_steps=20"), 6) is None
    assert schedule_change(six, six, 3) is None
    wsd = config("optim.schedule=wsd", "optim.decay_fraction=0.5", "trainer.max_steps=12")
    said = schedule_change(config(constant, "trainer.max_steps=6"), wsd, 6)
    assert "the wsd is now that of 12 steps" in said
    assert f"to {1e-3 * (0.1 + 0.9 * (1 - (1 / 6) ** 0.5)):.3g} at step 7" in said
    assert schedule_change(six, twenty, 0) is None, "nothing has been trained"
