"""Matrices as pictures: light where a weight is large. No plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

Picture = npt.NDArray[np.uint8]

_HEADS = 8  # shown of each row
_SIDE = 256  # pixels of one matrix, at the least
_GAP, _LINE = 8, 18
# Colours of matplotlib's "magma" at equal distances, black to pale yellow.
_COLOURS = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
     (254, 194, 135), (252, 253, 191)]
)  # fmt: skip


def heatmaps(title: str, rows: Mapping[str, Tensor]) -> Picture:
    """(height, width, 3): one row of pictures a label, one picture a head.

    Args:
        title: stands above all.
        rows: attention weights (heads, queries, keys) of each label. The scale is the square root of the weight as a
            share of the picture's largest: a matrix of softmax weights is black on a linear one.
    """
    heads = min(_HEADS, max(len(weights) for weights in rows.values()))
    zoom = max(1, -(-_SIDE // max(weights.shape[-1] for weights in rows.values())))
    side = zoom * max(weights.shape[-1] for weights in rows.values())
    width, height = heads * (side + _GAP) + _GAP, _LINE + len(rows) * (side + _LINE + _GAP) + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 4), title, fill="black")
    for number, (label, weights) in enumerate(rows.items()):
        top = _LINE + number * (side + _LINE + _GAP)
        for head, matrix in enumerate(weights[:heads]):
            left = _GAP + head * (side + _GAP)
            largest = float(matrix.max())
            draw.text((left, top + 4), f"{label}, head {head}, largest {largest:.2g}", fill="black")
            pixels = _coloured((matrix.numpy() / max(largest, 1e-30)).clip(0, 1) ** 0.5)
            canvas.paste(Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)), (left, top + _LINE))
    return np.asarray(canvas)


def _coloured(shares: npt.NDArray[np.float64]) -> Picture:
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(shares, places, channel) for channel in _COLOURS.T], axis=-1).astype(np.uint8)
