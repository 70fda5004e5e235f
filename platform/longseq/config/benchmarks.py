"""The key ``trainer.benchmarks``: evaluations of the field at steps of a training, each a mapping. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from longseq.attention.options import option as key
from longseq.config.hints import unknown_key
from longseq.config.sources import name_of, refuse_repeated_names, refuse_unusable_name
from longseq.errors import ConfigError
from longseq_data.files import user_path

PROTEINGYM, VARIANTS, CONTACTS, STRUCTURE = "proteingym", "variants", "contacts", "structure"
KINDS = (PROTEINGYM, VARIANTS, CONTACTS, STRUCTURE)
ATTENTION, JACOBIAN = "attention", "jacobian"
METHODS = (ATTENTION, JACOBIAN)


@dataclass(frozen=True)
class Benchmark:
    """One entry of the list."""

    kind: str = key(
        "",
        "proteingym: a folder as ProteinGym distributes it; variants: a deep mutational scan, a CSV with mutant and "
        "DMS_score; contacts, structure: chains, a JSON object on each line",
        choices=KINDS,
    )
    path: str = key("", "the folder or file")
    every: int = key(1000, "steps between its points", at_least=1)
    name: str = key("", "of its curves, benchmark/NAME/...; default: the path's")
    records: int = key(
        0, "at most so many mutants of each scan, or chains, spread evenly over the file; 0: all", at_least=0
    )
    wild_type: str = key("", "of variants: a FASTA file of the wild type alone")
    assays: list[str] = key([], "of proteingym: DMS_id of those wanted; empty: all")
    method: str = key(ATTENTION, "of contacts: attention, or jacobian, 20 passes for each residue", choices=METHODS)
    train: int = key(20, "of contacts and structure: chains to learn from", at_least=1)


# What each kind has besides the first keys.
_OWN = {PROTEINGYM: ("assays",), VARIANTS: ("wild_type",), CONTACTS: ("method", "train"), STRUCTURE: ("train",)}
_ALL = ("kind", "path", "every", "name", "records")
OF_ONE: dict[str, Mapping[str, Any]] = {
    item.name: {**item.metadata, "type": str(item.type)} for item in fields(Benchmark)
}
_HOW = "write {kind: KIND, path: FILE, every: STEPS}, with kind " + ", ".join(KINDS[:-1]) + f" or {KINDS[-1]}"

# Refuses a value that is not one of its key: its name, itself, what is known of the key, and where it stands.
Check = Callable[[str, Any, Mapping[str, Any], str], None]


def listed(value: Any, key: str, place: Callable[[str], str], check: Check) -> Any:
    """The value of the key, looked through, each entry with a name. place: where trainer.benchmarks[0].path stands.

    Raises:
        ConfigError: one sentence that names the place.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{place(key)}: {key}={value}: not a list; {_HOW}.")
    entries = [_entry(entry, f"{key}[{number}]", place, check) for number, entry in enumerate(value)]
    refuse_repeated_names(entries, key, place, "benchmarks")
    return entries


def refuse_missing(entries: list[dict[str, Any]], key: str, place: Callable[[str], str]) -> None:
    """Refuse files and folders that are not there.

    Raises:
        ConfigError: naming the place.
    """
    for number, entry in enumerate(entries):
        for name in ("path", "wild_type"):
            path = user_path(entry.get(name, "."))
            full, folder = f"{key}[{number}].{name}", name == "path" and entry["kind"] == PROTEINGYM
            if not (path.is_dir() if folder else path.is_file() or (name not in entry)):
                what = "folder" if folder else "file"
                raise ConfigError(f"{place(full)}: {full}={entry[name]}: no such {what}; correct it.")


def _entry(entry: Any, key: str, place: Callable[[str], str], check: Check) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place(key)}: {key}={entry}: not a benchmark; {_HOW}.")
    for name, given in entry.items():
        full = f"{key}.{name}"
        if name not in OF_ONE:
            raise ConfigError(f"{place(full)}: {unknown_key(full, OF_ONE, 'A benchmark has')}")
        check(full, given, OF_ONE[name], place(full))
    for name in ("kind", "path"):
        if not entry.get(name):
            raise ConfigError(f"{place(key)}: {key} has no {name}; {_HOW}.")
    kind = entry["kind"]
    for name in entry:
        if name not in (*_ALL, *_OWN[kind]):
            of = " and ".join(each for each, own in _OWN.items() if name in own)
            raise ConfigError(f"{place(f'{key}.{name}')}: {key}.{name} is of {of}, and kind is {kind}; leave it out.")
    if kind == VARIANTS and not entry.get("wild_type"):
        raise ConfigError(f"{place(key)}: {key} has no wild_type: name a FASTA file with what the variants change.")
    name = entry.get("name") or name_of(entry["path"])
    refuse_unusable_name(name, f"{key}.name", place)
    return {**entry, "name": name}
