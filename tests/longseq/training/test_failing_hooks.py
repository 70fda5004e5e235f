"""A training that fails, or is stopped, at any place: its reason is what the user sees, and nothing good is lost.

Whatever Lightning calls fails there once: its hooks, before and behind our callbacks; each hook of each callback; and
what else a training calls, from the loader to the last checkpoint's name.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.tensorboard import SummaryWriter

from longseq.config.loading import load_config, save_config
from longseq.config.schema import Config
from longseq.errors import EXIT_ERROR, EXIT_GO_ON, LongseqError
from longseq.runs import checkpoint as checkpoints
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq.training import fit, shards, snapshots, task, tensorboard, writer
from longseq.training.callbacks.first_failure import FirstFailure
from longseq.training.callbacks.patience import Patience
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.strategy import build_strategy
from longseq.training.worker import outcome, quiet
from longseq_data.datamodule import SequenceDataModule

REASON = "the marked reason."
# Everything that can be switched on, with something to do at every step.
EVERYTHING = (
    *("model.dim=16", "model.depth=1", "model.heads=2", "model.ffn_dim=16", "attention.features=8", "data.length=16"),
    *("data.batch_tokens=64", "data.valid_samples=4", "trainer.strategy=single", "trainer.max_steps=3"),
    *("trainer.valid_every=1", "trainer.checkpoint_every=1", "trainer.log_every=1", "trainer.probe_every=1"),
    *("trainer.sample_tokens=4", "trainer.histogram_every=1", "trainer.noise_every=1", "trainer.ema_decay=0.9"),
    *("trainer.length_warmup_steps=1", "trainer.length_warmup_start=8", "trainer.peak_tflops=1"),
    *("trainer.on_bad_step=skip", "trainer.spike_factor=9", "trainer.keep_checkpoints=9", "data.valid_fraction=0.3"),
)
# Of pl.Callback, those that nothing calls in a training: no sanity check, no test, no prediction, no hook of our own.
_NEVER = {"on_sanity_check_start", "on_sanity_check_end", "on_exception", "state_key"}
_OTHER_LOOPS = ("on_test_", "on_predict_")
HOOKS = sorted(
    name
    for name, value in vars(pl.Callback).items()
    if callable(value) and not name.startswith(("_", *_OTHER_LOOPS)) and name not in _NEVER
)
_threads_before: set[threading.Thread] = set()
# Too slow, or of other folders, for all tests.
ASKED_FOR = {
    "Profile": "trainer.profile_steps=[2, 2]",
    "Prometheus": "trainer.prometheus={0}/textfiles",
    "Benchmarks": "trainer.benchmarks=[{{kind: structure, path: {0}/chains.jsonl}}]",
}
ONLY_RESUMED = {"on_load_checkpoint", "load_state_dict"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("failing")
    records = (f">r{i}\n{'MKVLAACDEFGHIKLMNP'[i % 7 :]}{'QRSTVW'[i // 7]}\n" for i in range(40))
    (folder / "proteins.fasta").write_text("".join(records))
    (folder / "tiny.yaml").write_text("model: {preset: tiny}\ntrainer: {accelerator: cpu}\n")
    given = [f"data.train=['{folder}/proteins.fasta']", f"run.dir={folder}/runs", *EVERYTHING]
    return load_config(folder / "tiny.yaml", given)


@pytest.fixture(autouse=True)
def leaves_this_process_alone(one_thread: None) -> Iterator[None]:
    """Handlers of signals, threads' hook and levels of loggers are those of before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook, disabled = threading.excepthook, logging.root.manager.disable
    _threads_before.clear()
    _threads_before.update(threading.enumerate())
    quiet()
    yield
    threading.excepthook = hook
    logging.disable(disabled)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints_dir.mkdir()
    save_config(config, run.config_path)
    return run


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended, to be gone on with."""
    run = Run(tmp_path_factory.mktemp("trained") / "run")
    run.path.mkdir()
    run.checkpoints_dir.mkdir()
    save_config(config, run.config_path)
    assert outcome(lambda: 0 if fit.fit(run, config, None, StopFlag()) else 75, run) == (0, None)
    return run


def train(run: Run, config: Config, stop: StopFlag | None = None, start: Checkpoint | None = None) -> Any:
    """Exit code and sentence, as the worker's process has them."""
    return outcome(lambda: 0 if fit.fit(run, config, start, stop or StopFlag()) else EXIT_GO_ON, run)


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Fails at the first call alone: what fails there again, while things are taken down, is another test."""
    left = [act]
    return lambda: left.pop()() if left else None


def fails() -> None:
    raise LongseqError(REASON)


class Acting(pl.Callback):
    """Does something in one hook."""

    def __init__(self, hook: str, act: Callable[[], None]) -> None:
        original = getattr(super(), hook)

        def acting(*args: Any, **kwargs: Any) -> Any:
            act()
            return original(*args, **kwargs)

        setattr(self, hook, acting)


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: pl.Callback, place: str) -> None:
    build = fit.build_trainer

    def built(*args: Any) -> pl.Trainer:
        trainer = build(*args)
        trainer.callbacks.insert(0 if place == "first" else len(trainer.callbacks), callback)
        return trainer

    monkeypatch.setattr(fit, "build_trainer", built)


def sums(run: Run) -> dict[str, str]:
    """Checksums of the files of all checkpoints with a name."""
    files = (path for kept in run.checkpoints() for path in kept.path.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_the_end(run: Run, ended: tuple[int, str | None], shown: str, before: dict[str, str]) -> None:
    """One reason and no other word, whole checkpoints, all points on the disk, and nothing left of the process's."""
    assert ended == (EXIT_ERROR, REASON)
    assert "Traceback" not in shown
    assert "Error" not in shown
    assert before.items() <= sums(run).items()
    assert all(kept.problem() is None for kept in run.checkpoints())
    points = read_curves(run.tensorboard_dir).get("train/loss", {}) if run.tensorboard_dir.exists() else {}
    shown_steps = {int(step) for step in re.findall(r"^step (\d+)/\d+  loss", shown, re.MULTILINE)}
    assert shown_steps <= set(points), "a step was shown and is not in the curves"
    gc.collect()
    links = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert not [link for link in links if link.is_symlink() and os.readlink(link).startswith(str(run.path))]  # noqa: PTH115
    assert not multiprocessing.active_children()
    assert not set(threading.enumerate()) - _threads_before


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ONLY_RESUMED])
def test_an_error_in_a_hook_of_lightnings_is_what_the_user_reads(hook, place, run, config, monkeypatch, capfd):
    with_callback(monkeypatch, Acting(hook, once(fails)), place)
    check_the_end(run, train(run, config), capfd.readouterr().err, {})


