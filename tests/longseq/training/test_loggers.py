"""``trainer.loggers``: what goes to TensorBoard goes to W&B and MLflow, as one run of theirs for all starts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq.training import loggers
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import check_machine, fit

TINY = ("model.dim=16", "model.depth=1", "model.heads=2", "model.ffn_dim=16", "attention.features=8")
ALONE = ("trainer.strategy=single", "trainer.probe_every=0", "trainer.peak_tflops=1", "trainer.log_every=1")
STEPS = ("trainer.max_steps=4", "trainer.valid_every=2")
Curves = dict[str, dict[int, float]]


@pytest.fixture
def settings(folder: Path) -> Callable[..., Config]:
    def settings(*overrides: str) -> Config:
        given = [f"data.train={folder}/proteins.fasta", "run.name=one", *TINY, *ALONE, *STEPS, *overrides]
        return load_config("small.yaml", given)

    return settings


class Recorder:
    """A logger of another package: keeps what it gets, fails at a step, or does not answer."""

    def __init__(self, fails_at: int | None = None, waits_for: threading.Event | None = None):
        self.fails_at, self.waits_for = fails_at, waits_for
        self.curves: Curves = {}
        self.ended: list[str] = []
        self.threads: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.threads.add(threading.current_thread().name)
        if self.waits_for:
            self.waits_for.wait(60)
        if step == self.fails_at:
            raise ConnectionError("the server is away\nand more")
        for name, value in metrics.items():
            self.curves.setdefault(name, {})[step] = value

    def end(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recorder], None]:
    """installed(recorder): it takes the place of W&B."""

    def installed(recorder: Recorder) -> None:
        monkeypatch.setitem(loggers._MAKE, "wandb", lambda run, config: recorder)
        monkeypatch.setitem(loggers._END, "wandb", lambda logger, status: logger.end(status))
        monkeypatch.setattr(loggers, "find_spec", lambda name: SimpleNamespace(origin="there"))

    return installed


def test_another_logger_gets_every_point_that_tensorboard_gets(settings, installed):
    recorder = Recorder()
    installed(recorder)
    config = settings("trainer.loggers=[tensorboard, wandb]")
    run = Run.create(config, default_name="x")
    assert fit(run, config, None, StopFlag())
    shown = read_curves(run.tensorboard_dir)
    assert {"train/loss", "valid/loss", "machine/memory_gib", "time/step_ms"} <= set(recorder.curves)
    assert recorder.curves.keys() == shown.keys()
    for name, points in recorder.curves.items():
        assert points == pytest.approx(shown[name], rel=1e-6), name  # TensorBoard's are fp32
    assert recorder.ended == ["success"]
    assert recorder.threads == {"wandb"}


def test_a_stop_is_no_failure(settings, installed):
    recorder, stop = Recorder(), StopFlag()
    installed(recorder)
    stop.requested = True
    config = settings("trainer.loggers=[wandb]")
    assert not fit(Run.create(config, default_name="x"), config, None, stop)
    assert recorder.ended == ["stopped"]
    assert set(recorder.curves["train/loss"]) == {1}


def test_a_logger_that_fails_is_said_once_and_the_training_goes_on(settings, installed, capsys):
    recorder = Recorder(fails_at=2)
    installed(recorder)
    config = settings("trainer.loggers=[wandb]")
    run = Run.create(config, default_name="x")
    assert fit(run, config, None, StopFlag())
    assert set(recorder.curves["train/loss"]) == {1}
    assert set(read_curves(run.tensorboard_dir)["train/loss"]) == {1, 2, 3, 4}
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said == [
        "longseq: warning: wandb: ConnectionError: the server is away; its curves end here, and the training goes on "
        "(trainer.loggers)."
    ]


def test_a_logger_that_does_not_answer_holds_nothing_up(settings, installed, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "_LAST_WORDS_SECONDS", 0.2)
    answer = threading.Event()
    installed(Recorder(waits_for=answer))
    config = settings("trainer.loggers=[wandb]")
    run = Run.create(config, default_name="x")
    assert fit(run, config, None, StopFlag())
    answer.set()
    assert run.finished
    assert "longseq: warning: wandb: did not answer within 0.2 s of the training's end" in capsys.readouterr().err


def test_only_rank_0_talks_to_them(settings, run, monkeypatch):
    config = settings("trainer.loggers=[tensorboard, wandb, mlflow, wandb]")
    assert [logger.name for logger in loggers.further_loggers(run, config)] == ["wandb", "mlflow"]
    monkeypatch.setenv("RANK", "1")
    assert loggers.further_loggers(run, config) == []


def test_what_is_not_installed_or_unknown_is_refused(settings, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_machine(settings())
    with pytest.raises(ConfigError, match=r"mlflow is not installed: pip install 'longseq\[mlflow\]', or leave"):
        check_machine(settings("trainer.loggers=[tensorboard, mlflow]"))
    folder = SimpleNamespace(origin=None)  # what W&B leaves in the current folder looks like a package
    monkeypatch.setattr(loggers, "find_spec", lambda name: folder)
    with pytest.raises(ConfigError, match=r"wandb is not installed"):
        check_machine(settings("trainer.loggers=[wandb]"))
    with pytest.raises(ConfigError, match=r"choose from tensorboard, wandb, mlflow\. Did you mean wandb\?"):
        settings("trainer.loggers=[wndb]")


def stopped_and_resumed(config: Config, steps: int) -> Run:
    """Two starts: of two steps, and to the end."""
    run = Run.create(config, default_name="x")
    last, config.trainer.max_steps = config.trainer.max_steps, steps
    assert fit(run.begin("first"), config, None, StopFlag())
    config.trainer.max_steps = last
    checkpoint = run.last_good()
    assert checkpoint is not None
    assert fit(run.begin("second"), config, checkpoint, StopFlag())
    return run


@pytest.mark.interfaces
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install 'longseq[mlflow]'")
def test_mlflow_has_one_run_of_two_starts(settings, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(loggers, "_LAST_WORDS_SECONDS", 600)  # four steps are over before its tables are made
    run = stopped_and_resumed(settings("trainer.loggers=[tensorboard, mlflow]"), 2)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/loggers/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'longseq'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (run.path / "loggers" / "mlflow.id").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert (found.data.params["model.dim"], found.data.params["attention.features"]) == ("16", "8")
    for name, points in read_curves(run.tensorboard_dir).items():
        history = {point.step: point.value for point in client.get_metric_history(found.info.run_id, name)}
        assert history == pytest.approx(points, rel=1e-6), name
    assert set(history) <= {1, 2, 3, 4}


@pytest.mark.interfaces
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install 'longseq[wandb]'")
def test_wandb_has_one_run_of_two_starts_without_a_network(settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(loggers, "_LAST_WORDS_SECONDS", 600)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = stopped_and_resumed(settings("trainer.loggers=[tensorboard, wandb]"), 2)
    known = (run.path / "loggers" / "wandb.id").read_text().strip()
    files = sorted((run.path / "loggers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{known}.wandb"] * 2
    for name, points in read_curves(run.tensorboard_dir).items():
        assert history(files, name) == pytest.approx(points, rel=1e-6), name


def history(files: list[Path], name: str) -> dict[int, float]:
    """A curve out of W&B's own files."""
    from wandb.proto.wandb_internal_pb2 import Record

    points: dict[int, float] = {}
    for path in files:
        for content in records(path.read_bytes()[7:]):
            items = Record.FromString(content).history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            if name in row:
                points[row["trainer/global_step"]] = row[name]
    return points


def records(content: bytes) -> Iterator[bytes]:
    """Of a log of LevelDB behind its header of 7 bytes: blocks of 32 KiB, and in them pieces of records, each behind a
    checksum (4 bytes), its length (2) and its kind (1): whole, first, middle, last."""
    place, begun = 7, b""
    while place - 7 < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place - 3 : place - 1], "little"), content[place - 1]
        begun += content[place : place + length]
        place += 7 + length
        if kind in (1, 4):
            yield begun
            begun = b""
