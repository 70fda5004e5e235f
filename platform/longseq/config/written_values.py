"""What YAML files and ``key=value`` arguments hold, read by the type of the key it is for.

YAML reads NO as false, 012 as ten, 1:30 as ninety and 2024-01-01 as a day. A key for text takes what is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from longseq.config.benchmarks import OF_ONE
from longseq.config.plan import OF_A_LAYER

# The types of lists that hold mappings: see config.sections and config.training.
SOURCES, LAYERS, BENCHMARKS = "Sources", "Layers", "Benchmarks"
MAPPINGS = (SOURCES, LAYERS, BENCHMARKS)
_MAPPING = re.compile(r"[\[\s]*\{\s*[\w.'\"-]+:\s")  # and not the name of a file: {a}
_NULL = ("null", "Null", "NULL", "~", "")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-9.]+)+")
_SWITCH = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(("false", "no", "off", "n", "0"), False)
_QUOTES = ("'", '"')

Known = Mapping[str, Mapping[str, Any]]  # keys of a mapping, each with its type


class WrittenError(ValueError):
    """A number or a switch that YAML reads otherwise than people do."""


def typed(node: yaml.Node | None, kind: str, plain: Any) -> Any:
    """The value of a node for a key of type ``kind`` ("str", "int | None", "list[str]", ...).

    ``plain`` is what YAML makes of it, and what it stays where the type says nothing, so that the configuration refuses
    it. One text is a list of one.

    Raises:
        WrittenError: for a number or a switch that YAML reads otherwise than people do.
    """
    kind = kind.removesuffix(" | None")
    if kind == SOURCES:
        return _sources(node, plain)
    if kind in (LAYERS, BENCHMARKS):
        return _mappings(node, plain, OF_A_LAYER if kind == LAYERS else OF_ONE)
    if kind.startswith("list["):
        inner = kind[len("list[") : -1]
        if isinstance(node, yaml.SequenceNode) and isinstance(plain, list):
            return [_element(child, inner, value) for child, value in zip(node.value, plain, strict=True)]
        if inner == "str" and isinstance(node, yaml.ScalarNode) and not _is_missing(node):
            return [node.value]
        return plain
    if kind == "dict[str, str]" and isinstance(node, yaml.MappingNode):
        return {name.value: typed(value, "str", None) for name, value in pairs(node)}
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "int", "float", "bool"):
        return plain
    return _scalar(node, kind, plain)


def _sources(node: yaml.Node | None, plain: Any) -> Any:
    """Names of files, or mappings with their paths and names as they are written."""
    if isinstance(node, yaml.MappingNode) and isinstance(plain, dict):
        found = {name.value: (value, plain.get(name.value)) for name, value in pairs(node)}
        if "path" in found:
            return [_with_path(found)]
        return {name: _source(value, of) for name, (value, of) in found.items()}
    if isinstance(node, yaml.SequenceNode) and isinstance(plain, list):
        return [_source(child, value) for child, value in zip(node.value, plain, strict=True)]
    return typed(node, "list[str]", plain)


def _mappings(node: yaml.Node | None, plain: Any, known: Known) -> Any:
    """Names, or mappings of what is ``known``; one may stand without brackets."""
    if isinstance(node, yaml.SequenceNode) and isinstance(plain, list):
        return [_mapping(child, value, known) for child, value in zip(node.value, plain, strict=True)]
    return plain if plain is None or node is None else [_mapping(node, plain, known)]


def _mapping(node: yaml.Node, plain: Any, known: Known) -> Any:
    if isinstance(node, yaml.MappingNode) and isinstance(plain, dict):
        kinds = {name: about["type"] for name, about in known.items()}
        return {
            name.value: typed(value, kinds.get(name.value, "str"), plain.get(name.value)) for name, value in pairs(node)
        }
    return _element(node, "str", plain)


def _source(node: yaml.Node, plain: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _with_path({name.value: (value, plain.get(name.value)) for name, value in pairs(node)})
    return typed(node, "list[str]", plain) if isinstance(node, yaml.SequenceNode) else _element(node, "str", plain)


def _with_path(found: dict[str, tuple[yaml.Node, Any]]) -> dict[str, Any]:
    kinds = {"path": "list[str]", "name": "str"}
    return {name: typed(node, kinds.get(name, "float"), plain) for name, (node, plain) in found.items()}


def _element(node: yaml.Node, kind: str, plain: Any) -> Any:
    named = kind == "str" and isinstance(node, yaml.ScalarNode) and not _is_missing(node)
    return node.value if named else typed(node, kind, plain)  # null, too, is the name of a file


def _scalar(node: yaml.ScalarNode, kind: str, plain: Any) -> Any:
    text: str = node.value
    if kind == "str":
        return text if plain is not None or not _is_null(node) else None
    if kind == "bool" and not _is_null(node) and "${" not in text:
        if text.lower() not in _SWITCH and text.lstrip("+-")[:1].isdigit():  # OmegaConf would call any number true
            raise WrittenError(f"{text} is not true or false")
        return _SWITCH.get(text.lower(), text)
    if not node.style and kind != "bool":
        if _OCTAL.fullmatch(text):
            raise WrittenError(f"{text} is octal to YAML: write it without the leading zero")
        if _SEXAGESIMAL.fullmatch(text):
            raise WrittenError(f"{text} is a number to the base of 60 to YAML: write one number, without ':'")
    return plain


def pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping, those that it merges (``<<``) first."""
    merged: list[tuple[yaml.Node, yaml.Node]] = []
    own: list[tuple[yaml.Node, yaml.Node]] = []
    for name, value in node.value:
        if name.tag == "tag:yaml.org,2002:merge":
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            merged = [pair for part in reversed(parts) for pair in pairs(part)] + merged
        else:
            own.append((name, value))
    return merged + own


