"""``longseq compare``: what differs between runs."""

from __future__ import annotations

import json

import pytest
from torch.utils.tensorboard import SummaryWriter

import longseq as api
from longseq.cli import main
from longseq.config.schema import Config
from longseq.errors import LongseqError
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq_data.errors import DataError


@pytest.fixture
def made(tmp_path):
    """made(name, losses, key=value of the optimiser ...): a run with a curve of the training loss."""

    def made(name, losses, **optim):
        config = Config()
        config.run.name, config.run.dir, config.data.train = name, str(tmp_path), ["proteins.fasta"]
        for key, value in optim.items():
            setattr(config.optim, key, value)
        run = Run.create(config, "run")
        with SummaryWriter(str(run.tensorboard_dir)) as writer:
            for step, loss in losses.items():
                writer.add_scalar("train/loss", loss, step)
                writer.add_scalar("train/tokens_per_second", 1000 * step, step)
        return run

    return made


def scored(run, name, step, loss, **others):
    run.evaluations_dir.mkdir(exist_ok=True)
    report = {"step": step, "weights": "last", "overrides": [], "sequences_limit": None} | others
    splits = {"test": {"loss": loss, "perplexity": 2.0, "accuracy": 0.5, "sources": []}}
    (run.evaluations_dir / name).write_text(json.dumps({**report, "splits": splits}))


def test_settings_losses_and_speeds_stand_next_to_each_other(made):
    first, second = made("a", {10: 3.0, 20: 2.5, 30: 2.75}, lr=1e-3), made("b", {10: 2.0}, lr=2e-3)
    one, other = api.compare([first.path, str(second.path)])
    assert (one.run, one.step, other.step) == ("a", 30, 10)
    assert (one.settings, other.settings) == ({"optim.lr": 1e-3}, {"optim.lr": 2e-3})
    assert one.curves == {"train/loss": {"last": (30, 2.75), "lowest": (20, 2.5)}}
    assert (one.tokens_per_second, other.tokens_per_second) == (20_000, 10_000)


def test_scores_are_those_of_the_newest_step_with_the_runs_own_settings(made):
    first, second = made("a", {1: 3.0}), made("b", {1: 3.0})
    scored(first, "step-9-test.json", 9, 1.25)
    scored(first, "step-9-ema.json", 9, 1.0, weights="ema")
    scored(first, "step-99-test-1234.json", 99, 0.5, overrides=["data.length=9"])
    scored(first, "step-100-test.json", 100, 1.5)
    one, other = api.compare([first.path, second.path])
    assert one.scores_step == 100
    assert one.scores == {"test": {"loss": 1.5, "perplexity": 2.0, "accuracy": 0.5}}
    assert (other.scores_step, other.scores) == (None, {})


def test_the_command_prints_a_column_for_each_run(made, capsys):
    runs = [made("one", {1: 3.0}, lr=0.5), made("other", {}, lr=0.25)]
    scored(runs[0], "step-1-test.json", 1, 1.25)
    assert main(["compare", *(str(run.path) for run in runs)]) == 0
    rows = {line.split("  ")[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["run"] == ["one", "other"]
    assert rows["optim.lr"] == ["0.5", "0.25"]
    assert rows["train/loss, last"] == ["1", "–"]
    assert rows["test, loss"] == ["1.2500", "–"]
    assert main(["compare", "--json", *(str(run.path) for run in runs)]) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == ["one", "other"]


def test_what_is_no_run_or_no_report_is_refused(made, tmp_path):
    run = made("a", {1: 3.0})
    with pytest.raises(LongseqError, match="two runs"):
        api.compare([run.path])
    with pytest.raises(LongseqError, match="no such run folder"):
        api.compare([run.path, tmp_path / "none"])
    run.evaluations_dir.mkdir()
    (run.evaluations_dir / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json: not a report"):
        api.compare([run.path, made("b", {}).path])


def test_a_curve_of_before_goes_on_under_its_name_of_now(made):
    run = made("a", {})
    for step, name in enumerate(("machine/model_tflops_a_step", "machine/model_tflops_per_step")):
        with SummaryWriter(str(run.tensorboard_dir)) as writer:
            writer.add_scalar(name, 1.5 + step, step)
    assert read_curves(run.tensorboard_dir)["machine/model_tflops_per_step"] == {0: 1.5, 1: 2.5}
