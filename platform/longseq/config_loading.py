"""From YAML files and ``key=value`` arguments to a checked :class:`~longseq.config.Config`, and back.

Each value keeps the place it came from (file and line, or the command line), so that a refusal can name it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longseq.config import Config
from longseq.errors import USER_ERRORS, ConfigError
from longseq_data.files import write_text
from longseq_data.os_errors import explained

_FREE_FORM = ("deepspeed",)  # sections passed through unchecked


def load_config(path: Path | str, overrides: Sequence[str] = (), *, resolved: bool = False) -> Config:
    """Read a YAML file, the files it ``extends``, and ``section.key=value`` overrides, in rising priority.

    Below them all stands what a model named in ``model.init_from`` brings, unless the file is that of a run, in which
    everything has been ``resolved``.

    Raises:
        ConfigError: one sentence that names the file and line or the argument, the key, the nearest valid key and
            its meaning.
    """
    layers = [*_layers(Path(path), ()), *map(_override_layer, overrides)]
    origin = next((name for layer in reversed(layers) if (name := layer.init_from())), None)
    if origin and not resolved:
        from longseq.exported import inherited  # which opens runs, whose configurations are loaded here

        try:
            layers.insert(0, _Layer(inherited(origin), origin))
        except USER_ERRORS as error:
            raise ConfigError(f"model.init_from: {error}") from None
    config = _merged(layers, str(path))
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(f"{path}{' and its overrides' if overrides else ''}: {error}") from None
    return config


def config_of(sections: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """A configuration of values that lie elsewhere than in YAML files, and overrides; keys are not held against each
    other, since it may be no training's.

    Raises:
        ConfigError: as :func:`load_config` does.
    """
    return _merged([_Layer(sections, where), *map(_override_layer, overrides)], where)


def _merged(layers: Sequence[_Layer], path: str) -> Config:
    merged = OmegaConf.structured(Config)
    places: dict[str, str] = {}
    for layer in layers:
        merged = layer.onto(merged)
        places |= layer.places()
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        raise ConfigError(f"{places.get(name, path)}: {name}: {first_line(error)}.") from None
    assert isinstance(config, Config)
    for section, name, limits in described_keys():
        full = f"{section}.{name}"
        check_limits(full, getattr(getattr(config, section), name), limits, places.get(full, path))
    return config


def save_config(config: Config, path: Path) -> None:
    """Write every key with its value, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def described_keys() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(section, key, metadata) of every key; metadata holds the meaning, type, default and limits."""
    for section in fields(Config):
        if section.name in _FREE_FORM:
            continue
        defaults = getattr(Config(), section.name)
        for item in fields(defaults):
            extra = {"type": str(item.type), "default": getattr(defaults, item.name)}
            yield section.name, item.name, {**item.metadata, **extra}


class _Layer:
    """One source of values: its contents and where each of them stands."""

    def __init__(self, values: dict[str, Any], where: str, lines: Mapping[str, int] | None = None):
        self.values, self.where, self.lines = values, where, lines or {}
        self._refuse_unknown_keys()

    def onto(self, config: DictConfig) -> DictConfig:
        try:
            return OmegaConf.merge(config, self.values)  # type: ignore[return-value]
        except (OmegaConfBaseException, TypeError) as error:
            name = getattr(error, "full_key", None) or next(reversed(self.places()), "")
            name = name.partition("[")[0]  # optim.betas[1] is a part of optim.betas
            for section, key, about in described_keys():
                if name == f"{section}.{key}":
                    raise ConfigError(
                        f"{self._place(name)}: {name}={self.values[section].get(key)} is not "
                        f"{type_name(about['type'])}: {about['meaning']}."
                    ) from None
            raise ConfigError(f"{self._place(name)}: {name}: {first_line(error)}.") from None

    def init_from(self) -> str | None:
        """The model whose weights this layer asks for."""
        return (self.values.get("model") or {}).get("init_from")

    def places(self) -> dict[str, str]:
        """Where each section.key of this layer stands."""
        names = (f"{section}.{name}" for section, content in self.values.items() for name in content or {})
        return {name: self._place(name) for name in names}

    def _refuse_unknown_keys(self) -> None:
        sections = {section.name: section for section in fields(Config)}
        known = [f"{section}.{name}" for section, name, _ in described_keys()] + list(_FREE_FORM)
        for section, content in self.values.items():
            if section not in sections:
                raise self._unknown(str(section), known)
            if not isinstance(content, dict):
                raise ConfigError(f"{self._place(section)}: {section} is a section, it needs keys below it.")
            if section in _FREE_FORM:
                continue
            for name, value in content.items():
                full = f"{section}.{name}"
                if full not in known:
                    raise self._unknown(full, known)
                if isinstance(value, str) and _is_list_key(section, str(name)):
                    content[name] = [value]  # one path may stand without brackets

    def _unknown(self, name: str, known: Sequence[str]) -> ConfigError:
        last = name.rpartition(".")[2]
        if name == last and not any(k.endswith(f".{name}") for k in known):
            near = difflib.get_close_matches(name, [section.name for section in fields(Config)], n=1)
            if near:
                keys = ", ".join(k for s, k, _ in described_keys() if s == near[0])
                return ConfigError(f"{self._place(name)}: unknown section {name!r}. Did you mean {near[0]} ({keys})?")
        # Keys that end alike, then those whose meaning has the words; the section alone makes nothing alike.
        alike = {k: difflib.SequenceMatcher(None, k.rpartition(".")[2], last).ratio() for k in known}
        ranked = sorted(alike, key=lambda k: -alike[k])
        words = last.replace("_", " ")
        by_meaning = [f"{s}.{k}" for s, k, m in described_keys() if len(words) > 3 and words in m["meaning"]]
        near = ([k for k in ranked if alike[k] > 0.8] or by_meaning or [k for k in ranked if alike[k] > 0.6])[:1]
        meaning = next((m["meaning"] for s, k, m in described_keys() if near == [f"{s}.{k}"]), "")
        hint = f" Did you mean {near[0]} ({meaning})?" if near else " `longseq fit --help` lists the keys."
        return ConfigError(f"{self._place(name)}: unknown key {name!r}.{hint}")

    def _place(self, name: str) -> str:
        line = self.lines.get(name) or self.lines.get(name.partition("[")[0])
        return f"{self.where}:{line}" if line else self.where


def _layers(path: Path, below: tuple[Path, ...]) -> Iterator[_Layer]:
    """The files that ``path`` extends, base first, then ``path`` itself."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself by way of {' → '.join(map(str, below))}.")
    values, lines = read_yaml(path)
    bases = values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    where = f"{path}:{lines.get('extends', 1)}"
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{where}: extends={bases}: name a YAML file or a list of them, relative to this file.")
    for base in bases:
        if not (path.parent / base).is_file():
            raise ConfigError(f"{where}: extends {base}: no such file in {path.parent.resolve()}.")
        yield from _layers(path.parent / base, (*below, path.resolve()))
    yield _Layer(values, str(path), lines)


