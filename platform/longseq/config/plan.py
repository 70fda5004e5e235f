"""The key ``attention.layers``: layers whose attention is not that of the section, as names of kinds or mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from longseq.attention.options import AttentionOptions
from longseq.config.hints import unknown_key
from longseq.errors import ConfigError

Entry = str | dict[str, Any]  # the name of a kind, or options by name

# All options but those of the model as a whole. Without features there is the window alone.
OF_A_LAYER: dict[str, Mapping[str, Any]] = {
    item.name: {**item.metadata, "type": str(item.type), **({"at_least": 0} if item.name == "features" else {})}
    for item in fields(AttentionOptions)
    if item.name not in ("backend", "redraw_every")
}
_HOW = "write kinds, or mappings of what a layer has of its own: [favor, {kind: favor, window: 64}, exact]"

# Refuses a value that is not one of its key: its name, itself, what is known of the key, and where it stands.
Check = Callable[[str, Any, Mapping[str, Any], str], None]


def planned(value: Any, key: str, place: Callable[[str], str], check: Check) -> Any:
    """The value of the key as it is, looked through. place: where attention.layers[0].window stands, say.

    Raises:
        ConfigError: one sentence that names the place.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        empty = "an empty plan" if value == [] else "not a list"
        raise ConfigError(f"{place(key)}: {key}={value}: {empty}; {_HOW}, or null for layers that are all alike.")
    for number, entry in enumerate(value):
        name = f"{key}[{number}]"
        if isinstance(entry, str):
            check(name, entry, OF_A_LAYER["kind"], place(name))
            continue
        if not isinstance(entry, dict) or not entry:
            raise ConfigError(f"{place(name)}: {name}={entry}: not a layer; {_HOW}.")
        for option, given in entry.items():
            full = f"{name}.{option}"
            if option not in OF_A_LAYER:
                raise ConfigError(f"{place(full)}: {unknown_key(full, OF_A_LAYER, 'A layer has')}")
            check(full, given, OF_A_LAYER[option], place(full))
    return value


def named(entry: Entry) -> dict[str, Any]:
    """What a layer has of its own."""
    return {"kind": entry} if isinstance(entry, str) else entry


def layers_of(entries: Sequence[Entry] | None, section: AttentionOptions) -> tuple[AttentionOptions, ...]:
    """The plan: what a layer does not name is the section's."""
    return tuple(replace(section, **named(entry)) for entry in entries or ())
