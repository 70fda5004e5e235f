"""What a key of the data section names: files; or several sources, each with a name of its own and a weight."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longseq.config.hints import unknown_key
from longseq.errors import ConfigError

Source = dict[str, Any]  # "name": text, "path": list of text, "weight": number above 0

_KEYS = ("path", "weight", "name")
_HOW = "write {path: FILE, weight: NUMBER, name: TEXT}, of which path is needed"


def named(value: Any, key: str, place: Callable[[str], str]) -> Any:
    """The value of a key with its sources in full, where they are no plain names of files.

    place: where a part of a configuration stands, data.train[0].weight say.

    Raises:
        ConfigError: one sentence that names the place.
    """
    if isinstance(value, dict):  # {name: path, ...}
        value = [{"name": name, **(part if isinstance(part, dict) else {"path": part})} for name, part in value.items()]
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return value
    sources = [_source(entry, f"{key}[{number}]", place) for number, entry in enumerate(value)]
    refuse_repeated_names(sources, key, place, "sources")
    return sources


def changed(value: Any, key: str, which: str, name: str, new: Any, place: Callable[[str], str]) -> list[Source]:
    """The sources of a key, of which one gets another weight, path or name. which: its number from 0, or its name.

    Raises:
        ConfigError: one sentence that names the place.
    """
    sources = [entry for entry in value if isinstance(entry, dict)]
    names = [source["name"] for source in sources]
    chosen = names.index(which) if which in names else int(which) if which.isdecimal() else len(names)
    if chosen >= len(sources):
        there = ", ".join(f"{number} ({each})" for number, each in enumerate(names))
        hint = f"it has {there}" if there else f"write {key}=[{{path: FILE, weight: NUMBER}}, ...]"
        raise ConfigError(f"{place(key)}: {key} has no source {which!r}; {hint}.")
    sources[chosen] = {**sources[chosen], name: new}
    return named(sources, key, place)


def _source(entry: Any, key: str, place: Callable[[str], str]) -> Source:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place(key)}: {key}={entry}: other sources here have weights: write {{path: {entry}}}.")
    for name in entry:
        if name not in _KEYS:
            raise ConfigError(f"{place(f'{key}.{name}')}: {unknown_key(f'{key}.{name}', _KEYS, 'A source has')}")
    path = entry.get("path")
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
        raise ConfigError(f"{place(f'{key}.path')}: {key}.path={path}: name a file, or a list of them; {_HOW}.")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigError(
            f"{place(f'{key}.weight')}: {key}.weight={weight} must be a number above 0: how many samples come from "
            "this source, compared with the others."
        )
    name = entry.get("name", name_of(paths[0]))
    refuse_unusable_name(name, f"{key}.name", place)
    return {"name": name, "path": paths, "weight": float(weight)}


def refuse_repeated_names(
    entries: Sequence[Mapping[str, Any]], key: str, place: Callable[[str], str], what: str
) -> None:
    """Raise ConfigError where two of a key's entries have one name."""
    for name, times in Counter(entry["name"] for entry in entries).most_common(1):
        if times > 1:
            raise ConfigError(f"{place(key)}: {key}: {times} {what} are called {name}: give each a name of its own.")


def refuse_unusable_name(name: Any, key: str, place: Callable[[str], str]) -> None:
    """Raise ConfigError for a name that curves cannot have."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            f"{place(key)}: {key}={name}: letters, digits, dots, dashes and underscores alone: it names curves."
        )


def name_of(path: str) -> str:
    """That of its file without endings."""
    last = re.split(r"[:@#?]", path.removeprefix("hub:").rstrip("/").rpartition("/")[2])[0]
    return re.sub(r"[^\w-]+", "_", last.split(".")[0] or last) or "source"


def unweighted(value: Any) -> Any:
    """Sources without what a run may change: their weights."""
    if not isinstance(value, list):
        return value
    return [
        {key: of for key, of in entry.items() if key != "weight"} if isinstance(entry, dict) else entry
        for entry in value
    ]


def reweighted(before: list[Source], after: list[Source], noted: list[str], samples: int) -> list[str]:
    """data.reweighted of a run that goes on after so many samples with other weights, or with the same.

    A run that goes on from an earlier checkpoint draws again what it has drawn, changes of weights included.
    """
    old, new = ([source["weight"] for source in sources] for sources in (before, after))
    if old == new:
        return noted
    kept = [note for note in noted if parsed(note)[0] < samples]
    later = [note for note in noted if parsed(note)[0] >= samples]  # what held up to here
    weights = later[0].partition(": ")[2] if later else " ".join(map(repr, old))
    return [*kept, *([f"{samples}: {weights}"] if samples else [])]


def parsed(note: str) -> tuple[int, list[float]]:
    """An entry of data.reweighted: up to which sample, weights.

    Raises:
        ConfigError: for anything else.
    """
    until, _, weights = note.partition(": ")
    try:
        found = int(until), [float(weight) for weight in weights.split()]
        if found[0] > 0 and all(0 < weight < math.inf for weight in found[1]):
            return found
    except ValueError:
        pass
    raise ConfigError(f"data.reweighted: {note!r}: `longseq resume` writes SAMPLES: WEIGHT ...; leave it out.")