def read_yaml(path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    try:
        text = path.read_text()
        node = yaml.compose(text)
        values = OmegaConf.to_container(OmegaConf.create(text)) if node is not None else {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; configurations ship in configs/.") from None
    except OSError as error:
        raise ConfigError(f"{explained(error, path, 'cannot be read')}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}.") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {yaml_problem(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is a {type(values).__name__}.")
    return values, dict(_lines(node))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            full = f"{prefix}{name.value}"
            yield full, name.start_mark.line + 1
            yield from _lines(value, f"{full}.")


def _override_layer(argument: str) -> _Layer:
    name, equals, value = argument.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"argument {argument!r}: an override is section.key=value, e.g. trainer.devices=2.")
    if value.startswith("*"):  # a glob, where YAML would see an alias
        value = json.dumps(value)
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={value}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"argument {argument!r}: not valid YAML: {yaml_problem(error)}. Close what is opened, and quote inside a "
            "list what begins with * or holds ${: data.train='[\"*.fasta.gz\"]'."
        ) from None
    assert isinstance(values, dict)
    section, _, key = name.partition(".")
    if _type_of(section, key).startswith("str") and value != "null" and not value.startswith(("[", "{", "${")):
        values[section][key] = value.strip("'\"")  # as it stands: YAML would read the name 12:30 as a number
    return _Layer(values, f"argument {argument!r}")  # type: ignore[arg-type]


def check_limits(name: str, value: Any, limits: Mapping[str, Any], place: str) -> None:
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), limits["choices"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{place}: {name}={value}: choose from {', '.join(limits['choices'])}.{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: {name}={value} must be a finite number: {limits['meaning']}.")
    low, high = limits["at_least"], limits["below"]
    if (low is not None and not value >= low) or (high is not None and not value < high):
        bounds = " and ".join(
            f"{word} {limit:g}" for word, limit in (("at least", low), ("below", high)) if limit is not None
        )
        raise ConfigError(f"{place}: {name}={value} must be {bounds}: {limits['meaning']}.")


def _is_list_key(section: str, name: str) -> bool:
    return _type_of(section, name).startswith("list")


def _type_of(section: str, name: str) -> str:
    return next((m["type"] for s, k, m in described_keys() if (s, k) == (section, name)), "")


def type_name(annotation: str) -> str:
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    lists = {
        "list[str]": "a list of text",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
    }
    return (names | lists).get(annotation.removesuffix(" | None"), annotation)


def yaml_problem(error: Exception) -> str:
    """What the parser says, on one line: context and problem are two halves of a sentence."""
    halves = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(half for half in halves if half) or first_line(error)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
