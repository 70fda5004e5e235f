"""Experiments: the runs of a file, kept and gone on with, and the table that comes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.cli import main
from longseq.config.loading import load_config, save_config
from longseq.errors import ConfigError, LongseqError
from longseq.evaluation.evaluate import Evaluation
from longseq.evaluation.request import Settings as EvaluationSettings
from longseq.experiments.plan import read_plan
from longseq.experiments.running import Interrupted, Settings, arguments, perform, trials
from longseq.experiments.tables import report
from longseq.launch.start import Training
from longseq.runs.run import Run

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))
PLAN = """
config: small.yaml
groups: {UNI: [model.objective=causal], BID: [model.objective=masked]}
variants:
  Transformer: [attention.kind=exact]
  Performer (ReLU): {set: [attention.kind=favor, attention.kernel=relu], from: Transformer, steps: 0.5}
splits: [test]
curve: true
paper: {UNI: {Transformer: {test: [30.80, 9.37]}}}
differs: the size
"""


class Recorder:
    """In the place of this machine: makes the folders that `fit` makes, and returns the scores it is given."""

    def __init__(self, accuracy=0.25, stop_at: int | None = None, code=0):
        self.trained: list[str] = []
        self.fits: list[list[str]] = []
        self.evaluated: list[tuple[Path, EvaluationSettings]] = []
        self.accuracy, self.stop_at, self.code = accuracy, stop_at, code

    def fit(self, config, overrides):
        self.fits.append(list(overrides))
        given = dict(word.split("=", 1) for word in overrides)
        folder = Path(given["run.dir"]) / given["run.name"]
        (folder / "tensorboard").mkdir(parents=True)
        save_config(load_config(config, overrides, resolved=True), folder / "config.yaml")
        return self._trained("fit", folder)

    def resume(self, folder):
        return self._trained("resume", folder)

    def _trained(self, verb, folder):
        self.trained.append(verb)
        code = 75 if len(self.trained) == self.stop_at else self.code
        if not code:
            (folder / "FINISHED").write_text("8")
        return Training(Run.open(str(folder)), code, None, ())

    def evaluate(self, run, settings):
        self.evaluated.append((run, settings))
        scores = {"loss": 2.0, "perplexity": 7.39, "accuracy": self.accuracy, "sequences": 3, "targets": 9}
        baseline = {"accuracy": 0.1, "perplexity": 18.0}
        splits = {"test": {**scores, "baseline": baseline}}
        return Evaluation(run, run.name, 8, "causal", "last", settings.overrides, None, splits)


@pytest.fixture
def plan(folder):
    (folder / "two.yaml").write_text(PLAN)
    return read_plan(folder / "two.yaml")


@pytest.fixture
def settings(folder):
    def settings(*overrides: str, seeds=(0,)) -> Settings:
        overrides = overrides or ("data.train=proteins.fasta",)
        return Settings(folder / "out", folder / "small.yaml", overrides, seeds, None)

    return settings


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_run_of_a_shipped_experiment_has_a_valid_configuration(path, tmp_path):
    plan = read_plan(path)
    assert plan.about
    assert plan.differs
    assert plan.paper
    if plan.bench:
        return
    settings = Settings(tmp_path, plan.config, ("data.train=a.fasta", "data.ood=b.fasta"), (0, 1), None)
    for trial in trials(plan, settings.seeds):
        config, overrides = plan.config, arguments(plan, settings, trial)
        given = [word for word in overrides if not word.startswith("model.init_from")]
        loaded = load_config(config, given)
        assert loaded.run.name == trial.name
        assert loaded.trainer.max_steps == round(trial.variant.steps * load_config(config, given[:2]).trainer.max_steps)
    known = set(plan.variants) | {"empirical baseline"}
    if isinstance(plan.paper, dict):
        assert all(set(rows) <= known for rows in plan.paper.values())


def test_an_interrupted_experiment_goes_on_where_it_was(plan, settings):
    first = Recorder(stop_at=2)
    with pytest.raises(Interrupted):
        perform(plan, settings(), print, first)
    second = Recorder()
    perform(plan, settings(), print, second)
    assert first.trained == ["fit", "fit"]
    assert second.trained == ["resume", "fit", "fit"]
    third = Recorder()
    perform(plan, settings(seeds=(0, 1)), print, third)
    assert third.trained == ["fit"] * 4  # the other seed alone


def test_a_variant_begins_with_the_weights_of_the_run_that_it_is_from(plan, settings):
    recorder = Recorder()
    perform(plan, settings(), print, recorder)
    origin = next(word for word in recorder.fits[1] if word.startswith("model.init_from="))
    assert origin.endswith("/out/runs/uni-transformer-seed0")
    before = [(run, how) for run, how in recorder.evaluated if "attention.kind=favor" in how.overrides]
    assert all("attention.kernel=relu" in how.overrides for _, how in before)
    assert [run.name for run, _ in before] == ["uni-transformer-seed0", "bid-transformer-seed0"]


def test_the_table_has_mean_and_spread_beside_the_papers_numbers(plan, settings):
    perform(plan, settings(), print, Recorder(accuracy=0.25))
    found = perform(plan, settings(seeds=(1,)), print, Recorder(accuracy=0.27))
    text = report(plan, found, "")
    ours, papers = text.split("## The paper")
    row = next(line for line in ours.splitlines() if line.startswith("| Transformer"))
    assert "26.00 ± 1.00 / 7.39 ± 0.00" in row
    assert "Performer (ReLU), before training" in ours
    assert "10.00 / 18.00" in ours
    assert "30.80 / 9.37" in papers
    assert "the size" in papers


def test_a_folder_of_other_settings_is_refused(plan, settings):
    perform(plan, settings(), print, Recorder())
    with pytest.raises(LongseqError, match="choose another --out"):
        perform(plan, settings("data.train=other.fasta"), print, Recorder())


def test_a_variant_that_was_changed_is_not_taken_for_the_one_before(folder, plan, settings):
    """Its results would be shown under the new one's name; variants that are added are no matter."""
    perform(plan, settings(), print, Recorder())
    more = PLAN.replace("splits:", "  Performer (window): [attention.window=4]\nsplits:")
    (folder / "two.yaml").write_text(more)
    recorder = Recorder()
    perform(read_plan(folder / "two.yaml"), settings(), print, recorder)
    assert recorder.trained == ["fit"] * 2
    (folder / "two.yaml").write_text(more.replace("window=4", "window=8"))
    with pytest.raises(LongseqError, match=r"uni-performer-window=.*window=4.*choose another --out"):
        perform(read_plan(folder / "two.yaml"), settings(), print, Recorder())


