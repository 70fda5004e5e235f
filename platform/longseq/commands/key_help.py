"""Configuration keys as ``--help`` shows them: each with its type, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from longseq.config.merging import described_keys
from longseq.config.written_values import BENCHMARKS, LAYERS, SOURCES


def help_on_keys() -> str:
    """Every key of a run's configuration."""
    lines, section_before = ["configuration keys (type, default, meaning):"], ""
    for section, name, about in described_keys():
        if section != section_before:
            lines.append("")
            section_before = section
        lines += _entry(f"{section}.{name}", about["type"], about["default"], about)
    return "\n".join([*lines, "", "  deepspeed.*", "      passed through to DeepSpeed's own configuration"])


def help_on_flat_keys(schema: type) -> str:
    """Every key of a file without sections, whose fields ``longseq.config.flat`` reads."""
    lines, defaults = [], schema()
    for item in fields(schema):
        lines += _entry(item.name, str(item.type), getattr(defaults, item.name), item.metadata)
    return "\n".join(lines)


def _entry(name: str, kind: str, default: object, about: Mapping[str, Any]) -> list[str]:
    choices = f" [{' | '.join(about['choices'])}]" if about["choices"] else ""
    lists = {SOURCES: "list[str | {path, weight, name}]", LAYERS: "list[str | {kind, window, features, ...}]"}
    lists[BENCHMARKS] = "list[{kind, path, every, ...}]"
    kind = kind.removesuffix(" | None")
    kind = lists.get(kind, kind)
    head = f"  {name}: {kind} = {'null' if default is None else default}"
    indent = " " * 6
    wrapper = textwrap.TextWrapper(100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [head, *wrapper.wrap(f"{about['meaning']}{choices}")]
