"""What a preparation was asked for, and whether what lies on disk belongs to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from longseq_data.corpus.manifest import MANIFEST, Manifest, read_manifest
from longseq_data.errors import DataError
from longseq_data.files import user_path, write_text
from longseq_data.os_errors import lock
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading

from .config import ADDED, PrepareConfig
from .identity import Identity, checksum, identify

FORMAT = 2  # of the parts
PARTS = "parts"  # of NAME.partial: what is gone once the corpus is whole


@dataclass(frozen=True)
class Plan:
    output: str
    settings: dict[str, object]
    sources: list[Identity]  # by name
    inputs: list[Identity]  # lists that the settings name
    block_bytes: int
    format: int = FORMAT

    @classmethod
    def of(cls, config: PrepareConfig, read: Reading, leaves: Sequence[Leaf], block_bytes: int) -> Plan:
        """Raises DataError for a list that does not exist."""
        lists = {"ood_ids": config.ood_ids, "ood_pfam_map": config.ood_pfam_map, "clusters": config.cluster_table}
        files = {key: str(user_path(name).absolute()) for key, name in lists.items() if name}
        for key, name in files.items():
            if not Path(name).is_file():
                raise DataError(f"{name}: no such file; correct {key}.")
        inputs = list(files.values())
        sources = [identify(leaf.source) for leaf in leaves]
        return cls(config.output, config.content(read, leaves), sources, list(map(identify, inputs)), block_bytes)

    @classmethod
    def read(cls, path: Path) -> Plan:
        try:
            values = {"format": 1, **json.loads(path.read_text())}
            for name in ("sources", "inputs"):
                values[name] = [Identity(**identity) for identity in values[name]]
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); start over with --restart.") from None

    def difference(self, earlier: Plan) -> str | None:
        """What is not as in an earlier plan, as a part of a sentence."""
        return _settings_difference(earlier.settings, self.settings) or _files_difference(
            [*earlier.sources, *earlier.inputs], [*self.sources, *self.inputs]
        )


def earlier_settings(output: Path, overwrite: bool, restart: bool) -> dict[str, object] | None:
    """Those of the corpus or the unfinished preparation that has the name already and is to be kept."""
    partial = output.with_name(output.name + ".partial")
    if (output / MANIFEST).is_file():
        return None if overwrite else read_manifest(output).settings
    if restart:
        return None
    if (partial / MANIFEST).is_file():
        return read_manifest(partial, partial=True).settings
    path = partial / PARTS / "plan.json"
    return Plan.read(path).settings if path.is_file() else None


def _settings_difference(before: dict[str, object], now: dict[str, object]) -> str | None:
    before = ADDED | before
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            return f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
    return None


def _shown(value: object) -> str:
    return json.dumps(value)


def _files_difference(before: list[Identity], now: list[Identity]) -> str | None:
    earlier, later = ({file.name: file for file in files} for files in (before, now))
    for name in sorted({*earlier, *later}):
        if name not in later:
            return f"{name} is no longer among the sources"
        if name not in earlier:
            return f"{name} was not among the sources"
        if earlier[name] != later[name]:
            return f"{name} has changed"
    return None


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the name ``output`` for one preparation on this machine; raises DataError if another one holds it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f".{output.name}.lock"  # with_name refuses "/"
    with path.open("a+") as file:
        try:
            lock(file, path)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # the one who held it has just removed it, and a third may hold its successor
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{output} is being prepared already (process {file.read().strip() or 'unknown'}); wait for its end, "
                f"or choose another output."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def taken(output: Path, plan: Plan, overwrite: bool) -> Manifest | None:
    """The manifest of the corpus that ``plan`` describes, if it is there; None if the name is free to be used.

    Raises DataError where something else has the name.
    """
    if not output.exists():
        return None
    if not (output / MANIFEST).is_file():
        raise DataError(f"{output} exists, and is no prepared corpus; choose another output, or remove it.")
    if overwrite:
        return None
    manifest = read_manifest(output)
    difference = _settings_difference(manifest.settings, plan.settings) or _content_difference(manifest, plan)
    if difference is None:
        return manifest
    raise DataError(f"{output} exists, and {difference}; choose another output, or replace it with --overwrite.")


def _content_difference(manifest: Manifest, plan: Plan) -> str | None:
    """Like _files_difference, by what is in the files. Of a URL, name and size must do."""
    before = {source.name: source for source in [*manifest.sources, *manifest.inputs]}
    files = [*plan.sources, *plan.inputs]
    difference = _files_difference([Identity(name, None, None) for name in before], [_named(file) for file in files])
    if difference is not None:
        return difference
    for file in files:
        known = before[file.name]
        if file.size not in (None, known.size) or checksum(file.name) not in ("", known.sha256):
            return f"{file.name} has changed"
    return None


def _named(file: Identity) -> Identity:
    return Identity(file.name, None, None)


def begin(output: Path, plan: Plan, restart: bool) -> tuple[Path, Plan, Manifest | None]:
    """(the folder to work in, the plan that its work was begun with, the manifest if only the name is missing).

    Raises DataError where the folder belongs to another plan.
    """
    folder = output.with_name(output.name + ".partial")
    if restart and folder.exists():
        shutil.rmtree(folder)
    path = folder / PARTS / "plan.json"
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, partial=True)
        difference = _settings_difference(manifest.settings, plan.settings) or _content_difference(manifest, plan)
        _refuse(folder, difference)
        return folder, plan, manifest
    if path.is_file():
        earlier = Plan.read(path)
        _refuse(folder, plan.difference(earlier))
        if earlier.format == plan.format:
            return folder, earlier, None
        shutil.rmtree(folder)  # a version before has begun it
    if folder.exists():
        if {entry.name for entry in folder.iterdir()} - {PARTS}:
            raise DataError(f"{folder} exists, and was not made by a preparation; remove it, or choose another output.")
        shutil.rmtree(folder)
    path.parent.mkdir(parents=True)
    write_text(path, json.dumps(asdict(plan)))
    return folder, plan, None


def _refuse(folder: Path, difference: str | None) -> None:
    if difference is not None:
        raise DataError(
            f"{folder} was begun with other settings or sources: {difference}; go back to them, or start over with "
            f"--restart."
        )