@pytest.mark.parametrize("name", ["settings.json", "results/uni-transformer-seed0.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_result_is_named(plan, settings, name, content):
    perform(plan, settings(), print, Recorder())
    (settings().out / name).write_text(content)
    with pytest.raises(LongseqError, match=f"{Path(name).name}: damaged"):
        perform(plan, settings(), print, Recorder())


def test_a_run_that_fails_ends_the_experiment_and_says_so(plan, settings):
    with pytest.raises(LongseqError, match="uni-transformer-seed0: ended with exit code 1"):
        perform(plan, settings(), print, Recorder(code=1))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("splits:", "splits_:", "unknown key 'splits_'"),
        ("from: Transformer", "from: Transfomer", "no variant above it"),
        ("[attention.kind=exact]", "attention.kind=exact", "a list of section.key=value"),
        ("config: small.yaml", "about: x", "needs config"),
        ("steps: 0.5", "steps: 20", "a share of the steps"),
        ("config: small.yaml", "config: [small.yaml]", "config: a file is needed"),
        ("groups: {", "groups: [a]\nset: {", "groups: a mapping is needed"),
        ("splits: [test]", "splits: [tset]", "splits: a list of some of train, valid, test, ood, not"),
        ("[30.80, 9.37]", "[30.80]", "accuracy in per cent, perplexity"),
        ("Performer (ReLU):", "transformer:", "would be one run, uni-transformer"),
        ("config: small.yaml", "bench: {step: 1}", "bench: a list of words"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_sentence(folder, old, new, sentence):
    (folder / "two.yaml").write_text(PLAN.replace(old, new))
    with pytest.raises(ConfigError, match=sentence):
        read_plan(folder / "two.yaml")


def test_a_benchmark_takes_no_keys_of_runs(folder, capsys):
    bench = "bench: [features, --help]\n"
    (folder / "figure.yaml").write_text(f"about: errors\n{bench}paper: a picture\ndiffers: the length\n")
    assert main(["experiment", "figure.yaml", "trainer.max_steps=3"]) == 1
    assert "has options of its own and no runs" in capsys.readouterr().err


def test_the_runs_can_be_listed_for_a_cluster(folder, plan, capsys):
    assert (
        main(["experiment", "two.yaml", "--list", "--seeds", "0,1", "--steps", "3", "data.train=proteins.fasta"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "attention.kind=exact run.seed=0" in lines[0]
    assert "trainer.max_steps=3" in lines[0]
    assert lines[1].count("trainer.max_steps=2 ") == 1  # half of them, rounded
