"""W&B and MLflow next to TensorBoard: the same curves, as one run of theirs across all starts of ours.

What they call the run lies in its folder, in ``loggers/NAME.id``, and next to it what they keep where there is no
network. A thread talks to each: where a server or a disk stands still the training goes on.
"""

from __future__ import annotations

import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.runs.run import Run
from longseq.training.callbacks.hyperparameters import flat
from longseq.training.callbacks.stopping import Settled, StopRequested
from longseq_data.files import write_text
from longseq_data.os_errors import said

# For what is on its way to a server when a training ends, and where a job must end soon: it is stopped, or failed.
_LAST_WORDS_SECONDS, _HURRIED_SECONDS = 60.0, 10.0
_MOST_WAITING = 100_000  # points, for a server that stands still
_PROJECT = "longseq"  # where the environment names none


def check_loggers(config: Config) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ConfigError: with how to install them.
    """
    for name in config.trainer.loggers:
        spec = None if name == "tensorboard" else find_spec(name)
        if name != "tensorboard" and (spec is None or spec.origin is None):  # a folder wandb/ here is no package
            raise ConfigError(
                f"trainer.loggers={config.trainer.loggers}, but {name} is not installed: pip install "
                f"'longseq[{name}]', or leave it out."
            )


def further_loggers(run: Run, config: Config) -> list[Logger]:
    """Those of ``trainer.loggers`` besides TensorBoard. Nothing is imported or made before their first point."""
    if int(os.environ.get("RANK", "0")):
        return []
    names = dict.fromkeys(config.trainer.loggers)
    return [InBackground(name, run, config, _MAKE[name]) for name in names if name in _MAKE]


class InBackground(Logger):
    """Hands points to another logger in a thread; when that fails, it is said once and the training goes on."""

    def __init__(self, name: str, run: Run, config: Config, make: Callable[[Run, Config], Logger]):
        super().__init__()
        self._name, self._run, self._config, self._make = name, run, config, make
        self._waiting: queue.SimpleQueue[tuple[dict[str, float], int | None] | None] = queue.SimpleQueue()
        self._status = ""
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._run.path.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One point in each curve."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._pass_on, name=self._name, daemon=True)
            self._thread.start()
        if self._thread.is_alive() and self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put((dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """The keys of the configuration are written when the first point is."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait for what is on its way. A stop, as Lightning has it a failure, is none."""
        if self._thread is None:
            return
        cause = sys.exc_info()[1]
        stopped = isinstance(cause, StopRequested) and not isinstance(cause, Settled)
        self._status = "stopped" if stopped else "success" if isinstance(cause, Settled) else status
        seconds = _LAST_WORDS_SECONDS if self._status == "success" else _HURRIED_SECONDS
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"did not answer within {seconds:g} s of the training's end")
        self._thread = None

    def _pass_on(self) -> None:
        try:
            self._run.check_start()
            logger = self._make(self._run, self._config)
            while (point := self._waiting.get()) is not None:
                logger.log_metrics(*point)
            _END[self._name](logger, self._status)
        except BaseException as error:  # whatever a library raises, it is no reason to stop
            self._warn(f"{type(error).__name__}: {said(error)}; its curves end here, and the training goes on")

    def _warn(self, what: str) -> None:
        print(f"longseq: warning: {self._name}: {what} (trainer.loggers).", file=sys.stderr, flush=True)


def _wandb(run: Run, config: Config) -> Logger:
    os.environ.setdefault("WANDB_CONSOLE", "off")  # the output is kept in logs/
    os.environ.setdefault("WANDB_QUIET", "true")
    known = _read(run, "wandb") or _keep(run, "wandb", secrets.token_hex(4))
    logger = WandbLogger(
        name=run.path.name, project=os.environ.get("WANDB_PROJECT", _PROJECT), id=known, save_dir=_folder(run)
    )  # resumes it where it is there: Lightning's resume="allow"
    logger.log_hyperparams(flat(config))
    return logger


def _end_wandb(logger: Any, status: str) -> None:
    logger.experiment.finish(exit_code=int(status == "failed"))  # nobody asks at the end of the interpreter


def _mlflow(run: Run, config: Config) -> Logger:
    known = _read(run, "mlflow")
    logger = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT),
        run_name=run.path.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_folder(run) / 'mlflow.db'}",
        run_id=known,
    )
    if known:
        logger.experiment.update_run(known, status="RUNNING")
    else:
        _keep(run, "mlflow", str(logger.run_id))
        logger.log_hyperparams(flat(config))  # once: MLflow refuses other values
    return logger


def _end_mlflow(logger: Any, status: str) -> None:
    logger.finalize("KILLED" if status == "stopped" else status)


_MAKE = {"wandb": _wandb, "mlflow": _mlflow}
_END = {"wandb": _end_wandb, "mlflow": _end_mlflow}


def _folder(run: Run) -> Path:
    folder = run.path / "loggers"
    folder.mkdir(exist_ok=True)
    return folder


def _read(run: Run, name: str) -> str | None:
    path = _folder(run) / f"{name}.id"
    return path.read_text(errors="replace").strip() if path.exists() else None


def _keep(run: Run, name: str, known: str) -> str:
    write_text(_folder(run) / f"{name}.id", f"{known}\n")
    return known
