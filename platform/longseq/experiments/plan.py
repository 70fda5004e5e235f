"""An experiment as its YAML file says it: the runs, and the paper's numbers next to which their table is set.

    about: what is compared
    config: ../protein/experiment.yaml        what every run has in common; --config takes another
    set: [optim.lr=0.001]                     on top of it
    groups:   {UNI: [model.objective=causal], BID: [model.objective=masked]}
    variants:                                 in each group, a run for each variant and seed
      Transformer: [attention.kind=exact]
      Performer:   {set: [attention.kind=favor], from: Transformer, steps: 0.3}    begins with the weights of that
                                              run, and takes this share of the steps
    splits: [test, ood]
    curve: true                               ten validations a run, and a table of them
    paper:    {UNI: {Transformer: {test: [30.80, 9.37]}}}             accuracy in per cent, perplexity
    differs:  what is not as in the paper

or, for what `longseq bench` measures: ``bench: [step, --causal]`` and ``paper``, ``differs`` as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longseq.config.shipped import located
from longseq.config.yaml_files import read_yaml
from longseq.data import SPLITS
from longseq.errors import ConfigError

_KEYS = ("about", "config", "set", "groups", "variants", "splits", "curve", "paper", "differs", "bench")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    overrides: tuple[str, ...]
    origin: str | None = None  # the variant whose weights it begins with
    steps: float = 1.0  # share of the configuration's trainer.max_steps


@dataclass(frozen=True)
class Plan:
    """An experiment."""

    path: Path
    about: str
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    splits: tuple[str, ...] = ("test",)
    curve: bool = False
    paper: Any = None  # by group, variant and split: accuracy and perplexity; of a benchmark, text
    differs: str = ""
    bench: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem


def read_plan(path: Path) -> Plan:
    """Read an experiment's file.

    Raises:
        ConfigError: naming the file and the key.
    """
    path = located(path)
    content, lines = read_yaml(path, _kind)
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{path}:{lines.get(key, 1)}: unknown key {key!r}; an experiment has {', '.join(_KEYS)}.")
    if "bench" in content:
        words = content["bench"]
        if not isinstance(words, list) or not words:
            raise ConfigError(f"{path}: bench: a list of words, as [step, --causal], not {words!r}.")
        words = tuple(map(str, words))
        return Plan(path, content.get("about", ""), paper=content.get("paper"), differs=_text(content), bench=words)
    _check(path, content)
    variants = {name: _variant(path, name, value) for name, value in content["variants"].items()}
    for number, variant in enumerate(variants.values()):
        before = list(variants)[:number]
        if variant.origin and variant.origin not in before:
            raise ConfigError(f"{path}: {variant.name} is from {variant.origin}, which is no variant above it.")
    runs: dict[str, str] = {}
    for name in (f"{group}, {variant}" for group in content["groups"] for variant in variants):
        if runs.setdefault(slug(name), name) != name:
            raise ConfigError(f"{path}: {runs[slug(name)]} and {name} would be one run, {slug(name)}: rename one.")
    return Plan(
        path=path,
        about=content.get("about", ""),
        config=path.parent / content["config"],
        overrides=_overrides(path, "set", content.get("set", [])),
        groups={name: _overrides(path, name, value) for name, value in content["groups"].items()},
        variants=variants,
        splits=tuple(content.get("splits", ["test"])),
        curve=bool(content.get("curve", False)),
        paper=content.get("paper") or {},
        differs=_text(content),
    )


def _kind(names: tuple[str, ...]) -> str:
    """The type of what stands there, as written_values.typed takes it: texts stay as they are written."""
    if names[-1:] == ("steps",):
        return "float"
    texts = {"config": "str", "differs": "str", "about": "str", "set": "list[str]", "from": "str"}
    lists = {"splits": "list[str]", "bench": "list[str]"}
    if names[-1:] and (len(names) == 1 or names[0] == "variants"):
        return (texts | lists).get(names[-1], "" if len(names) < 3 else "anything")
    return "anything" if names[:1] == ("paper",) else ""


def slug(*names: str) -> str:
    """A run's name of what it is."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")


def _text(content: dict[Any, Any]) -> str:
    return " ".join(str(content.get("differs", "")).split())


def _check(path: Path, content: dict[Any, Any]) -> None:
    """Hold what would else fail after a training to be what it should."""
    for key, kind, what in (("config", str, "a file"), ("groups", dict, "a mapping"), ("variants", dict, "a mapping")):
        if not content.get(key):
            raise ConfigError(f"{path}: an experiment needs {key}; the files in configs/experiments are examples.")
        if not isinstance(content[key], kind):
            raise ConfigError(f"{path}: {key}: {what} is needed, not {content[key]!r}.")
    splits = content.get("splits", ["test"])
    if not isinstance(splits, list) or not splits or not set(map(str, splits)) <= set(SPLITS):
        raise ConfigError(f"{path}: splits: a list of some of {', '.join(SPLITS)}, not {splits!r}.")
    paper = content.get("paper") or {}
    if not isinstance(paper, str) and not _is_table(paper):
        raise ConfigError(f"{path}: paper: by group, variant and split [accuracy in per cent, perplexity], or a text.")


def _is_table(paper: Any) -> bool:
    """Whether it is {group: {variant: {split: [number, number]}}}."""
    try:
        cells = [cell for rows in paper.values() for row in rows.values() for cell in row.values()]
        return all(len(cell) == 2 and all(isinstance(number, int | float) for number in cell) for cell in cells)
    except (AttributeError, TypeError):
        return False


def _variant(path: Path, name: str, value: Any) -> Variant:
    if isinstance(value, dict):
        unknown = set(value) - {"set", "from", "steps"}
        if unknown:
            raise ConfigError(f"{path}: variants.{name}: unknown key {unknown.pop()!r}; it has set, from and steps.")
        steps = value.get("steps", 1.0)
        if not isinstance(steps, (int, float)) or not 0 < steps <= 1:
            raise ConfigError(f"{path}: variants.{name}.steps={steps}: a share of the steps, above 0 and at most 1.")
        return Variant(name, _overrides(path, name, value.get("set", [])), value.get("from"), float(steps))
    return Variant(name, _overrides(path, name, value))


def _overrides(path: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) and "=" in word for word in value):
        raise ConfigError(f"{path}: {name}: a list of section.key=value, not {value!r}.")
    return tuple(value)
