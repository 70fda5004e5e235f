"""From YAML files and ``key=value`` arguments to a checked :class:`~longseq.config.schema.Config`, and back.

Each value keeps the place it came from (file and line, or the command line), so that a refusal can name it: pydantic
knows the key alone, and its import would take most of the 0.2 s that ``longseq --help`` has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longseq.config.benchmarks import listed, refuse_missing
from longseq.config.hints import near_key, nearest
from longseq.config.limits import check_limits, check_text
from longseq.config.plan import OF_A_LAYER, planned
from longseq.config.plan import named as named_of_layer
from longseq.config.schema import Config
from longseq.config.shipped import located
from longseq.config.sources import changed, named
from longseq.config.written_values import BENCHMARKS, LAYERS, MAPPINGS, SOURCES, WrittenError, argument_value
from longseq.config.yaml_files import YAML_ERRORS, first_line, read_yaml, yaml_problem
from longseq.errors import USER_ERRORS, ConfigError
from longseq_data.files import resolved, write_text

_FREE_FORM = ("deepspeed",)  # sections passed through unchecked


def merge_config(
    path: Path | str, overrides: Sequence[str] = (), *, inherited: Callable[[str], dict[str, Any]] | None
) -> Config:
    """A YAML file, the files it ``extends``, and ``section.key=value`` overrides, in rising priority.

    ``path`` may be the name of a configuration that comes with longseq (``protein/base``). Keys are not held against
    each other: :meth:`Config.check` does.

    Args:
        inherited: the sections that a model named in ``model.init_from`` brings, below all others; None: of a run's
            file, in which everything has been resolved.

    Raises:
        ConfigError: one sentence that names the file and line or the argument, the key, the nearest valid key and
            its meaning.
    """
    files = list(_layers(located(path), ()))
    if inherited is None:
        _as_of_before(files)
    layers = [*files, *map(_override_layer, overrides)]
    given = layers[len(files) if inherited is None else 0 :]  # a run is read where its files are not, too
    for layer in [layer for layer in given if "trainer.benchmarks" in layer.places()][-1:]:
        layer.refuse_missing()
    origin = next((name for layer in reversed(layers) if (name := layer.init_from())), None)
    if origin and inherited:
        try:
            layers.insert(0, _Layer(inherited(origin), origin))
        except USER_ERRORS as error:
            raise ConfigError(f"model.init_from: {error}") from None
    return _merged(layers, str(path))


def checked(path: Path | str, overrides: Sequence[str], config: Config) -> Config:
    """``config``, whose keys fit together. Raises ConfigError naming the file."""
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(f"{path}{' and its overrides' if overrides else ''}: {error}") from None
    return config


def run_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run's folder holds. Raises ConfigError, as :func:`merge_config` does."""
    return checked(path, overrides, merge_config(path, overrides, inherited=None))


def _as_of_before(files: Sequence[_Layer]) -> None:
    """Runs of versions before: a time limit without a unit meant seconds, and ids decided the splits."""
    for layer in files:
        if "data" in layer.values:
            layer.values["data"] = {"split_by": "id", **(layer.values["data"] or {})}
        trainer = layer.values.get("trainer") or {}
        if re.fullmatch(r"\d+(\.\d+)?", limit := str(trainer.get("time_limit"))):
            trainer["time_limit"] = f"{limit}s"


def config_of(sections: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """A configuration of values that lie elsewhere than in YAML files, and overrides; keys are not held against each
    other, since it may be no training's.

    Raises:
        ConfigError: as :func:`merge_config` does.
    """
    return _merged([_Layer(sections, where), *map(_override_layer, overrides)], where)


def _merged(layers: Sequence[_Layer], path: str) -> Config:
    merged = OmegaConf.structured(Config)
    OmegaConf.set_readonly(merged.attention, False)  # OmegaConf 2.3 takes a frozen dataclass for a constant
    places = {name: place for layer in layers for name, place in layer.places().items()}
    # All at once, but for those that read what is below them: a merge copies everything.
    for reads, group in groupby(layers, key=lambda layer: isinstance(layer, _SourceLayer)):
        these = list(group)
        try:
            merged = merged if reads else OmegaConf.merge(merged, *(layer.values for layer in these))
        except (OmegaConfBaseException, TypeError):
            reads = True
        for layer in these if reads else ():  # and where one does not fit: which it is
            merged = layer.onto(merged)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        raise ConfigError(f"{places.get(name, path)}: {name}: {first_line(error)}.") from None
    assert isinstance(config, Config)
    _refuse_unread(layers, config.attention.layers or [])
    for section, name, limits in described_keys():
        full, value = f"{section}.{name}", getattr(getattr(config, section), name)
        check_limits(full, value, limits, places.get(full, path))
        if full in places:
            check_text(full, value, limits["meaning"], places[full])
    return config


def _refuse_unread(layers: Sequence[_Layer], plan: Sequence[Any]) -> None:
    """A key of the section given on top of a plan whose layers all have one of their own would change nothing."""
    last = max((n for n, layer in enumerate(layers) if "attention.layers" in layer.places()), default=0)
    places = {name: place for layer in layers[last + 1 :] for name, place in layer.places().items()} if plan else {}
    for name in OF_A_LAYER:
        full = f"attention.{name}"
        if full in places and all(name in named_of_layer(entry) for entry in plan):
            raise ConfigError(
                f"{places[full]}: {full} would change nothing: each of attention.layers "
                f"({layers[last].places()['attention.layers']}) has a {name} of its own; change it there, or set "
                "attention.layers=null too."
            )


def save_config(config: Config, path: Path) -> None:
    """Write every key with its value, atomically. A file that is there gets no key that it lacks and that says nothing
    new: a run of jobs may go on with the code of its submission, which refuses keys that came later."""
    values = _plain(config)
    if path.is_file():
        there: Any = OmegaConf.load(path)
        before = _plain(merge_config(path, inherited=None))
        for section, keys in values.items():
            lacking = [name for name in keys if name not in (there.get(section) or {})]
            for name in lacking:
                if keys[name] == before[section].get(name):
                    del keys[name]
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(values)))


