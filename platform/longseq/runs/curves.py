"""A run's curves, read back from its TensorBoard files. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.runs.event_files import events_from

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

Curve = Mapping[int, float]  # step: value

# What runs of before call some curves: their name now.
_RENAMED = {f"machine/model_tflops_a_{unit}": f"machine/model_tflops_per_{unit}" for unit in ("step", "second")}


def read_curves(folder: Path) -> Mapping[str, Curve]:
    """Every scalar of a run's ``tensorboard`` folder, as TensorBoard shows them: a resumed run's points once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every point; of what is no scalar, one is the least it takes.
    sizes = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes)
    events.Reload()
    curves: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points = {point.step: point.value for point in events.Scalars(tag)}
        curves.setdefault(_RENAMED.get(tag, tag), {}).update(points)
    return curves


_LARGEST = 4096  # bytes of an event: larger ones are pictures and texts, not points


@dataclass(frozen=True)
class Point:
    """A point of a curve: its value, and when it was written, in seconds since 1970."""

    step: int
    value: float
    time: float


class LiveCurves:
    """A run's curves while it trains: each look reads what was written since the one before, and no picture."""

    def __init__(self) -> None:
        self.points: dict[str, dict[int, Point]] = {}
        self.began = 0  # at which step the newest start did, as far as it has been read
        self._path: Path | None = None
        self._inode = self._read = 0

    def look(self, folder: Path | None = None) -> None:
        """Read on. folder: to list, for files of later starts; without it nothing but the newest known file is seen."""
        if folder is not None and folder.is_dir():
            for path in sorted(folder.glob("events.out.tfevents.*"))[-2:]:  # the newest may have no point yet
                if self._path is None or path.name > self._path.name:
                    self._read_on()
                    self._path, self._inode, self._read = path, 0, 0
                    self._read_on()
        self._read_on()

    def newest(self, curve: str) -> Point | None:
        """The last point of a curve, if there is one."""
        points = self.points.get(curve)
        return points[max(points)] if points else None

    def steps_per_second(self, last: int = 20) -> float | None:
        """Over the last points of the newest start; None before there are two."""
        points = [point for step, point in sorted(self.points.get("train/loss", {}).items()) if step > self.began]
        some = points[-last:]
        if len(some) < 2 or some[-1].time <= some[0].time:
            return None
        return (some[-1].step - some[0].step) / (some[-1].time - some[0].time)

    def _read_on(self) -> None:
        if self._path is None:
            return
        try:
            found = self._path.stat()
            if found.st_ino != self._inode or found.st_size < self._read:  # a resume has written it anew
                self._inode, self._read = found.st_ino, 0
            if found.st_size == self._read:
                return
            for end, event in events_from(self._path, self._read, _LARGEST):
                self._read = end
                if event is not None:
                    self._take(event)
        except OSError:  # of a file system that is away for a moment
            return

    def _take(self, event: Event) -> None:
        if event.session_log.status == event.session_log.START:
            self.began = max(0, event.step - 1)
            for points in self.points.values():
                for step in [step for step in points if step >= event.step]:
                    del points[step]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curve = self.points.setdefault(_RENAMED.get(value.tag, value.tag), {})
                curve[event.step] = Point(event.step, value.simple_value, event.wall_time)
