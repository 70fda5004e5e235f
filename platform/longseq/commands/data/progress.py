"""Progress of long work on data: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

SILENCE = 20.0  # seconds between two lines of a log


class Bar:
    """Call it with (stage, done, of how many). ``stages``: what each is called, and its unit ("B": bytes)."""

    def __init__(self, stages: Mapping[str, tuple[str, str]]) -> None:
        self._stages = stages
        self._stage = ""
        self._bar: tqdm | None = None
        self._spoke = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        elif stage != self._stage or done == total or time.monotonic() - self._spoke > SILENCE:
            self._say(stage, done, total)
        self._stage = stage

    def _draw(self, stage: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if stage != self._stage or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            name, unit = self._stages[stage]
            # what an earlier start has done is no speed of this one
            self._bar = tqdm(
                desc=name, total=total, initial=done, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr
            )
        self._bar.update(done - self._bar.n)

    def _say(self, stage: str, done: int, total: int | None) -> None:
        name, unit = self._stages[stage]
        of = "" if total is None else f" of {total:,}"
        print(f"{name}: {done:,}{of}{' bytes' if unit == 'B' else unit}", file=sys.stderr, flush=True)
        self._spoke = time.monotonic()