def _plain(config: Config) -> dict[str, dict[str, Any]]:
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


@cache
def described_keys() -> tuple[tuple[str, str, Mapping[str, Any]], ...]:
    """(section, key, metadata) of every key; metadata holds the meaning, type, default and limits."""
    found = []
    for section in fields(Config):
        if section.name not in _FREE_FORM:
            defaults = getattr(Config(), section.name)
            for item in fields(defaults):
                extra = {"type": str(item.type), "default": getattr(defaults, item.name)}
                found.append((section.name, item.name, {**item.metadata, **extra}))
    return tuple(found)


def meanings() -> dict[str, str]:
    """The meaning of every section.key."""
    return {f"{section}.{name}": about["meaning"] for section, name, about in described_keys()}


class _Layer:
    """One source of values: its contents and where each of them stands."""

    def __init__(self, values: dict[str, Any], where: str, lines: Mapping[str, int] | None = None):
        self.values, self.where, self.lines = values, where, lines or {}
        self._refuse_unknown_keys()
        for section, name, about in described_keys():
            kind = about["type"].removesuffix(" | None")
            if kind in MAPPINGS and name in (self.values.get(section) or {}):
                full, value = f"{section}.{name}", self.values[section][name]
                if kind == SOURCES:
                    value = named(value, full, self._place)
                else:
                    look = planned if kind == LAYERS else listed
                    value = look(value, full, self._place, _check_value)
                self.values[section][name] = value

    def refuse_missing(self) -> None:
        """Refuse benchmarks whose files are not there."""
        refuse_missing((self.values.get("trainer") or {}).get("benchmarks", []), "trainer.benchmarks", self._place)

    def onto(self, config: DictConfig) -> DictConfig:
        try:
            return OmegaConf.merge(config, self.values)  # type: ignore[return-value]
        except (OmegaConfBaseException, TypeError) as error:
            name = getattr(error, "full_key", None) or next(reversed(self.places()), "")
            name = name.partition("[")[0]  # optim.betas[1] is a part of optim.betas
            for section, key, about in described_keys():
                if name == f"{section}.{key}":
                    raise ConfigError(
                        f"{self._place(name)}: {name}={shown(self.values[section].get(key))} is not "
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
        known = meanings()
        for section, content in self.values.items():
            if section not in sections:
                raise self._unknown(str(section), known)
            if not isinstance(content, dict):
                raise ConfigError(f"{self._place(section)}: {section} is a section, it needs keys below it.")
            if section in _FREE_FORM:
                continue
            for name in content:
                if f"{section}.{name}" not in known:
                    raise self._unknown(f"{section}.{name}", known)

    def _unknown(self, name: str, known: Mapping[str, str]) -> ConfigError:
        place = self._place(name)
        if "." not in name and not any(key.endswith(f".{name}") for key in known):
            near = nearest(name, [section.name for section in fields(Config)])
            if near:
                keys = ", ".join(key for section, key, _ in described_keys() if section == near[0])
                return ConfigError(f"{place}: unknown section {name!r}. Did you mean {near[0]} ({keys})?")
        key = near_key(name, known)
        hint = f" Did you mean {key} ({known[key]})?" if key else " `longseq fit --help` lists the keys."
        return ConfigError(f"{place}: unknown key {name!r}.{hint}")

    def _place(self, name: str) -> str:
        while name and name not in self.lines:  # the nearest one around it
            name = re.sub(r"(\[\d+\]|\.?[^.\[]*)$", "", name)
        line = self.lines.get(name)
        return f"{self.where}:{line}" if line else self.where


class _SourceLayer(_Layer):
    """An argument about one of several sources: data.train.0.weight=5, or data.train.NAME.weight=5."""

    def __init__(self, section: str, key: str, which: str, name: str, text: str, where: str) -> None:
        super().__init__({}, where)
        self._section, self._key, self._which, self._name = section, key, which, name
        self._new = argument_value(text, {"path": "list[str]", "name": "str"}.get(name, "float"))

    def onto(self, config: DictConfig) -> DictConfig:
        before = OmegaConf.to_container(config[self._section][self._key])
        full = f"{self._section}.{self._key}"
        sources = changed(before, full, self._which, self._name, self._new, lambda _: self.where)
        return OmegaConf.merge(config, {self._section: {self._key: sources}})  # type: ignore[return-value]

    def places(self) -> dict[str, str]:
        return {f"{self._section}.{self._key}": self.where}


def _layers(path: Path, below: tuple[Path, ...]) -> Iterator[_Layer]:
    """The files that ``path`` extends, base first, then ``path`` itself."""
    if resolved(path) in below:
        raise ConfigError(f"{path}: extends itself by way of {' → '.join(map(str, below))}.")
    values, lines = read_yaml(path, _kind)
    _refuse_flat_keys(path, values, lines)
    bases = values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    where = f"{path}:{lines.get('extends', 1)}"
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{where}: extends={bases}: name a YAML file or a list of them, relative to this file.")
    for base in bases:
        if not (path.parent / base).is_file():
            raise ConfigError(f"{where}: extends {base}: no such file in {resolved(path.parent)}.")
        yield from _layers(path.parent / base, (*below, resolved(path)))
    yield _Layer(values, str(path), lines)


def _kind(names: tuple[str, ...]) -> str:
    """The type of the key on the way of ``names``; sections have none."""
    if names[:1] in [(name,) for name in ("extends", *_FREE_FORM)]:
        return "anything"
    return type_of(*names) if len(names) == 2 else ""


def _refuse_flat_keys(path: Path, values: Mapping[str, Any], lines: Mapping[str, int]) -> None:
    """optim.lr is how an argument says it; in a file lr stands below optim."""
    found = {name: name for name in values}
    for section, content in values.items():
        found |= {f"{section}.{name}": name for name in content} if isinstance(content, dict) else {}
    sections = [section.name for section in fields(Config)]
    for full, name in found.items():
        first, dot, rest = name.partition(".")
        if dot and first in sections:
            raise ConfigError(
                f"{path}:{lines.get(full, 1)}: {name!r} is how an argument names a key; in a file write {first}: with "
                f"{rest.replace('.', ': with ')}: below it."
            )


def _override_layer(argument: str) -> _Layer:
    name, equals, text = argument.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"argument {argument!r}: an override is section.key=value, e.g. trainer.devices=2.")
    section, _, key = name.partition(".")
    try:
        first, *rest = key.split(".")
        if len(rest) >= 2 and type_of(section, first) == SOURCES:  # a source's name may hold dots
            return _SourceLayer(section, first, ".".join(rest[:-1]), rest[-1], text, f"argument {argument!r}")
        value = argument_value(text, type_of(section, key))
    except YAML_ERRORS as error:
        raise ConfigError(f"argument {argument!r}: {bad_value(error)}") from None
    values: Any = value
    for part in reversed(name.split(".")):
        values = {part: values}
    return _Layer(values, f"argument {argument!r}")


