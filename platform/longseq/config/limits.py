"""What a value of the right type may not be: beyond the limits of its key, or text that no configuration can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longseq.config.hints import near_choice
from longseq.config.written_values import MAPPINGS
from longseq.errors import ConfigError

_LARGEST = 2**63 - 1  # of a tensor's integers


def check_limits(name: str, value: Any, limits: Mapping[str, Any], place: str) -> None:
    """Refuse a value beyond the limits of its key.

    Raises:
        ConfigError: with the limits and the meaning.
    """
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        near = near_choice(name, str(value), limits["choices"])
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(f"{_at(place, name, value)}: choose from {', '.join(limits['choices'])}.{hint}")
    nested = list if limits.get("type", "").removesuffix(" | None") in MAPPINGS else (list, dict)
    if isinstance(value, list) and any(isinstance(part, nested) for part in value):
        raise ConfigError(f"{_at(place, name, value)}: a list in a list; write [a, b]: {limits['meaning']}.")
    if any(isinstance(n, float) and not math.isfinite(n) for n in (value if isinstance(value, list) else [value])):
        raise ConfigError(f"{_at(place, name, value)} must be a finite number: {limits['meaning']}.")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{place}: {name} must be at most 2**63 - 1: {limits['meaning']}.")
    low, high = limits["at_least"], limits["below"]
    if (low is not None and not value >= low) or (high is not None and not value < high):
        bounds = " and ".join(
            f"{word} {limit:g}" for word, limit in (("at least", low), ("below", high)) if limit is not None
        )
        raise ConfigError(f"{_at(place, name, value)} must be {bounds}: {limits['meaning']}.")


def check_text(name: str, value: Any, meaning: str, place: str) -> None:
    """Refuse text that no name of a file and no word can be, in a value that somebody has given.

    Raises:
        ConfigError: for text that is empty, that holds a NUL or bytes that are not UTF-8, and for "${", which a run's
            config.yaml would not hold as text.
    """
    texts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    texts = [text for part in texts for text in (_texts_of(part) if isinstance(part, dict) else [part])]
    for text in texts:
        if not isinstance(text, str):
            continue
        if not text.strip() and not isinstance(value, dict):  # a variable of the environment may be empty
            raise ConfigError(f"{place}: {name}: a text is empty; leave it out, or give one: {meaning}.")
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            what = "a NUL" if "\0" in text else "bytes that are not UTF-8"
            raise ConfigError(f"{place}: {name}={text!a}: holds {what}, which no configuration can hold; rename it.")
        if "${" in text:
            raise ConfigError(f"{place}: {name}={text}: '${{' is a reference, and this came out of one; rename it.")


def _texts_of(entry: Mapping[str, Any]) -> list[Any]:
    """Those of a source, or of another entry that is a mapping."""
    path = entry.get("path", [])
    return [*(path if isinstance(path, list) else [path]), *(value for name, value in entry.items() if name != "path")]


def _at(place: str, name: str, value: Any) -> str:
    """Where a value is written, and what it is; an argument says both by itself."""
    return place if place.startswith(f"argument '{name}=") else f"{place}: {name}={value}"
