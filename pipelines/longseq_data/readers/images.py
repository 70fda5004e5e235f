"""Images as bytes in the order of ImageNet64: row by row, from left to right, red, green and blue of each pixel."""

from __future__ import annotations

import io
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longseq_data.errors import DataError, one_line
from longseq_data.os_errors import explained
from longseq_data.vocabulary import PIXELS, Tokens

from .formats import SUFFIXES

CHANNELS = 3


@dataclass(slots=True)
class ImageDocument:
    """A picture that is decoded when its tokens are asked for: size · size · 3 of them."""

    identifier: str
    source: str
    line: int  # of a table the row; 0 for a file of its own
    size: int
    content: bytes | str  # an encoded picture, or the path of its file

    @property
    def held(self) -> int:
        return len(self.content)

    def tokens(self) -> Tokens:
        return pixels(self.content, self.size, f"{self.source}, row {self.line}" if self.line else self.source)


def values_of(size: int) -> int:
    """Bytes of a picture: 64 · 64 · 3 = 12,288."""
    return size * size * CHANNELS


def read_images(folder: str, size: int) -> Generator[ImageDocument, None, None]:
    """The pictures directly in a folder, by name. Nothing is decoded here."""
    parent = Path(folder)
    if parent.is_file():
        raise DataError(f"{folder}: a file, and pictures are read by folders; give the folder that it is in.")
    try:
        names = sorted(path.name for path in parent.iterdir())
    except OSError as error:
        raise DataError(f"{explained(error, folder, 'cannot be read')}.") from error
    for name in names:
        if not name.startswith(".") and name.lower().endswith(SUFFIXES["images"]):
            path = str(parent / name)
            yield ImageDocument(f"{parent.name}/{name}", path, 0, size, path)


def pixels(content: bytes | str, size: int, place: str) -> Tokens:
    """A picture's tokens, (size · size · 3,): cropped to the square in its middle and averaged down where it is larger.

    Averaging over boxes is how the downsampled ImageNet was made (Chrabaszcz et al., arXiv 1707.08819). Raises
    DataError, its sentence beginning with ``place``, for what is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            else:
                rgb = image.convert("RGB")
        if rgb.size != (size, size):
            rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BOX)
    except Exception as error:  # every decoder has exceptions of its own
        raise DataError(
            f"{place}: cannot be read as an image ({one_line(error)[:200]}); replace or remove it."
        ) from error
    return np.asarray(rgb, dtype=np.uint8).reshape(-1).astype(PIXELS.dtype)