# The epoch has begun before; it has no end.
@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "on_train_epoch_start"])
def test_an_error_in_a_hook_of_a_resumed_run_spares_its_checkpoints(hook, trained, run, config, monkeypatch, capfd):
    shutil.copytree(trained.checkpoints_dir, run.checkpoints_dir, dirs_exist_ok=True, symlinks=True)
    before, longer = sums(run), load_config(run.config_path, ["trainer.max_steps=5"])
    callback = Acting(hook, once(fails))
    if hook == "load_state_dict":
        monkeypatch.setattr("longseq.training.callbacks.bad_steps.BadSteps.load_state_dict", lambda *_: fails())
    else:
        with_callback(monkeypatch, callback, "last")
    start = Checkpoint(run.checkpoints_dir / checkpoints.checkpoint_name(3))
    check_the_end(run, train(run, longer, start=start), capfd.readouterr().err, before)


def _own_hooks() -> list[tuple[type[pl.Callback], str]]:
    modules = Path(fit.__file__).with_name("callbacks").glob("*.py")
    found = set()
    for path in modules:
        module = __import__(f"longseq.training.callbacks.{path.stem}", fromlist=["_"])
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, pl.Callback) and kind.__module__ == module.__name__:
                found |= {(kind, name) for name in vars(kind) if hasattr(pl.Callback, name) and name[0] != "_"}
    return sorted(found, key=lambda pair: (pair[0].__name__, pair[1]))


def with_own(kind: type, run: Run, config: Config) -> Config:
    """The configuration with a callback that it has not."""
    (run.path / "chains.jsonl").touch()
    key = ASKED_FOR.get(kind.__name__)
    return load_config(run.config_path, [key.format(run.path)]) if key else config


@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        pytest.param(kind, hook, id=f"{kind.__name__}.{hook}")
        for kind, hook in _own_hooks()
        if hook not in ONLY_RESUMED | {"on_exception"}
    ],
)
def test_an_error_in_a_hook_of_our_callbacks_is_what_the_user_reads(kind, hook, run, config, monkeypatch, capfd):
    act, original = once(fails), getattr(kind, hook)

    def failing(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, hook, failing)
    if kind is Patience:  # of a fine-tuning
        with_callback(monkeypatch, Patience(run, config), "first")
    check_the_end(run, train(run, with_own(kind, run, config)), capfd.readouterr().err, {})


