"""A checkpoint on disk: a folder with a manifest of its files. No torch here.

    step-00001000.ckpt/
      manifest.json        step, samples consumed, ranks, and size and SHA-256 of every file; and of itself
      model.safetensors    the weights, readable without DeepSpeed and without unpickling
      training/            fp32 weights and Adam's moments by the weight's name, a file per rank; counters and schedule

None of it is ever unpickled, and none depends on the number of ranks or the strategy that wrote it. It is written
under another name and renamed last, so a folder of this name is whole unless damaged later. A damaged one is kept
as step-00001000.damaged, which nothing reads or removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longseq.errors import RunError
from longseq_data.files import sha256_of, sync_folder
from longseq_data.os_errors import explained, remedy, said

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})\.ckpt")
# Errors that say that a file is not there. Any other (EIO, ESTALE, EACCES, ...) says nothing of what is in it.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
FORMAT = 2


@dataclass(frozen=True)
class TrainingPosition:
    """Where training stood, and how it was trained."""

    step: int
    samples: int  # consumed so far by all ranks together: the whole state of the data
    world_size: int
    strategy: str
    zero_stage: int
    precision: str
    accumulate: int
    valid_loss: float | None  # of the validation at this very step
    # Σ loss, correct and targets over all ranks since the last point in TensorBoard, so that the next one is whole.
    unlogged: tuple[float, float, float]


class CheckpointError(RunError):
    """Why a checkpoint cannot be used, as a sentence."""

    def __init__(self, checkpoint: Checkpoint, path: Path, reason: str, *, damaged: bool):
        """damaged: its bytes are not those that were written. Else it may be good, and cannot be read here or now."""
        super().__init__(f"{path}: {reason}.")
        self.checkpoint, self.path, self.reason, self.damaged = checkpoint, path, reason, damaged


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        return self.path / _MANIFEST

    @property
    def weights_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def step(self) -> int:
        """By its name."""
        step = step_of(self.path)
        assert step is not None
        return step

    @cached_property
    def position(self) -> TrainingPosition:
        """Step, samples and ranks.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        return TrainingPosition(**self._manifest()["position"])

    def problem(self, *, sums: bool = True) -> CheckpointError | None:
        """What is wrong with the files; None if all are there with their checksums.

        sums: False looks at the manifest and the sizes alone, at once.
        """
        try:
            for name, expected in self._manifest()["files"].items():
                self._check_file(self.path / name, expected["size"], expected["sha256"] if sums else None)
        except CheckpointError as error:
            return error
        return None

    def _check_file(self, path: Path, size: int, sha256: str | None) -> None:
        try:
            found = path.stat().st_size
            digest = sha256_of(path) if sha256 and found == size else None
        except OSError as error:
            raise self._unread(path, error) from None
        if found != size:
            raise self._damaged(path, f"{found} bytes instead of {size}, so it was cut or changed")
        if sha256 and digest != sha256:
            raise self._damaged(path, "its content does not match its checksum, so it was damaged")

    def _manifest(self) -> dict[str, Any]:
        path = self.manifest_path
        try:
            text = path.read_bytes()
        except OSError as error:
            raise self._unread(path, error) from None
        try:
            manifest = json.loads(text)
            written_as, _ = manifest["format"], manifest.pop("sha256", None)
        except ValueError:
            raise self._damaged(path, "not valid JSON, so it was damaged") from None
        except (KeyError, TypeError, AttributeError):
            raise self._damaged(path, "entries are missing or misspelt, so it was damaged") from None
        if written_as != FORMAT:
            raise self._of_another_version(f"format {written_as}, this version of longseq reads {FORMAT}")
        if _rendered(manifest) != text:
            raise self._damaged(path, "its content does not match its checksum, so it was damaged")
        try:
            TrainingPosition(**manifest["position"])
            _ = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError):  # as they were written
            raise self._of_another_version("its entries are not those that this version of longseq writes") from None
        return manifest

    def _damaged(self, path: Path, reason: str) -> CheckpointError:
        return CheckpointError(self, path, reason, damaged=True)

    def _unread(self, path: Path, error: OSError) -> CheckpointError:
        if error.errno in _ABSENT:
            return self._damaged(path, "missing, so this checkpoint cannot be used")
        return CheckpointError(self, path, f"cannot be read ({said(error)}); {remedy(error)}", damaged=False)

    def _of_another_version(self, reason: str) -> CheckpointError:
        advice = "go on with the version that wrote it (environment.json of the run has them)"
        return CheckpointError(self, self.manifest_path, f"{reason}; {advice}", damaged=False)


