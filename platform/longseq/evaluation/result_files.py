"""Keep an evaluation: JSON in the run's folder, and points in TensorBoard next to the training's own stream."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longseq.runs import starts
from longseq.runs.curves import read_curves
from longseq_data.files import write_text
from longseq_data.os_errors import lock

_ASIDE = ".partial-"


def keep_json(report: object, path: Path) -> None:
    """Write a file whole or not at all. Raises OSError where that cannot be done, SupersededError where the job has
    started anew elsewhere."""
    starts.check_own()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=2) + "\n")


def add_points(folder: Path, points: Mapping[str, float], step: int) -> None:
    """One point in each curve of a TensorBoard folder that only evaluations write to.

    The folder's one file of events is written anew with the points before, and takes the old one's place: a checkpoint
    that is evaluated again moves its points, and a full disk or a second evaluation at the same time loses none.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        before = sorted(folder.glob("*tfevents*"))
        curves = {tag: dict(curve) for tag, curve in read_curves(folder).items()} if before else {}
        for tag, value in points.items():
            curves.setdefault(tag, {})[step] = value
        steps: dict[int, list[Summary.Value]] = {}
        for tag, curve in curves.items():
            for at, value in curve.items():
                steps.setdefault(at, []).append(Summary.Value(tag=tag, simple_value=value))
        _put_events(folder, dict(sorted(steps.items())), before)


def show_pictures(folder: Path, pictures: Mapping[str, Path], step: int) -> None:
    """PNG files as TensorBoard images, by their tags; those of the same step before are replaced."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for tag, path in pictures.items():
        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        values.append(Summary.Value(tag=tag, image=image))
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        suffix = f".step-{step}"
        _put_events(folder, {step: values}, sorted(folder.glob(f"*tfevents*{suffix}")), suffix)


def _put_events(folder: Path, steps: Mapping[int, list[Any]], replaced: list[Path], suffix: str = "") -> None:
    """One file of events for some that it replaces: aside, then renamed, then the others removed."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for rest in folder.glob(f"{_ASIDE}*"):  # of one that was killed: TensorBoard shows it as a run of its own
        shutil.rmtree(rest, ignore_errors=True)
    now = time.time()
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=folder) as partial:
        writer = EventFileWriter(partial, filename_suffix=suffix)
        for at, values in steps.items():
            writer.add_event(Event(step=at, summary=Summary(value=values), wall_time=now))
        writer.close()
        starts.check_own()
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)
    for file in replaced:
        file.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        lock(file, folder, wait=True)
        yield
