"""From the configuration's ``data`` section to streams of samples. No torch here."""

from __future__ import annotations

from longseq.config import Config
from longseq.errors import ConfigError
from longseq_data.sources import expand_sources
from longseq_data.streaming import StreamSpec

SPLITS = ("train", "valid", "test", "ood")


def resolve_sources(config: Config) -> None:
    """Replace every path, glob and URL of the ``data`` section by absolute paths and URLs that exist.

    Raises:
        DataError: for one that does not.
    """
    for split in SPLITS:
        setattr(config.data, split, expand_sources(getattr(config.data, split)))


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
    )
