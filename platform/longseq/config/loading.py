"""The configuration of a new training: files, arguments, and what a model named in ``model.init_from`` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longseq.config.merging import checked, config_of, described_keys, merge_config, save_config
from longseq.config.schema import Config
from longseq.interop.exported import is_exported, read, sections_of
from longseq.trained_model import find
from longseq_data.files import user_path

__all__ = ["config_of", "described_keys", "inherited", "load_config", "read_config", "save_config"]


def load_config(path: Path | str, overrides: Sequence[str] = (), *, resolved: bool = False) -> Config:
    """Read a YAML file, the files it ``extends``, and ``section.key=value`` overrides, in rising priority.

    ``path`` may be the name of a configuration that comes with longseq (``protein/base``). Below all of them is what a
    model named in ``model.init_from`` brings, unless the file is that of a run, in which everything has been
    ``resolved``.

    Raises:
        ConfigError: one sentence that names the file and line or the argument, the key, the nearest valid key and
            its meaning.
    """
    return checked(path, overrides, merge_config(path, overrides, inherited=None if resolved else inherited))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """As :func:`load_config`, but for what holds keys against each other: it may be no whole training yet."""
    return merge_config(path, overrides, inherited=inherited)


def inherited(origin: str) -> dict[str, dict[str, Any]]:
    """The sections that a training takes over from the model that it begins with.

    Raises:
        LongseqError: if there is no such model.
    """
    folder = user_path(origin)
    # The weights of a run are looked at when they are wanted.
    config = read(folder).config() if is_exported(folder) else find(folder, sums=False).config
    sections = sections_of(config)
    tokenizer = {"tokenizer": config.data.tokenizer} if config.data.tokenizer != "auto" else {}
    return {"model": sections["model"], "attention": sections["attention"], "data": tokenizer}
