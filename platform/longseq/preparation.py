"""Corpora out of raw files: what ``longseq data prepare`` does, as a function that returns data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.config.flat import load_flat
from longseq.errors import ConfigError
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.prepare.config import PrepareConfig

if TYPE_CHECKING:
    from longseq_data.corpus.manifest import Manifest
    from longseq_data.prepare.prepare import Progress
    from longseq_data.prepare.workers import Nodes


@dataclass(frozen=True)
class Prepared:
    """A corpus. new: whether it was made now, or was there already, of the same settings and files."""

    folder: Path
    manifest: Manifest  # settings, sources, counts of each split, checksums
    new: bool


def prepare(
    config: str | Path, overrides: Sequence[str] = (), *, overwrite: bool = False, restart: bool = False
) -> Prepared:
    """Filter, drop duplicates, split, shuffle, and write a corpus; interrupted, the same call goes on.

    Args:
        config: a YAML file with the keys of ``longseq data prepare``, or a configuration's name: ``prepare/uniref50``.
        overrides: ``key=value`` on top of it.
        overwrite: replace a corpus of other settings that is there.
        restart: forget what an interrupted preparation has done.

    Raises:
        LongseqError, DataError: in one sentence, for settings or files that cannot be used; what was done is kept.
    """
    return preparing(read(config, overrides), overwrite=overwrite, restart=restart)


def read(config: str | Path, overrides: Sequence[str]) -> PrepareConfig:
    """The settings, checked. Raises ConfigError that names the file or override."""
    settings = load_flat(PrepareConfig, Path(config), overrides, "longseq data prepare --help")
    try:
        settings.check()
    except DataError as error:
        raise ConfigError(f"{config}{' and its overrides' if overrides else ''}: {error}") from None
    return settings


def preparing(
    settings: PrepareConfig,
    *,
    overwrite: bool,
    restart: bool,
    progress: Progress | None = None,
    nodes: Nodes | None = None,
) -> Prepared:
    """:func:`prepare` of settings that were read, alone or with other nodes."""
    from longseq_data.prepare.prepare import prepare as make

    manifest, new = make(settings, overwrite=overwrite, restart=restart, progress=progress, nodes=nodes)
    return Prepared(user_path(settings.output).absolute(), manifest, new)