def _rendered(manifest: Mapping[str, object]) -> bytes:
    """A manifest as it stands in its file: what is hashed, and the hash."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def expected_bytes(parameters: int, *, ema: bool = False) -> int:
    """About how large a checkpoint is: the weights, and in fp32 once more with AdamW's two moments.

    ema: with a running mean of the weights.
    """
    return parameters * 4 * (5 if ema else 4)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Checkpoint]:
    """Every checkpoint that was written to its end, oldest first; some may have been damaged since.

    Raises:
        RunError: if the folder cannot be read: that is not the same as having none.
    """
    found = (path for path in _entries(directory) if step_of(path) is not None)
    return sorted(map(Checkpoint, found), key=lambda checkpoint: checkpoint.step)


def newest_in(directory: Path, *, sums: bool = True) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that can be used, and what is wrong with newer ones, all of which are damaged.

    None means that there has never been one: only then may a training begin at step 0.

    Raises:
        RunError: if none of several can be used, or a newer one is not damaged and cannot be read here or now.
    """
    problems: list[CheckpointError] = []
    for checkpoint in reversed(checkpoints_in(directory)):
        in_doubt = not all(problem.damaged for problem in problems)
        problem = checkpoint.problem(sums=sums and not in_doubt)
        if problem is not None:
            if checkpoint.path not in _entries(directory):  # the training has removed it since
                return newest_in(directory, sums=sums)
            problems.append(problem)
        elif in_doubt:
            raise RunError(
                f"{_listed(problems)}. What cannot be read now may be good, so that of step {checkpoint.step} is not "
                f"taken instead; to go on from there all the same, move the newer ones out of {directory}."
            )
        else:
            return checkpoint, problems
    if problems:
        raise RunError(
            f"{directory}: none of its {len(problems)} checkpoints can be used, and a run with checkpoints does not "
            f"begin anew; nothing was changed: {_listed(problems)}. Restore one of them, or start another run."
        )
    names = sorted(path.name for path in _entries(directory))
    rest = [name for name in names if name == "last" or name.startswith("step-") or name.endswith(".ckpt")]
    if rest:
        raise RunError(
            f"{directory}: holds {', '.join(rest[:5])} and no checkpoint that can be used, and does not begin anew "
            "next to what may be left of one: restore a checkpoint, move these away, or start another run."
        )
    return None, []


def _listed(problems: Sequence[CheckpointError]) -> str:
    """Each checkpoint with its reason, those of the same reason together."""
    where: dict[str, list[str]] = {}
    for problem in problems:
        where.setdefault(problem.reason, []).append(str(problem.path))
    return "; ".join(f"{', '.join(paths)}: {reason}" for reason, paths in where.items())


def _entries(directory: Path) -> list[Path]:
    try:
        # Path.glob takes a folder that may not be read for an empty one.
        return [directory / name for name in os.listdir(directory)]  # noqa: PTH208
    except FileNotFoundError:
        if not directory.is_symlink():
            return []
        raise RunError(f"{directory}: a link to {directory.readlink()}, which is not there: is it mounted?") from None
    except OSError as error:
        raise RunError(f"{explained(error, directory, 'cannot be read')}.") from None


def partial_path(directory: Path, step: int, start: int = 0) -> Path:
    """Where a run's start writes the checkpoint of ``step`` before it has its name; no two starts share it."""
    return directory / f".{checkpoint_name(step)}.{f'{start:05d}.' if start else ''}partial"


def publish(
    directory: Path,
    position: TrainingPosition,
    files: Mapping[str, Mapping[str, object]],
    start: int = 0,
    last_check: Callable[[], None] = lambda: None,
    recalled: bool = False,
) -> Checkpoint:
    """Give a partial checkpoint, whose files are on the disk, its manifest and its name, and point ``last`` at it.

    files: path in the checkpoint: size, sha256. last_check: raises where it may not be named. recalled: from memory.
    """
    partial = partial_path(directory, position.step, start)
    manifest = {"format": FORMAT, "position": asdict(position), "files": dict(sorted(files.items()))}
    manifest |= {"recalled": True} if recalled else {}
    with (partial / _MANIFEST).open("wb") as file:
        file.write(_rendered(manifest))
        file.flush()
        os.fsync(file.fileno())
    for folder in {partial, *((partial / name).parent for name in files)}:
        sync_folder(folder)
    final = directory / checkpoint_name(position.step)
    last_check()
    if os.path.lexists(final):  # a damaged one, which the resume went behind
        set_aside(final)
    partial.rename(final)
    _point_last_at(final)
    sync_folder(directory)
    return Checkpoint(final)


