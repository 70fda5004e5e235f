"""What a benchmark shows on the way, and where its numbers go."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import LongseqError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXIT_INTERRUPTED = 130


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not take the results, before an hour is spent on them."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise LongseqError(f"--out {folder}: {there} is not a folder that can be written to.")


def keep(folder: Path, name: str, numbers: Mapping[str, object], draw: Callable[[], Figure] | None = None) -> None:
    """Write NAME.json, and NAME.png where there is a picture, and say so; without matplotlib, say what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path, picture = folder / f"{name}.json", folder / f"{name}.png"
    path.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        if draw is not None:
            draw().savefig(picture, dpi=130)
    except ImportError:
        draw = None
        words = "no picture, since matplotlib is not installed: pip install 'longseq[bench]'"
        print(f"longseq: warning: {words}.", file=sys.stderr)
    print(f"\nkept in {path}{f' and {picture}' if draw else ''}")


class Progress:
    """What is being done, on a terminal in one line that changes; what was found, a line each. Both on stderr."""

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{desc}  {elapsed}", disable=not sys.stderr.isatty(), leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def now(self, text: str) -> None:
        self._bar.set_description_str(text)

    def line(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)
