"""A run is a folder: its configuration, checkpoints, curves and logs. No torch here."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from longseq.config.merging import run_config, save_config
from longseq.config.schema import Config
from longseq.errors import RunError
from longseq.runs import starts
from longseq.runs.checkpoint import Checkpoint, CheckpointError, checkpoints_in, newest_in
from longseq.runs.curves import read_curves
from longseq_data.files import resolved, user_path, write_text
from longseq_data.os_errors import explained, lock

TOKENIZER = "tokenizer.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@lru_cache(maxsize=8)
def _as_started(path: Path, content: bytes) -> Config:
    return run_config(path)


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    start: int = 0  # which of its starts this process belongs to; 0: it only looks on

    @property
    def starts_dir(self) -> Path:
        return self.path / "starts"

    @property
    def slurm_dir(self) -> Path:
        return self.path / "slurm"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations_dir(self) -> Path:
        return self.path / "evaluations"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profiles_dir(self) -> Path:
        return self.path / "profiles"

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"

    @property
    def data_path(self) -> Path:
        return self.path / "data.json"

    @property
    def branch_path(self) -> Path:
        """Where a branch has begun; other runs have no such file."""
        return self.path / "branch.json"

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run: as a job what jobs have trained, on this machine anything else."""
        return f"longseq {'submit' if self._of_jobs() else 'resume'} {as_typed(self.path)}"

    @property
    def finished(self) -> bool:
        """Whether its training has reached its end."""
        return (self.path / "FINISHED").exists()

    def _of_jobs(self) -> bool:
        with suppress(OSError):  # it decides a word of a sentence
            number = self.start or max(starts.numbers(self.starts_dir), default=0)
            if number:
                return starts.text_of(self.starts_dir, number, "start").startswith("slurm job ")
            return (self.slurm_dir / "jobs.jsonl").exists()
        return False

    @classmethod
    def create(cls, config: Config, default_name: str) -> Run:
        """Make the folder of a new run and write its configuration, and a copy of its tokenizer's file.

        Raises:
            RunError: if a folder of that name exists, the name is unusable, or the folder cannot be made.
        """
        run = cls.new(config, default_name)
        path = run.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            raise run._taken() from None
        except OSError as error:
            raise RunError(f"{explained(error, path, 'the folder of the run cannot be made')}.") from None
        try:
            if config.data.tokenizer.endswith(".json"):  # the ids mean nothing without it
                shutil.copyfile(config.data.tokenizer, path / TOKENIZER)
                config.data.tokenizer = str(path / TOKENIZER)
            save_config(config, run.config_path)
            run.checkpoints_dir.mkdir()
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise RunError(f"{explained(error, path, 'the folder of the run cannot be written')}.") from None
            raise
        return run

    @classmethod
    def new(cls, config: Config, default_name: str) -> Run:
        """The run a configuration asks for, its name filled in; nothing is made yet.

        Raises:
            RunError: if the name is unusable or taken, or there is a run to branch off.
        """
        if config.run.branch is not None:
            raise RunError(
                f"run.branch={config.run.branch} goes on from a run's checkpoint, and a new run has none: leave it "
                "out, or branch off a run with `longseq resume RUN run.branch=NAME`."
            )
        if config.run.name is None:
            config.run.name = dated(default_name)
        if not _NAME.fullmatch(config.run.name):
            raise RunError(
                f"run.name={config.run.name!r}: a run is named with letters, digits, '.', '_' and '-', "
                "begins with a letter or digit, and has at most 100 of them."
            )
        path = resolved(user_path(config.run.dir)) / config.run.name
        if path.parent.exists() and not path.parent.is_dir():
            raise RunError(f"run.dir={config.run.dir}: a file, not a folder: choose another run.dir.")
        run = cls(path)
        if path.exists():
            raise run._taken()
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in an existing folder.

        Raises:
            RunError: if there is none.
        """
        run = cls(resolved(user_path(path)))
        if not run.config_path.is_file():
            what = "not a run folder (it has no config.yaml)" if run.path.exists() else "no such run folder"
            raise RunError(f"{path}: {what}. Runs are made by `longseq fit`, by default under runs/.")
        return run

    def begin(self, what: str) -> Run:
        """This run, as its newest start: the one that may write from now on."""
        return Run(self.path, starts.take(self.starts_dir, what))

    def check_start(self) -> None:
        """Before whatever a training writes: whether it is still the newest start.

        Raises:
            SupersededError: if it is not.
        """
        if self.start:
            starts.check(self.starts_dir, self.start)

    def config(self, overrides: tuple[str, ...] = ()) -> Config:
        """The resolved configuration the run was started with, and overrides on top of it."""
        if overrides or not self.config_path.is_file():
            config = run_config(self.config_path, overrides)
        else:  # a verb asks several times, and it takes a tenth of a second
            config = deepcopy(_as_started(self.config_path, self.config_path.read_bytes()))
        own = self.path / TOKENIZER
        if own.is_file() and not any(override.startswith("data.tokenizer") for override in overrides):
            config.data.tokenizer = str(own)  # wherever the run has been moved to
        return config

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint that was written to its end, oldest first; some may have been damaged since."""
        return checkpoints_in(self.checkpoints_dir)

    def newest_checkpoint(self, *, sums: bool = True) -> tuple[Checkpoint | None, list[CheckpointError]]:
        """The newest checkpoint that can be used, and what is wrong with newer ones; see ``checkpoint.newest_in``."""
        return newest_in(self.checkpoints_dir, sums=sums)

    def last_good(self) -> Checkpoint | None:
        """The newest complete checkpoint, for a sentence about something else: None also if none is found.

        Without checksums, which read all of it: whoever goes on from it takes them.
        """
        with suppress(RunError):
            return self.newest_checkpoint(sums=False)[0]
        return None

    def mark_finished(self, step: int | None) -> None:
        """Note that the last step was reached, or with None that there are steps to go again."""
        self.check_start()
        marker = self.path / "FINISHED"
        if step is None:
            marker.unlink(missing_ok=True)
        else:
            marker.write_text(f"{step}\n")

    def record_start(self, facts: dict[str, object]) -> None:
        """Append one start's facts to environment.json.

        Raises:
            RunError: if that file is damaged.
        """
        self.check_start()
        path = self.path / "environment.json"
        try:
            starts = list(json.loads(path.read_text())) if path.exists() else []
        except (ValueError, TypeError):
            raise _damaged(path) from None
        write_text(path, json.dumps([*starts, facts], indent=2) + "\n")

    def record_origin(self, checkpoint: Path, step: int) -> None:
        """Note where a branch of another run has begun."""
        write_text(self.branch_path, json.dumps({"checkpoint": str(checkpoint), "step": step}) + "\n")

    def record_data(self, identities: dict[str, list[str | None]]) -> None:
        """Note which data the run is trained on: of each split's sources, in their order, what tells them apart."""
        write_text(self.data_path, json.dumps(identities, indent=1) + "\n")

    def only_moved(self, split: str, old: list[str], new: list[str], identities: list[str | None]) -> bool:
        """Whether a split's sources of other names hold what the run was started with; False where nobody noted it.

        Names of files stay, as those of texts and images decide their splits; folders may be others.
        """
        try:
            before = json.loads(self.data_path.read_text())[split]
        except (OSError, ValueError, KeyError):
            return False
        names = [[Path(source).name for source in sources] for sources in (old, new)]
        return names[0] == names[1] and len(before) == len(new) and None not in before and before == identities

    def check_data(self, config: Config, identities: dict[str, list[str | None]]) -> None:
        """Hold data against those that the run was started with.

        Raises:
            RunError: naming the first source that has changed.
        """
        if not self.data_path.is_file():  # of an older version
            return
        try:
            before = json.loads(self.data_path.read_text())
        except ValueError:
            raise _damaged(self.data_path) from None
        for split, now in identities.items():
            key = "finetune.table" if split == "table" else f"data.{split}"
            names = [config.finetune.table] if split == "table" else config.data.files(split)
            for name, old, new in zip(names, before.get(split, []), now, strict=False):
                if None not in (old, new) and old != new:
                    raise RunError(
                        f"{name} ({key}) has changed since the run was started: it had {old}, and has {new}, so "
                        "its samples come in another order. Restore it, start another run, or go on all the same with "
                        f"`{self.resume_command} data.accept_changes=true`."
                    )

    def _taken(self) -> RunError:
        if not self.config_path.exists():
            return RunError(f"{self.path}: a folder of this name exists, and is no run: choose another run.name.")
        return RunError(
            f"{self.path}: a run of this name exists. Go on with it (`{self.resume_command}`), choose another "
            "run.name, or remove the folder."
        )

    def rank_log(self, rank: int) -> Path:
        """Where the output of a process is kept; but that of rank 0 of a job, which is the job's log."""
        return self.logs_dir / f"rank-{rank}.log"

    def trace_of(self, rank: int | str) -> Path:
        """The last collectives of a rank of this start, as ``torchfrtrace`` reads them."""
        return starts.path_of(self.starts_dir, self.start, f"collectives-{rank}")

    def stacks_of(self, rank: int | str) -> Path:
        """What a rank of this start was doing when a hang ended it."""
        return starts.path_of(self.starts_dir, self.start, f"stacks-{rank}.txt")

    def has_output(self) -> bool:
        """Whether a process other than rank 0 had something to say: a traceback, mostly."""
        return any(log.stat().st_size for log in self.logs_dir.glob("*") if log.name != "rank-0.log")

    def discard_if_untrained(self) -> None:
        """Remove the folder of a run that ended before it had anything to keep: its name is free again.

        Events without a point in a curve are nothing to keep: the keys of the run, for instance.
        """
        with suppress(OSError, RunError):  # what cannot be read may be something to keep
            kept = newest_in(self.checkpoints_dir, sums=False)[0] is not None
            if not kept and not self.has_output() and not self._has_points():
                shutil.rmtree(self.path, ignore_errors=True)

    def _has_points(self) -> bool:
        inside = list(self.tensorboard_dir.iterdir()) if self.tensorboard_dir.exists() else []
        return any(path.is_dir() for path in inside) or (bool(inside) and bool(read_curves(self.tensorboard_dir)))

    def is_trained_here(self) -> bool:
        """Whether a process of this machine, or of one that shares its locks, trains this run."""
        try:
            with (self.path / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one training job on this machine.

        Raises:
            RunError: if another one holds it.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                lock(file, self.path)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"{self.path}: this run is being trained already (process {file.read().strip() or 'unknown'}). "
                    "Wait for its end, or stop it first (Ctrl-C or SIGTERM: it saves)."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield


def _damaged(path: Path) -> RunError:
    return RunError(f"{path}: not valid JSON, so it was damaged; remove it to go on.")


def dated(name: str) -> str:
    """A name for a run: the time behind what a file is called, as far as runs may be called so."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("._-")[:70]
    return f"{plain or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"


def as_typed(path: Path) -> str:
    """A path as a person would type it from where they stand, quoted for the shell."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
