"""From a YAML file and ``key=value`` arguments to a dataclass without sections, whose fields say what they mean.

The rules are those of a run's configuration (see config.merging): typed values, unknown keys refused, each refusal with
its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longseq.config.hints import near_key
from longseq.config.limits import check_limits, check_text
from longseq.config.merging import bad_value, shown, type_name
from longseq.config.shipped import located
from longseq.config.written_values import argument_value
from longseq.config.yaml_files import YAML_ERRORS, first_line, read_yaml
from longseq.errors import ConfigError

Schema = TypeVar("Schema")


def load_flat(schema: type[Schema], path: Path, overrides: Sequence[str], help_command: str) -> Schema:
    """Read a YAML file, then ``key=value`` overrides, into ``schema``: a dataclass made of fields with the metadata of
    ``longseq.config.sections.key``. ``help_command`` is named where a key is unknown and none is near.

    Raises:
        ConfigError: one sentence that names the file and line or the argument, the key, and what it means.
    """
    known = {item.name: {**item.metadata, "type": str(item.type)} for item in fields(schema)}  # type: ignore[arg-type]
    merged = OmegaConf.structured(schema)
    places: dict[str, str] = {}
    for values, where in _layers(path, overrides, known):
        for name, value in values.items():
            places[name] = where(name)
            if name not in known:
                raise ConfigError(f"{places[name]}: unknown key {name!r}.{_hint(name, known, help_command)}")
            about = known[name]
            if about["type"].startswith("list") and value is not None and not isinstance(value, list):
                value = [value]  # one value may stand without brackets
            try:
                merged = OmegaConf.merge(merged, {name: value})
            except (OmegaConfBaseException, TypeError):
                raise ConfigError(
                    f"{places[name]}: {name}={shown(value)} is not {type_name(about['type'])}: {about['meaning']}."
                ) from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        raise ConfigError(f"{places.get(name, path)}: {name}: {first_line(error)}.") from None
    for name, about in known.items():
        check_limits(name, getattr(config, name), about, places.get(name, str(path)))
        if name in places:
            check_text(name, getattr(config, name), about["meaning"], places[name])
    return config  # type: ignore[return-value]


def _layers(path: Path, overrides: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """(values, the place of a key) of the file and of each argument."""
    path = located(path)
    values, lines = read_yaml(path, lambda names: known.get(names[0], {}).get("type", "anything") if names else "")
    yield values, lambda name: f"{path}:{lines[name]}" if name in lines else str(path)
    for argument in overrides:
        yield _override(argument, known), lambda _, argument=argument: f"argument {argument!r}"


def _override(argument: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name, equals, text = argument.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"argument {argument!r}: an override is key=value.")
    try:
        return {name: argument_value(text, known.get(name, {}).get("type", ""))}
    except YAML_ERRORS as error:
        raise ConfigError(f"argument {argument!r}: {bad_value(error)}") from None


def _hint(name: str, known: Mapping[str, Mapping[str, Any]], help_command: str) -> str:
    near = near_key(name, {key: about["meaning"] for key, about in known.items()})
    return f" Did you mean {near} ({known[near]['meaning']})?" if near else f" `{help_command}` lists the keys."