@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        *[(kind, hook) for kind, hook in _own_hooks() if hook == "on_exception" and kind is not FirstFailure],
        (tensorboard.RunLogger, "finalize"),
        (SequenceDataModule, "on_exception"),
        (type(build_strategy(Config())), "on_exception"),
        (pl.loops.fit_loop._FitLoop, "teardown"),
    ],
)
@pytest.mark.parametrize("at", ["setup", "on_train_start", "on_train_batch_end"])
def test_what_fails_after_the_reason_does_not_hide_it(kind, hook, at, run, config, monkeypatch, capfd):
    with_callback(monkeypatch, Acting(at, once(fails)), "last")

    def failing(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("'Curves' object has no attribute 'bar'")

    monkeypatch.setattr(kind, hook, failing)
    assert train(run, with_own(kind, run, config)) == (EXIT_ERROR, REASON)
    assert "AttributeError" not in capfd.readouterr().err


# What else a training calls: who has it, and under what name.
PLACES = {
    "the trainer is built": (fit, "build_strategy"),
    "the model is built": (task, "PerformerLM"),
    "the optimiser is built": (task, "build_optimizer"),
    "the schedule is built": (task, "build_schedule"),
    "the schedule is followed": (task, "follow_config"),
    "the loader is made": (SequenceDataModule, "train_dataloader"),
    "the validation's loader is made": (SequenceDataModule, "val_dataloader"),
    "the strategy is set up": (pl.strategies.Strategy, "setup"),
    "the batch comes": (task.LanguageModelling, "on_before_batch_transfer"),
    "the forward pass": (task.LanguageModelling, "training_step"),
    "the loss": (task.LanguageModelling, "_score"),
    "the backward pass": (pl.strategies.Strategy, "backward"),
    "the optimiser's step": (pl.strategies.Strategy, "optimizer_step"),
    "the validation": (task.LanguageModelling, "validation_step"),
    "TensorBoard's file is opened": (SummaryWriter, "__init__"),
    "a point is written": (tensorboard.RunLogger, "log_metrics"),
    "the points are flushed": (tensorboard, "flush"),
    "the state is copied": (shards, "snapshot"),
    "the weights are copied": (snapshots, "full_state_dict"),
    "facts are noted": (Run, "record_start"),
    "the run is marked finished": (Run, "mark_finished"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_anything_a_training_calls_is_what_the_user_reads(place, run, config, monkeypatch, capfd):
    owner, name = PLACES[place]
    act, original = once(fails), getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    check_the_end(run, train(run, config), capfd.readouterr().err, {})


@pytest.mark.parametrize("name", ["write", "publish"])
def test_an_error_in_the_thread_that_writes_checkpoints_is_what_the_user_reads(name, run, config, monkeypatch, capfd):
    act, original = once(fails), getattr(writer, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    monkeypatch.setattr(writer, name, failing)
    code, sentence = train(run, config)
    assert (code, sentence.count(REASON.rstrip("."))) == (EXIT_ERROR, 1)
    check_the_end(run, (code, REASON), capfd.readouterr().err, {})


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        *[(hook, signal.SIGTERM) for hook in HOOKS if hook not in ONLY_RESUMED],
        *[(hook, signal.SIGINT) for hook in ("setup", "on_train_start", "on_validation_start")],
        ("on_train_start", signal.SIGUSR1),
        ("on_train_start", signal.SIGUSR2),
    ],
)
def test_a_signal_in_a_hook_ends_at_the_next_step_with_all_that_was_trained(
    hook, number, run, config, monkeypatch, capfd
):
    with_callback(monkeypatch, Acting(hook, once(lambda: os.kill(os.getpid(), number))), "last")
    stop = StopFlag()
    stop.install()
    code, sentence = train(run, config, stop)
    assert sentence is None
    after_the_last = hook in {"on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"}
    steps = [kept.position.step for kept in run.checkpoints()]
    if after_the_last:
        assert (code, steps[-1]) == (0, 3)
    else:
        assert (code, steps) in [(EXIT_GO_ON, [1]), (EXIT_GO_ON, [1, 2])]
    assert all(kept.problem() is None for kept in run.checkpoints())
    assert max(read_curves(run.tensorboard_dir)["train/loss"]) == steps[-1]
    assert "Traceback" not in capfd.readouterr().err
