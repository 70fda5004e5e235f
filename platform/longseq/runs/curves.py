"""A run's curves, read back from its TensorBoard files. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