def argument_value(text: str, kind: str) -> Any:
    """The value of a ``key=value`` argument for a key of type ``kind``; "" for a key that takes anything.

    Text stays as it is written, but for a pair of quotes around it; a list of text is ``[a, b]``, where a name with a
    comma or a bracket that is not closed stands in quotes.

    Raises:
        yaml.YAMLError, ValueError: for what cannot be read.
    """
    plain_kind = kind.removesuffix(" | None")
    if plain_kind == "str":
        # As null is written, or as a list or mapping, which is refused.
        return None if text == "null" else _quoted(text) if not _is_list(text) else _yaml(text, kind)
    if plain_kind == SOURCES and _MAPPING.match(text):
        return _yaml(text, kind)
    if plain_kind in ("list[str]", SOURCES):
        return _items(text) if _is_list(text) else [_quoted(text)]
    value = _yaml(text, kind)
    if kind and value is None and text.strip() not in _NULL[:-1]:
        raise WrittenError("a value is missing behind the '='")
    return value


def _yaml(text: str, kind: str) -> Any:
    node = yaml.compose(text, yaml.SafeLoader)
    plain = None if node is None else OmegaConf.to_container(OmegaConf.create(f"x: {text}"))["x"]  # type: ignore[index,call-overload]
    return typed(node, kind, plain)


def _is_list(text: str) -> bool:
    """Whether a value is a list in brackets, and not a glob that begins with one: [ab]*.fasta, [ab][cd]."""
    text = text.strip()
    if not text.startswith("["):
        return False
    depth = 0
    for place, letter in _unquoted(text):
        depth += (letter == "[") - (letter == "]")
        if depth == 0:
            return place == len(text) - 1
    return True  # a bracket that nothing closes: _items says so


def _items(text: str) -> list[str]:
    """The parts of ``[a, 'b, c', d[1]]``."""
    text = text.strip()
    if not text.endswith("]"):
        raise ValueError("a bracket is opened and not closed")
    inside = text[1:-1]
    cuts, depth = [-1], 0
    for place, letter in _unquoted(inside):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            cuts.append(place)
    if depth:
        raise ValueError("a bracket is opened and not closed")
    parts = [inside[begin + 1 : end].strip() for begin, end in zip(cuts, [*cuts[1:], len(inside)], strict=True)]
    if not parts[-1]:  # [] and [a,]
        parts.pop()
    return [_quoted(part) for part in parts]


def _unquoted(text: str) -> list[tuple[int, str]]:
    """The letters outside of quotes and their places; quotes stand at the beginning of a part only: it's is text.

    Raises:
        ValueError: for a quote that nothing closes.
    """
    found, quote, begins = [], "", True
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and not (quote == '"' and text[place - 1] == "\\") else quote
        elif begins and letter in _QUOTES:
            quote = letter
        else:
            found.append((place, letter))
        begins = not quote and (letter in "[," or (begins and letter == " "))
    if quote:
        raise ValueError("a quotation is opened and not closed")
    return found


def _quoted(text: str) -> str:
    """Text without a pair of quotes around it."""
    bare = text.strip()
    if len(bare) < 2 or bare[0] not in _QUOTES or bare[-1] != bare[0]:
        return text
    try:
        node = yaml.compose(bare, yaml.SafeLoader)
    except yaml.YAMLError:  # 'a' and 'b'
        return text
    return node.value if isinstance(node, yaml.ScalarNode) else text


def _is_null(node: yaml.ScalarNode) -> bool:
    return not node.style and node.value in _NULL


def _is_missing(node: yaml.ScalarNode) -> bool:
    """Nothing behind the colon: for a list this is no text, where null and ~ are names of files."""
    return not node.style and node.value == ""
