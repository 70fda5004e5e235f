"""A checkpoint on disk: a folder with a manifest of its files. No torch here.

    step-00001000.ckpt/
      manifest.json        step, samples consumed, ranks, and size and SHA-256 of every file; and of itself
      model.safetensors    the weights, readable without DeepSpeed and without unpickling
      training/            fp32 weights and Adam's moments by the weight's name, a file a rank; counters and schedule

None of it is ever unpickled, and none depends on the number of ranks or the strategy that wrote it. It is written
under another name and renamed last, so a folder of this name is whole unless damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from longseq.errors import RunError
from longseq_data.files import sha256_of, sync_folder
from longseq_data.os_errors import explained

_MANIFEST = "manifest.json"
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

    @cached_property
    def position(self) -> TrainingPosition:
        """Step, samples and ranks.

        Raises:
            RunError: if the manifest cannot be read.
        """
        return TrainingPosition(**self._manifest()["position"])

    def problem(self) -> str | None:
        """What is wrong with the files, as one sentence; None if all are there with their checksums."""
        try:
            files = self._manifest()["files"]
        except RunError as error:
            return str(error)
        for name, expected in files.items():
            path = self.path / name
            if not path.is_file():
                return f"{path}: missing, so this checkpoint cannot be used."
            if path.stat().st_size != expected["size"]:
                return f"{path}: {path.stat().st_size} bytes instead of {expected['size']}, so it was cut or changed."
            if sha256_of(path) != expected["sha256"]:
                return f"{path}: its content does not match its checksum, so it was damaged."
        return None

    def _manifest(self) -> dict:
        try:
            text = self.manifest_path.read_bytes()
        except OSError as error:
            raise RunError(f"{explained(error, self.manifest_path, 'cannot be read')}.") from None
        try:
            manifest = json.loads(text)
            if manifest["format"] != FORMAT:
                raise RunError(
                    f"{self.manifest_path}: format {manifest['format']}, this version of longseq reads {FORMAT}."
                )
            TrainingPosition(**manifest["position"])
            _ = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
            del manifest["sha256"]
        except ValueError:
            raise RunError(f"{self.manifest_path}: not valid JSON, so it was damaged.") from None
        except (KeyError, TypeError, AttributeError):
            raise RunError(f"{self.manifest_path}: entries are missing or misspelt, so it was damaged.") from None
        if _rendered(manifest) != text:
            raise RunError(f"{self.manifest_path}: its content does not match its checksum, so it was damaged.")
        return manifest


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


def partial_path(directory: Path, step: int, start: int = 0) -> Path:
    """Where a run's start writes the checkpoint of ``step`` before it has its name; no two starts share it."""
    return directory / f".{checkpoint_name(step)}.{f'{start:05d}.' if start else ''}partial"


def publish(
    directory: Path,
    position: TrainingPosition,
    files: Mapping[str, Mapping[str, object]],
    start: int = 0,
    last_check: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Give a partial checkpoint, whose files are on the disk, its manifest and its name, and point ``last`` at it.

    files: path in the checkpoint: size and sha256. last_check: raises where it must not have its name any more.
    """
    partial = partial_path(directory, position.step, start)
    manifest = {"format": FORMAT, "position": asdict(position), "files": dict(sorted(files.items()))}
    with (partial / _MANIFEST).open("wb") as file:
        file.write(_rendered(manifest))
        file.flush()
        os.fsync(file.fileno())
    for folder in {partial, *((partial / name).parent for name in files)}:
        sync_folder(folder)
    final = directory / checkpoint_name(position.step)
    last_check()
    if final.exists():  # a damaged one, which the resume went behind
        shutil.rmtree(final)
    partial.rename(final)
    _point_last_at(final)
    sync_folder(directory)
    return Checkpoint(final)


def prune(directory: Path, keep: int, best: int = 0, every: int = 0) -> None:
    """Remove checkpoints up to ``last``, but for the ``keep`` newest, the ``best`` of lowest validation loss and
    those at multiples of ``every`` steps; and what interrupted writers left.

    Those after ``last`` are damaged (a resume went behind them): they must not crowd out the good ones.
    """
    last = (directory / "last").resolve().name
    known = sorted(path for path in directory.glob("step-*.ckpt") if path.name <= last)
    kept = {*known[-keep:], *_best(known, best)}
    for stale in known:
        if stale not in kept and not (every and int(stale.name[5:13]) % every == 0):
            shutil.rmtree(stale, ignore_errors=True)
    remove_partials(directory)


def _best(paths: Sequence[Path], count: int) -> list[Path]:
    """The ``count`` checkpoints of lowest validation loss, of equal ones the older; damaged ones are not among them."""
    losses = {}
    for path in paths if count else ():
        with suppress(RunError):
            losses[path] = Checkpoint(path).position.valid_loss
    validated = [path for path, loss in losses.items() if loss is not None]
    return sorted(validated, key=lambda path: (losses[path], path.name))[:count]


def remove_partials(directory: Path) -> None:
    """Remove what interrupted writers left. Only where none is writing."""
    for partial in directory.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _point_last_at(final: Path) -> None:
    aside = final.with_name(".last.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(final.name)
    aside.replace(final.with_name("last"))
