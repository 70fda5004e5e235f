"""Train here, in processes of its own: what ``longseq fit`` and ``longseq resume`` do, as functions."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from longseq.config.loading import load_config
from longseq.config.merging import save_config
from longseq.config.schema import Config
from longseq.data import begin_reading, fix_order, identities, resolve_sources
from longseq.data_report import check_data
from longseq.errors import EXIT_GO_ON, LongseqError, RunError, SupersededError
from longseq.launch import local
from longseq.launch.before import check_benchmarks, check_disk, check_origin, say_schedule
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.launch.slurm.state import check_free
from longseq.runs import starts
from longseq.runs.changes import FIXED, check_precision, note_weights, refuse_changes
from longseq.runs.checkpoint import Checkpoint, CheckpointError, copied, go_back_to, remove_partials, step_of
from longseq.runs.curves import read_curves
from longseq.runs.owner import Process, words_of
from longseq.runs.run import Run, as_typed
from longseq.text_parts import fit_parts
from longseq.training.deepspeed_settings import check_deepspeed
from longseq_data.files import resolved, user_path


@dataclass(frozen=True)
class Training:
    """How a training ended."""

    run: Run
    code: int  # the exit code of its processes: 0 finished, 75 stopped and saved
    checkpoint: Checkpoint | None  # the newest whole one
    report: tuple[str, ...]  # how it ended, what came of it and what to do next, for people

    @property
    def finished(self) -> bool:
        """Whether trainer.max_steps was reached."""
        return self.code == 0


def fit(config: str | Path, overrides: Sequence[str] = ()) -> Training:
    """Train a new run.

    Args:
        config: a YAML file, or the name of a configuration that comes with longseq: ``protein/base``.
        overrides: ``section.key=value``, on top of it.

    Raises:
        LongseqError, DataError: in one sentence, for what cannot be trained; nothing is left of such a run.
    """
    path = Path(config)
    refuse_several_tasks(os.environ, "fit")
    return begin(load_config(path, list(overrides)), path.stem)


# Trains a run: its start, configuration, checkpoint or origin. Gives the exit code of local.train, or raises as that.
Launch = Callable[[Run, Config, Path | None, Path | None], int]


def _here(run: Run, config: Config, checkpoint: Path | None, origin: Path | None) -> int:
    return local.train(run, config.trainer.devices, checkpoint, origin)


def begin(settings: Config, name: str, launch: Launch = _here) -> Training:
    """Train a new run, called ``name`` and the time where its configuration has no name for it."""
    resolve_sources(settings)
    fit_parts(settings)
    fix_order(settings)
    Run.new(settings, default_name=name)  # a taken name is said before the data are read
    begin_reading(settings)
    check_data(settings, begun=True)
    origin = check_origin(settings)
    check_deepspeed(settings)
    check_benchmarks(settings)
    check_disk(settings, resolved(user_path(settings.run.dir)))
    run = Run.create(settings, default_name=name)
    with run.locked():
        try:
            run.record_data(identities(settings))
            return _train(run, settings, None, origin, launch)
        finally:
            run.discard_if_untrained()


def resume(
    folder: str | Path, overrides: Sequence[str] = (), *, take_over: bool = False, launch: Launch = _here
) -> Training:
    """Go on with a run from its newest whole checkpoint, or with ``run.branch=NAME`` begin a new run there.

    Args:
        folder: of the run; for a branch one of its checkpoints, too.
        overrides: ``section.key=value``: what may change, such as trainer.devices or trainer.max_steps.
        take_over: start although what had the run cannot be asked whether it still trains.
        launch: another launcher's way to train.

    Raises:
        LongseqError, DataError: in one sentence, for what would make another experiment of the run, and a run that is
            finished or trains elsewhere.
    """
    if launch is _here:
        refuse_several_tasks(os.environ, "resume")
    given = resolved(user_path(folder))
    chosen = Checkpoint(given) if step_of(given) is not None else None
    run = Run.open(str(given.parent.parent if chosen else folder))
    before, config = run.config(), run.config(tuple(overrides))
    resolve_sources(config)
    if config.run.branch is not None:
        return _branch(run, before, config, chosen, launch)
    if chosen:
        raise RunError(
            f"{folder}: a checkpoint, and a run goes on from its newest one: name the run, or give the new run that "
            "begins here a name with run.branch=NAME."
        )
    refuse_changes(before, config, run, FIXED)
    data = identities(config)
    if not config.data.accept_changes:
        run.check_data(config, data)
    config.data.accept_changes = False  # of these data, and not of the next ones
    with run.locked():
        check_free(run, take_over=take_over)
        checkpoint, damaged = _newest(run)
        if checkpoint is None and run.branch_path.exists():
            raise RunError(
                f"{run.path}: a branch whose first checkpoint was not copied to its end: remove the folder, and branch "
                "off again."
            )
        if checkpoint:
            _compare(checkpoint, config)
            say_schedule(before, config, checkpoint.position.step)
            settled = run.finished and checkpoint.position.step < before.trainer.max_steps
            if config.finetune.table and settled and config.finetune.patience == before.finetune.patience:
                raise RunError(
                    f"{run.path}: finished at step {checkpoint.position.step}, as its validation loss fell no more. To "
                    f"train on, wait longer: `{run.resume_command} finetune.patience={2 * config.finetune.patience}`."
                )
            if checkpoint.position.step >= config.trainer.max_steps:
                raise RunError(
                    f"{run.path}: finished at step {checkpoint.position.step}. To train on, raise the last step: "
                    f"`{run.resume_command} trainer.max_steps={2 * checkpoint.position.step}`."
                )
        note_weights(before, config, checkpoint.position.samples if checkpoint else 0)
        begin_reading(config)
        check_data(config, begun=True)
        origin = None if checkpoint else check_origin(config)
        check_deepspeed(config)
        check_benchmarks(config)
        check_disk(config, run.path)
        save_config(config, run.config_path)
        run.record_data(data)
        run.mark_finished(None)
        try:
            for kept in go_back_to(checkpoint, damaged) if checkpoint else ():
                print(f"longseq: warning: the damaged one is kept as {kept}", file=sys.stderr)
            return _train(run, config, checkpoint, origin, launch)
        except LongseqError:
            if run.last_good() == checkpoint:  # nothing came of the new settings
                save_config(before, run.config_path)
                if checkpoint and checkpoint.position.step >= before.trainer.max_steps:
                    run.mark_finished(checkpoint.position.step)
            raise


def _branch(run: Run, before: Config, config: Config, chosen: Checkpoint | None, launch: Launch) -> Training:
    """A new run that begins with a copy of a checkpoint of ``run``, the newest unless one is ``chosen``."""
    name, config.run.branch = config.run.branch, None
    refuse_changes(before, config, run, FIXED)
    data = identities(config)
    if not config.data.accept_changes:
        run.check_data(config, data)
    config.data.accept_changes = False
    checkpoint = chosen or _newest(run)[0]
    if checkpoint is None:
        raise RunError(f"{run.path}: has no checkpoint yet to branch off: wait for one, or start a run of its own.")
    problem = checkpoint.problem()
    if problem is not None:
        raise problem
    step = checkpoint.position.step
    _compare(checkpoint, config)
    say_schedule(before, config, step)
    if step >= config.trainer.max_steps:
        raise RunError(
            f"{checkpoint.path}: trained for {step} steps, and trainer.max_steps={config.trainer.max_steps}: raise it, "
            f"e.g. trainer.max_steps={step + max(1, step // 4)}."
        )
    note_weights(before, config, checkpoint.position.samples)
    begin_reading(config)
    check_data(config, begun=True)
    check_deepspeed(config)
    config.run.name, config.run.dir = name, str(run.path.parent)
    check_benchmarks(config)
    check_disk(config, run.path.parent)
    branch = Run.create(config, default_name=str(name))
    try:
        branch.record_origin(checkpoint.path, step)  # first: without its checkpoint it would begin at step 0
        first = copied(checkpoint, branch.checkpoints_dir)
        with branch.locked():
            branch.record_data(data)
            return _train(branch, config, first, None, launch)
    except BaseException:
        newest = branch.last_good()
        if (newest is None or newest.step == step) and not branch.has_output():  # nothing came of it
            shutil.rmtree(branch.path, ignore_errors=True)
        raise


def _newest(run: Run) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that can be used, and what is wrong with newer ones, which is said."""
    checkpoint, damaged = run.newest_checkpoint()
    for problem in damaged:
        print(f"longseq: warning: {problem} Going back to the one before it.", file=sys.stderr)
    return checkpoint, damaged