def copied(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """A copy of a checkpoint as the only one of another run, ``directory`` of it.

    Raises:
        RunError: if it cannot be copied, or its run has removed it meanwhile.
    """
    final = directory / checkpoint.path.name
    partial = partial_path(directory, checkpoint.step)
    try:
        shutil.copytree(checkpoint.path, partial)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{checkpoint.path}: cannot be copied to {directory} ({error}).") from None
    partial.rename(final)
    _point_last_at(final)
    copy = Checkpoint(final)
    problem = copy.problem()
    if problem is not None:
        raise problem
    return copy


def go_back_to(newest: Checkpoint, damaged: Sequence[CheckpointError]) -> list[Path]:
    """Before training goes on from ``newest``: keep the damaged ones after it under names that it leaves alone.

    Returns:
        their new paths.
    """
    kept = [set_aside(problem.checkpoint.path) for problem in damaged]
    if kept:
        _point_last_at(newest.path)
    return kept


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that nothing reads or removes: the new path.

    Raises:
        RunError: if it cannot be renamed.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.damaged{f'-{number}' if number > 1 else ''}")):
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise RunError(f"{explained(error, path, f'damaged, and cannot be renamed to {aside.name}')}.") from None
    return aside


def prune(directory: Path, keep: int, best: int = 0, every: int = 0) -> None:
    """Remove checkpoints up to ``last``, but for the ``keep`` newest, the ``best`` of lowest validation loss and
    those at multiples of ``every`` steps; and what interrupted writers left.

    Those after ``last`` are damaged (a resume went behind them): they must not crowd out the good ones, nor must those
    from memory, which go with the next one. What has no readable manifest stays. Nothing goes unless ``last`` is whole.
    """
    last = Checkpoint((directory / "last").resolve())
    if step_of(last.path) is not None and last.problem(sums=False) is None:
        newest: list[Checkpoint] = []
        losses: dict[Checkpoint, float | None] = {}
        for checkpoint in reversed(checkpoints_in(directory)):
            if checkpoint.step > last.step or (not best and len(newest) >= keep and _is_multiple(checkpoint, every)):
                continue  # it stays, whatever its manifest says
            with suppress(CheckpointError):
                recalled = "recalled" in checkpoint._manifest()
                if not recalled or checkpoint.step < last.step:
                    losses[checkpoint] = None if recalled else checkpoint.position.valid_loss
                    newest += [checkpoint] if len(newest) < keep and not recalled else []
        stale = losses.keys() - {*newest, *_best(losses, best)}
        _remove_all(checkpoint.path for checkpoint in stale if not _is_multiple(checkpoint, every))
    remove_partials(directory)


def _is_multiple(checkpoint: Checkpoint, every: int) -> bool:
    return bool(every) and checkpoint.step % every == 0


def _best(losses: Mapping[Checkpoint, float | None], count: int) -> list[Checkpoint]:
    """The ``count`` checkpoints of lowest validation loss, of equal ones the older."""
    validated = [(loss, checkpoint.step, checkpoint) for checkpoint, loss in losses.items() if loss is not None]
    return [checkpoint for _, _, checkpoint in sorted(validated, key=lambda entry: entry[:2])[:count]]


def _remove_all(checkpoints: Iterable[Path]) -> None:
    """Of those that cannot be removed, the first is said."""
    left: list[str] = []
    for path in sorted(checkpoints):
        try:
            _remove(path)
        except OSError as error:
            left.append(explained(error, path, "is no longer needed, but cannot be removed"))
    if left:
        others = f" ({len(left) - 1} more like it)" if left[1:] else ""
        print(f"longseq: warning: {left[0]}{others}.", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    """Under a partial's name first: half of it, after a kill, must not look like a damaged checkpoint."""
    partial = path.with_name(f".{path.name}.removed.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted removal has left
    with suppress(FileNotFoundError):  # another process has removed it
        path.rename(partial)
        shutil.rmtree(partial)


def remove_partials(directory: Path) -> None:
    """Remove what interrupted writers left. Only where none is writing."""
    for partial in directory.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _point_last_at(final: Path) -> None:
    """Of a checkpoint: make ``last`` name it."""
    aside = final.with_name(".last.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(final.name)
    aside.replace(final.with_name("last"))
