"""Matrices as pictures: light where a weight is large. No plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = npt.NDArray[np.uint8]

_HEADS, _ACROSS = 8, 4  # shown of each label, and in one line
_SIDE = 256  # pixels of one matrix, at the least
_TEXT = 19  # pixels: TensorBoard shrinks pictures to a card's width
_GAP, _LINE = 8, 27
# Colours of matplotlib's "magma" at equal distances, black to pale yellow.
_COLOURS = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
     (254, 194, 135), (252, 253, 191)]
)  # fmt: skip


def heatmaps(title: str, rows: Mapping[str, Tensor]) -> Picture:
    """(height, width, 3): lines of pictures for each label, one picture per head.

    Args:
        title: stands above all.
        rows: attention weights (heads, queries, keys) of each label. Every query's weights are shown as shares of its
            largest: on one scale for all, a causal map is black but for the first queries, which have few keys.
    """
    heads = min(_HEADS, min(len(weights) for weights in rows.values()))
    across = min(_ACROSS, heads)
    lines = -(-heads // across)  # of each label
    size = max(weights.shape[-1] for weights in rows.values())
    zoom = max(1, -(-_SIDE // size))
    side = zoom * size
    width = across * (side + _GAP) + _GAP
    height = _LINE + len(rows) * lines * (side + _LINE + _GAP) + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
    draw.text((_GAP, 4), title, fill="black", font=font)
    for number, (label, weights) in enumerate(rows.items()):
        for head, matrix in enumerate(weights[:heads]):
            line, place = divmod(head, across)
            left, top = _GAP + place * (side + _GAP), _LINE + (number * lines + line) * (side + _LINE + _GAP)
            draw.text((left, top + 3), f"{label}, head {head}", fill="black", font=font)
            pixels = _coloured((matrix / matrix.amax(-1, keepdim=True).clamp_min(1e-30)).clamp(0, 1).numpy())
            canvas.paste(Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)), (left, top + _LINE))
    return np.asarray(canvas)


def _coloured(shares: npt.NDArray[np.float64]) -> Picture:
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(shares, places, channel) for channel in _COLOURS.T], axis=-1).astype(np.uint8)