def _compare(checkpoint: Checkpoint, config: Config) -> None:
    """Say what is different from how the checkpoint was trained, and refuse what cannot be.

    Raises:
        RunError: for another precision.
    """
    check_precision(checkpoint, config)
    position, trainer = checkpoint.position, config.trainer
    changed = {
        "processes": (position.world_size, config.processes),
        "strategy": (position.strategy, trainer.strategy),
        "ZeRO stage": (position.zero_stage, trainer.zero_stage),
        "accumulated batches": (position.accumulate, trainer.accumulate),
    }
    words = [f"{what} {old} → {new}" for what, (old, new) in changed.items() if old != new]
    if words:
        print(
            f"elastic  {', '.join(words)}; one step stays {config.samples_per_step} sequences, from step "
            f"{position.step} (sample {position.samples:,}) on",
            file=sys.stderr,
        )


def _train(run: Run, config: Config, checkpoint: Checkpoint | None, origin: Path | None, launch: Launch) -> Training:
    """origin: of a training that begins, what :func:`check_origin` has found."""
    if config.trainer.memory_checkpoint_every:
        words = "trainer.memory_checkpoint_every: without effect here: nodes keep copies for the starts of one job"
        print(f"longseq: note: {words} (`longseq submit`).", file=sys.stderr)
    remove_partials(run.checkpoints_dir)  # of a start that was killed
    run = run.begin(words_of(Process.this()))
    began, end = time.monotonic(), "crashed"
    try:
        code = launch(run, config, checkpoint.path if checkpoint else None, origin)
        end = {0: "finished", EXIT_GO_ON: "saved"}.get(code, "stopped at once")
    except LongseqError as error:
        end = f"error {error}"
        raise
    finally:
        starts.note_end(run.starts_dir, run.start, end)
        with suppress(SupersededError):  # the newer start writes by now
            run.check_start()
            remove_partials(run.checkpoints_dir)
    newest = run.last_good()
    where = (
        f"step {newest.position.step} of {config.trainer.max_steps}, {newest.path}" if newest else "no checkpoint yet"
    )
    report = [f"{_HOW_IT_ENDED.get(code, 'Stopped at once')}: {where}"]
    report += results(run, checkpoint.position.step if checkpoint else 0, time.monotonic() - began)
    if code == 0:
        report.append(f"Evaluate it:   longseq evaluate {as_typed(run.path)}")
        report.append(f"Look at it:    tensorboard --logdir {as_typed(run.tensorboard_dir)}")
    elif newest:
        report.append(f"Go on with:    {run.resume_command}")
    return Training(run, code, newest, tuple(report))


