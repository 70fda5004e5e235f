"""What verbs print with --json: JSON that every program reads. No torch here."""

from __future__ import annotations

import json
import math
from typing import Any


def plain(value: Any) -> Any:
    """With None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any, indent: int | None = None) -> str:
    """``value`` as text; what JSON does not know, a path say, as ``str`` writes it."""
    return json.dumps(plain(value), indent=indent, default=str, allow_nan=False)