def bad_value(error: Exception) -> str:
    """What is wrong with the value of an argument, and what to do."""
    if isinstance(error, WrittenError):
        return f"{error}."
    return f"not valid YAML: {yaml_problem(error)}. Close what is opened, and put a name with a comma in quotes."


def _check_value(name: str, value: Any, about: Mapping[str, Any], place: str) -> None:
    """Refuse a value of another type than its key's, or beyond its limits."""
    kind, _, inner = about["type"].removesuffix(" | None").rstrip("]").partition("[")
    parts = [type(part).__name__ for part in value] if inner and isinstance(value, list) else []
    if type(value).__name__ != kind or any(part != inner for part in parts):
        raise ConfigError(f"{place}: {name}={shown(value)} is not {type_name(about['type'])}: {about['meaning']}.")
    check_limits(name, value, about, place)


def type_of(section: str, name: str) -> str:
    """The annotation of a key; "" for one that does not exist."""
    return next((m["type"] for s, k, m in described_keys() if (s, k) == (section, name)), "")


def type_name(annotation: str) -> str:
    """What a person calls values of an annotation."""
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    lists = {
        "list[str]": "a list of text",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
        "dict[str, str]": "names with a text each",
        SOURCES: "a list of text, or of {path, weight, name}",
        LAYERS: "a list of kinds, or of {kind, window, features, ...}",
        BENCHMARKS: "a list of {kind, path, every, ...}",
    }
    return (names | lists).get(annotation.removesuffix(" | None"), annotation)


def shown(value: Any) -> str:
    """A value as a configuration writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