_HOW_IT_ENDED = {0: "Finished", EXIT_GO_ON: "Stopped and saved"}


def results(run: Run, start: int, seconds: float) -> list[str]:
    """What came of a start at step ``start`` that took so long, and where it is: lines for people."""
    curves = read_curves(run.tensorboard_dir) if run.tensorboard_dir.exists() else {}
    lines = []
    speeds = {step: rate for step, rate in curves.get("train/tokens_per_second", {}).items() if step > start}
    # Steps after the last point in the curves, and after the last checkpoint, were trained, too.
    progress = starts.read_progress(run.starts_dir, run.start) if run.start else None
    saved = [checkpoint.step for checkpoint in run.checkpoints()]
    last = max([progress.step if progress else start, *(step for step in [*speeds, *saved] if step > start)])
    if last > start:
        speed = f", {sum(speeds.values()) / len(speeds):,.0f} tokens/s" if speeds else ""
        steps = f"{last - start:,} step{'s' if last - start > 1 else ''}"
        lines.append(f"Trained:       {steps} in {_duration(seconds)}{speed}")
    valid = curves.get("valid/loss", {})
    if valid:
        best = min(valid, key=lambda step: valid[step])
        forms = {"loss": ".4f", "perplexity": ".2f", "accuracy": ".1%", "rmse": ".4g"}
        known = {name: curves[f"valid/{name}"][best] for name in forms if f"valid/{name}" in curves}
        quality = ", ".join(f"{name} {value:{forms[name]}}" for name, value in known.items())
        lines.append(f"Best on valid: {quality}, at step {best}")
    if saved:
        steps = f"step{'s' if len(saved) > 1 else ''} {', '.join(map(str, saved))}"
        lines.append(f"Checkpoints:   {steps}, in {as_typed(run.checkpoints_dir)}")
    found = len(list(run.evaluations_dir.glob("*.json")))
    if found:
        lines.append(f"Evaluations:   {found}, in {as_typed(run.evaluations_dir)}")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
