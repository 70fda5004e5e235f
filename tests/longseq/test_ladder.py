"""A ladder: the law of the loss, the sizes, what is scaled by the width, what is trained; one of three real runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import longseq
from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import resolve_sources
from longseq.errors import DivergedError, LongseqError
from longseq.evaluation.evaluate import Evaluation
from longseq.experiments import ladder as ladders
from longseq.experiments.ladder import family, ladder
from longseq.experiments.ladder_report import draw, table
from longseq.experiments.running import Interrupted
from longseq.experiments.scaling import Law, Point, fit, predict
from longseq.models.layers import Block
from longseq.runs.run import Run
from longseq.training.optim import build_optimizer, build_schedule, follow_config
from longseq.training.task import LanguageModelling

from .test_experiment import Recorder

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # equation 10 of the paper
SIZES = (100_000, 300_000, 1_000_000, 3_000_000)
LAD = """
model: {dim: 32, depth: 1, heads: 4, ffn_dim: 64}
attention: {kind: exact}
data: {length: 16, batch_tokens: 64, packing: crop, valid_fraction: 0.2}
optim: {lr: 0.02, warmup_steps: 30}
trainer: {strategy: single, accelerator: cpu, valid_every: 0, probe_every: 0, log_every: 50}
"""


def points(law: Law, budgets=(5, 10, 20), noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    found = [(size, size * budget) for size in SIZES for budget in budgets]
    return [Point(n, d, law.loss(n, d) * math.exp(noise * rng.standard_normal())) for n, d in found]


@pytest.mark.parametrize("law", [CHINCHILLA, Law(1.2, 20.0, 0.2, 3000.0, 0.5)])
def test_a_fit_recovers_the_numbers_that_points_were_made_with(law):
    found = fit(points(law))
    for name, value in vars(law).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4)


def test_one_outlier_hardly_moves_a_fit():
    made = points(CHINCHILLA)
    made[4] = made[4]._replace(loss=made[4].loss * 1.1)
    assert fit(made).loss(10**7, 2 * 10**8) == pytest.approx(CHINCHILLA.loss(10**7, 2 * 10**8), rel=1e-3)


def test_one_budget_gives_a_law_of_the_size_for_that_budget():
    law = Law(1.5, 300.0, 0.4, 0.0, 0.0)
    found = fit(points(law, budgets=(20,)))
    assert (found.data, found.data_exponent) == (0.0, 0.0)
    assert [found.irreducible, found.size, found.size_exponent] == pytest.approx([1.5, 300.0, 0.4], rel=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    law = Law(1.5, 300.0, 0.4, 0.0, 0.0)
    truth, held = law.loss(10**7, 1), 0
    for seed in range(30):
        # Six sizes, so that residuals say something.
        sizes = [10**5 * 2**k for k in range(6)]
        rng = np.random.default_rng(seed)
        made = [Point(n, 20 * n, law.loss(n, 1) * math.exp(0.002 * rng.standard_normal())) for n in sizes]
        found = predict(made, 10**7, 2 * 10**8)
        assert found.low is not None
        assert found.low < found.loss < found.high
        held += found.low <= truth <= found.high
    assert held >= 24


def test_an_interval_of_both_terms_is_around_the_truth_and_none_where_a_fit_has_no_residuals():
    noisy = predict(points(CHINCHILLA, noise=0.002), 10**7, 2 * 10**8)
    truth = CHINCHILLA.loss(10**7, 2 * 10**8)
    assert noisy.low < truth < noisy.high
    assert noisy.high - noisy.low < 0.05 * truth
    three = predict(points(CHINCHILLA, budgets=(20,))[:3], 10**7, 2 * 10**8)
    assert (three.low, three.high) == (None, None)


def test_too_few_runs_and_a_loss_that_is_no_number_tell_no_law():
    with pytest.raises(LongseqError, match="2 runs of 2 sizes tell no law"):
        fit(points(CHINCHILLA, budgets=(20,))[:2])
    for loss in (math.nan, math.inf, 0.0):
        made = points(CHINCHILLA)
        made[3] = made[3]._replace(loss=loss)
        with pytest.raises(LongseqError, match=rf"a loss of {loss:g} at 300,000 weights and 1,500,000 tokens is"):
            fit(made)


@pytest.fixture
def wide(folder):
    """wide(heads, override, ...): the configuration of a width."""
    (folder / "lad.yaml").write_text(LAD)

    def wide(heads: int, *overrides: str):
        size = (f"model.dim={8 * heads}", f"model.heads={heads}", f"model.ffn_dim={16 * heads}")
        config = load_config("lad.yaml", ["data.train=proteins.fasta", *size, *overrides])
        resolve_sources(config)
        return config

    return wide


def test_a_family_has_the_heads_the_depth_and_the_ratio_of_its_largest_member(wide):
    config = wide(8)
    members = family(config)
    assert [(each.dim, each.heads, each.ffn_dim) for each in members] == [(8 * n, n, 16 * n) for n in (1, 2, 4, 7, 8)]
    for member in members:
        own = LanguageModelling(wide(member.heads)).model
        assert member.parameters == sum(each.numel() for each in own.parameters())
    asked = family(config, [members[1].parameters + 20, members[3].parameters - 100])
    assert [each.heads for each in asked] == [2, 7, 8]
    with pytest.raises(LongseqError, match="two are nearest to one width; there are"):
        family(config, [1000, 1001])
    with pytest.raises(LongseqError, match="widths of the family are multiples of 8, and 1 is smaller"):
        family(wide(2))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_and_rates_of_a_width_are_scaled_as_the_table_says(wide, name):
    how = (f"optim.name={name}", "model.block=modern", "attention.forget_gate=true")
    plain, scaled = (LanguageModelling(wide(4, *how, *more)) for more in ((), ("optim.base_dim=8",)))
    for (key, one), (_, other) in zip(plain.model.named_parameters(), scaled.model.named_parameters(), strict=True):
        hidden = one.ndim == 2 and key.startswith("blocks.") and ".gate." not in key
        factor = 0.25 if key == "head.weight" else 0.5 if hidden else 1.0
        assert torch.equal(other, one * factor), key
    config = scaled.config
    optimizer = build_optimizer(scaled.model, config.optim, 32)
    muon = (
        {p for m in scaled.model.modules() if isinstance(m, Block) for p in m.matrices()} if name == "muon" else set()
    )
    for _ in range(2):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                embedded = parameter is scaled.model.embedding.weight
                share = 0.5 if parameter in muon else 0.25 if parameter.ndim == 2 and not embedded else 1.0
                assert group["lr"] == pytest.approx(0.02 * share)
                decay = 0.1 if parameter.ndim == 2 and not embedded else 0.0
                assert group["lr"] * group["weight_decay"] == pytest.approx(0.02 * decay)
        schedule = build_schedule(optimizer, replace(config.optim, warmup_steps=0, schedule="constant"), 10)
        for group in optimizer.param_groups:
            group.update(lr=7.0, initial_lr=7.0)  # what a checkpoint brings
        follow_config(optimizer, schedule, config, 30)
        assert schedule.base_lrs == [group["initial_lr"] for group in optimizer.param_groups]


def test_without_a_width_of_the_rate_groups_are_those_of_before(wide):
    task = LanguageModelling(wide(4))
    groups = build_optimizer(task.model, task.config.optim, 32).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.02, 0.1), (0.02, 0.0)]


def test_steps_of_adamw_move_what_all_widths_compute_alike(wide):
    """The first step's change of the logits: with the rate of all weights it grows with the width."""

    def moved(heads: int, *overrides: str) -> float:
        task = LanguageModelling(wide(heads, "optim.lr=0.002", "optim.weight_decay=0", *overrides))
        optimizer = build_optimizer(task.model, task.config.optim, 8 * heads)
        tokens = torch.randint(25, (64, 17), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = task.model(tokens[:, :-1])
        task.model(tokens[:, :-1], targets=tokens[:, 1:])[0].backward()
        optimizer.step()
        with torch.no_grad():
            return float((task.model(tokens[:, :-1]) - before).std())

    alike = [moved(heads, "optim.base_dim=16") for heads in (2, 16)]
    apart = [moved(heads) for heads in (2, 16)]
    assert apart[1] / apart[0] > 3
    assert alike[1] / alike[0] < 0.6 * apart[1] / apart[0]


class Scaled(Recorder):
    """Runs whose losses follow a law, and a rate that is best."""

    law, best = Law(1.5, 60.0, 0.5, 40.0, 0.4), 0.02

    diverges = math.inf  # from this rate on

    def _trained(self, verb, folder):
        training = super()._trained(verb, folder)
        if Run.open(folder).config().optim.lr >= self.diverges:
            (folder / "FINISHED").unlink()
            raise DivergedError("the loss is not finite")
        return training

    def evaluate(self, run, settings):
        assert settings.splits == ("valid",)
        config = Run.open(run).config()
        tokens = config.trainer.max_steps * config.data.batch_tokens
        loss = self.law.loss(config.performer_spec(29).parameter_count, tokens)
        loss *= 1 + 0.1 * math.log(config.optim.lr / self.best) ** 2
        self.evaluated.append((run, settings))
        return Evaluation(run, run.name, 8, "causal", "last", (), None, {"valid": {"loss": loss}})


def climbed(verbs: Recorder, **changes):
    how = {"tokens_per_parameter": (1, 2, 4), "out": "out", "verbs": verbs, **changes}
    return ladder("lad.yaml", ["data.train=proteins.fasta", "model.heads=4", "model.dim=32"], **how)


def test_a_ladder_finds_the_rate_and_the_law_and_goes_on_where_it_was(wide):
    with pytest.raises(Interrupted):
        climbed(Scaled(stop_at=4), rates=(0.01, 0.02, 0.04))
    verbs = Scaled()
    found = climbed(verbs, rates=(0.01, 0.02, 0.04), verify=True)
    assert found.lr == 0.02
    assert list(found.rates) == [0.01, 0.02, 0.04]
    assert (
        verbs.trained == ["resume"] + ["fit"] * 8
    )  # 3 rates were tried, and one of them is a rung of 9; then the largest
    assert [rung.member.heads for rung in found.rungs] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for rung in found.rungs:
        assert rung.tokens == rung.steps * 64
        assert rung.loss == pytest.approx(Scaled.law.loss(rung.member.parameters, rung.tokens))
    for name, value in vars(Scaled.law).items():
        assert getattr(found.law, name) == pytest.approx(value, rel=1e-3)
    assert found.measured is not None
    assert found.prediction.loss == pytest.approx(found.measured.loss, rel=1e-4)
    config = Run.open(found.rungs[-1].runs[0]).config()
    assert (config.model.dim, config.optim.lr, config.optim.base_dim) == (24, 0.02, 8)
    assert config.optim.warmup_steps == min(30, max(1, config.trainer.max_steps // 10))
    assert json.loads((found.folder / "ladder.json").read_text())["prediction"]["loss"] == found.prediction.loss
    again = Scaled()
    climbed(again, rates=(0.01, 0.02, 0.04), verify=True)
    assert again.trained == []
    shown = table(found)
    assert f"loss {found.prediction.loss:.4f} (95 %:" in shown
    assert "Learning rates at width 8: 0.01: " in shown
    assert draw(found).read_bytes().startswith(b"\x89PNG")


def test_a_prediction_is_kept_whatever_becomes_of_the_largest_size(wide):
    class Largest(Scaled):
        def _trained(self, verb, folder):
            training = super()._trained(verb, folder)
            if Run.open(folder).config().model.dim == 32:
                raise DivergedError("the loss is not finite")
            return training

    said: list[str] = []
    with pytest.raises(LongseqError, match="not finite"):
        climbed(Largest(), out="kept", verify=True, tell=said.append)
    kept = json.loads(Path("kept/ladder.json").read_text())
    assert kept["measured"] is None
    assert any(line.startswith(f"predicted a loss of {kept['prediction']['loss']:.4f}") for line in said)


def test_a_best_rate_at_the_end_of_those_tried_is_said(wide):
    said: list[str] = []
    assert climbed(Scaled(), rates=(0.04, 0.08), tokens_per_parameter=(1,), tell=said.append).lr == 0.04
    assert "optim.lr=0.04 was best, the smallest that was tried: one beyond may be better" in said


def test_a_rate_that_diverges_is_the_worst_and_is_not_tried_again(wide):
    class Wild(Scaled):
        diverges = 0.03

    said: list[str] = []
    verbs, rates = Wild(), (0.01, 0.02, 0.04)
    found = climbed(verbs, rates=rates, tell=said.append)
    assert (found.lr, found.rates[0.04]) == (0.02, math.inf)
    assert sum("diverged, and counts as the worst: the loss is not finite" in line for line in said) == 1
    assert json.loads((found.folder / "ladder.json").read_text())["rates"]["0.04"] is None
    assert ", 0.04: diverged." in table(found)
    again = Wild()
    assert climbed(again, rates=rates).rates == found.rates
    assert again.trained == []
    with pytest.raises(LongseqError, match=r"rates=0\.04,0\.08: all diverged; take lower ones"):
        climbed(Wild(), rates=(0.04, 0.08))
    Wild.diverges = 0.01
    with pytest.raises(LongseqError, match=r"a rung diverged.*lower optim\.lr=.*another --out.*loss is not finite"):
        climbed(Wild(), out="other")  # of what is fitted, none may


def test_budgets_below_one_and_close_to_each_other_are_lines_of_their_own(wide, monkeypatch):
    from matplotlib.axes import Axes

    found = climbed(Scaled(), tokens_per_parameter=(0.2, 1.0, 1.4))
    assert {rung.budget for rung in found.rungs} == {0.2, 1.0, 1.4}
    lines = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, *a, **k: lines.append((len(x), k)) or plot(axes, x, *a, **k))
    draw(found)
    assert [of.get("label") for _, of in lines[1::2]] == [f"{n} tokens per weight" for n in ("0.2", "1", "1.4")]
    assert [points for points, _ in lines[::2]] == [3, 3, 3]


def test_what_makes_no_ladder_is_refused_before_a_run_is_trained(wide):
    with pytest.raises(LongseqError, match="two budgets are equally many steps"):
        climbed(Scaled(code=1), tokens_per_parameter=(1, 1.001))
    with pytest.raises(LongseqError, match="two budgets are equally many steps"):
        climbed(Scaled(code=1), tokens_per_parameter=(1, 1.001), rates=(0.01, 0.02))
    with pytest.raises(LongseqError, match="4 runs of 2 sizes tell no law"):
        climbed(Scaled(code=1), tokens_per_parameter=(1, 2), sizes=(1000, 5000), rates=(0.01, 0.02))
    for name, values in (("sizes", (0, 1000)), ("tokens_per_parameter", (1.0, 0.0)), ("rates", (math.nan,))):
        said = ",".join(f"{value:g}" for value in values)
        with pytest.raises(LongseqError, match=rf"{name}={said}: take numbers above 0"):
            climbed(Scaled(code=1), **{name: values})
    with pytest.raises(LongseqError, match="needs a seed and a number of tokens per parameter"):
        climbed(Scaled(code=1), tokens_per_parameter=())
    with pytest.raises(LongseqError, match="has no validation split to compare sizes on"):
        ladder("lad.yaml", ["data.train=proteins.fasta", "data.valid_fraction=0"], verbs=Scaled(code=1))
    assert not ladders.Path("out").exists() or not list(ladders.Path("out").glob("runs/*"))


@pytest.mark.distributed
def test_three_real_rungs_are_runs_and_predict_the_next_size(folder, capsys):
    (folder / "lad.yaml").write_text(LAD)
    words = [
        "ladder",
        "lad.yaml",
        "data.train=proteins.fasta",
        "--tokens-per-parameter",
        "1",
        "--sizes",
        "1000,2700,5000",
        "--rates",
        "0.02,1e20",
    ]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    assert "lr1e+20: diverged, and counts as the worst: " in shown.err
    assert "the loss or its gradient is not finite at step " in shown.err
    found = json.loads(shown.out)
    assert found["rates"] == {"0.02": found["rungs"][0]["loss"], "1e+20": None}
    assert [rung["member"]["heads"] for rung in found["rungs"]] == [1, 2, 3]
    for rung in found["rungs"]:
        run = Run.open(rung["runs"][0])
        assert (run.path / "FINISHED").is_file()
        (kept,) = run.evaluations_dir.glob("*.json")
        assert json.loads(kept.read_text())["splits"]["valid"]["loss"] == rung["loss"]
        assert longseq.find(run.path).spec.parameter_count == rung["member"]["parameters"]
    law = Law(**found["law"])
    fitted = [law.loss(rung["member"]["parameters"], rung["tokens"]) for rung in found["rungs"]]
    assert fitted == pytest.approx([rung["loss"] for rung in found["rungs"]], rel=0.02)
    config = load_config("lad.yaml", ["data.train=proteins.fasta"])
    assert found["prediction"]["parameters"] == config.performer_spec(29).parameter_count
