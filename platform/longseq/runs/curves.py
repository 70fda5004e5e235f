"""A run's curves, read back from its TensorBoard files. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Curve = Mapping[int, float]  # step: value


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every scalar of a run's ``tensorboard`` folder, as TensorBoard shows them: a resumed run's points once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every point; of what is no scalar, one is the least it takes.
    sizes = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes)
    events.Reload()
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
