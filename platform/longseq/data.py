"""From the configuration's ``data`` section to streams of samples. No torch here."""

from __future__ import annotations

from pathlib import Path

from longseq.config import Config
from longseq.errors import ConfigError
from longseq_data.reading import TABLES, TOKENS, Reading, agree
from longseq_data.sources import expand_sources
from longseq_data.streaming import StreamSpec
from longseq_data.vocabulary import Vocabulary

SPLITS = ("train", "valid", "test", "ood")


def resolve_sources(config: Config) -> None:
    """Replace every path, glob and URL of the ``data`` section by absolute paths and URLs that exist.

    Raises:
        DataError: for one that does not, and for files that do not go together.
        ConfigError: for keys that do not fit the files.
    """
    data = config.data
    for split in SPLITS:
        setattr(data, split, expand_sources(getattr(data, split), data.format))
    if data.tokenizer not in ("auto", *TOKENS):
        data.tokenizer = str(Path(data.tokenizer).expanduser().absolute())
    read = reading(config)
    if read.tokens == "pixels":
        config.check_pixels()
    if data.column is not None and not any(leaf.format in TABLES for leaf in read.leaves(_all_sources(config))):
        raise ConfigError(
            f"data.column={data.column}: none of the files is a table ({', '.join(TABLES)}); leave it out."
        )


def reading(config: Config) -> Reading:
    """How the files become documents, once their names are resolved.

    Raises:
        DataError: for files that do not go together.
    """
    data = config.data
    return Reading(
        format=data.format,
        tokens=agree(_all_sources(config), data.format, data.tokenizer),
        column=data.column,
        image_size=data.image_size,
        part_bytes=data.part_bytes,
    )


def vocabulary(config: Config) -> Vocabulary:
    """The tokens that the model reads and predicts.

    Raises:
        DataError: for a tokenizer's file that cannot be read.
    """
    return reading(config).vocabulary


def stream_spec(config: Config, split: str) -> StreamSpec:
    """The stream of one split: files named for it, or a share of the training files held out by the record's id.

    Raises:
        ConfigError: if the configuration names no such data.
    """
    data = config.data
    own = getattr(data, split) if split != "train" else []
    share = {"valid": data.valid_fraction, "test": data.test_fraction}
    if not own and (split == "ood" or share.get(split) == 0):
        keys = f"data.{split}" if split == "ood" else f"data.{split} or data.{split}_fraction"
        raise ConfigError(f"there is no {split} split: set {keys}.")
    return StreamSpec(
        sources=tuple(own or data.train),
        split=None if own else split,
        # A share is held out only where no files were named for that split.
        valid_fraction=0.0 if data.valid else data.valid_fraction,
        test_fraction=0.0 if data.test else data.test_fraction,
        length=data.length,
        packing=data.packing,
        objective=config.model.objective,
        seed=config.run.seed,
        shuffle_buffer=data.shuffle_buffer,
        strict=data.strict,
        reading=reading(config),
        reset=data.reset,
        crop=data.crop,
    )


def _all_sources(config: Config) -> list[str]:
    return [source for split in SPLITS for source in getattr(config.data, split)]
