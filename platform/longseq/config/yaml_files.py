"""YAML files as mappings of values, each read by the type of its key, with the lines they stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longseq.config.written_values import WrittenError, pairs, typed
from longseq.errors import ConfigError
from longseq_data.os_errors import explained

# What the parsers raise for text that they cannot read; the last four by way of tags (!!int x) and nesting.
YAML_ERRORS = (*(yaml.YAMLError, OmegaConfBaseException), *(ValueError, TypeError, AttributeError, RecursionError))

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast; PyYAML may come without it

# From the names on the way to a value ("data", "train") to the type of the key, as written_values.typed takes it; ""
# for a mapping of further names.
Kinds = Callable[[tuple[str, ...]], str]


def read_yaml(path: Path, kinds: Kinds) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a file, and the line of each by its names between dots.

    Raises:
        ConfigError: one sentence that names the file, and the line where there is one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = _nodes(text)
        plain = OmegaConf.to_container(OmegaConf.create(text)) if node is not None else {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `longseq configs` lists those that come with longseq.") from None
    except OSError as error:
        raise ConfigError(f"{explained(error, path, 'cannot be read')}.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: cannot be read as a configuration: line {line} is not UTF-8; save it so.") from None
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {yaml_problem(error)}.") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is a {type(plain).__name__}.")
    return _values(path, node, plain, kinds, ()), dict(_lines(node))


def _nodes(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _LOADER)
    except yaml.YAMLError:
        return yaml.compose(text)  # Python's says where the mistake is, libyaml's where it cannot go on


def _values(path: Path, node: yaml.Node | None, plain: Any, kinds: Kinds, names: tuple[str, ...]) -> Any:
    kind = kinds(names)
    if not kind and isinstance(node, yaml.MappingNode) and isinstance(plain, dict):
        found = {name.value: (value, plain.get(name.value)) for name, value in pairs(node)}
        return {name: _values(path, *each, kinds, (*names, name)) for name, each in found.items()}
    try:
        return typed(node, kind, plain)
    except WrittenError as error:
        assert node is not None
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {'.'.join(names)}: {error}.") from None


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in pairs(node):
            full = f"{prefix}{name.value}"
            yield full, name.start_mark.line + 1
            yield from _lines(value, f"{full}.")
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            full = f"{prefix.removesuffix('.')}[{number}]"
            yield full, value.start_mark.line + 1
            yield from _lines(value, f"{full}.")


def yaml_problem(error: Exception) -> str:
    """What the parser says, on one line: context and problem are two halves of a sentence."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    halves = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(half for half in halves if half) or first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
