"""What is to be scored, as it is asked for. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from longseq.config.schema import Config
from longseq.data import SPLITS, resolve_sources, split_spec
from longseq.errors import LongseqError
from longseq.trained_model import Source
from longseq_data.readers.sources import expand_sources
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.rank_share import MakeBatch, Samples, Share


@dataclass(frozen=True)
class Settings:
    """What is scored, and how.

    Attributes:
        splits: of train, valid, test, ood; None: test, and ood where there is one, or none where ``files`` are given.
        files: FASTA or text files to score.
        overrides: ``section.key=value`` on top of each run's configuration.
        all_checkpoints: every whole checkpoint of each run instead of the newest.
        ema: the running mean of the weights (trainer.ema_decay).
        sequences: at most so many of each split; None: all.
        top_k: of top-k accuracy.
        bootstrap: resamplings of the 95 % intervals; 0: no intervals.
        seed: of the bootstrap.
        devices: processes that share the work; results are the same to the last bit.
        keep: whether results go into the run's folder (JSON and TensorBoard).
    """

    splits: tuple[str, ...] | None = None
    files: tuple[str | Path, ...] = ()
    overrides: tuple[str, ...] = ()
    all_checkpoints: bool = False
    ema: bool = False
    sequences: int | None = None
    top_k: int = 5
    bootstrap: int = 1000
    seed: int = 0
    devices: int = 1
    keep: bool = True

    def __post_init__(self) -> None:
        """Raise LongseqError for a number out of bounds."""
        for name, least in (("sequences", 1), ("top_k", 1), ("bootstrap", 0), ("devices", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LongseqError(f"{name}={value}: take {least} or more.")


INFILL = "#infill"  # behind a split or a file: what is filled in of its documents is scored


def parts_of(source: Source, part: str) -> tuple[str, ...]:
    """All that is scored of a split or a file: of a model that fills in, that too."""
    return (part, f"{part}{INFILL}") if source.config.model.objective == "fim" else (part,)


def is_split(part: str) -> bool:
    """Whether it is a split or a source of one; files have whole paths, or addresses."""
    return part.removesuffix(INFILL).partition("/")[0] in SPLITS and ":" not in part


def samples_of(source: Source, part: str) -> Samples:
    """The samples of a split by its name, or of one of its sources (valid/NAME), or else of a file; cut as the model
    was trained.

    Raises:
        ConfigError, DataError: for a split that there is not, and a file that cannot be read as the model's tokens.
    """
    if part.endswith(INFILL) and source.config.model.objective == "fim":
        return samples_of(source, part.removesuffix(INFILL)).infilling()
    config = deepcopy(source.config)
    if is_split(part):
        resolve_sources(config)
        split, _, name = part.partition("/")
        samples = split_spec(config, split)
        return samples.parts[samples.names.index(name)] if name and isinstance(samples, MixtureSpec) else samples
    # The file alone: where the training data are now, and whether they still are, does not matter.
    config.data.train, config.data.valid, config.data.test = [], [], []
    config.finetune.table = None
    config.data.tokenizer = source.vocabulary.name
    config.data.cache = "none"  # it is read once
    config.data.ood = list(expand_sources([part], config.data.format))
    return split_spec(config, "ood")


def batch_sequences(config: Config) -> int:
    """Sequences at a time: results are the same to the last bit only for the same number of them."""
    return max(1, 4096 // config.data.length)


def plans(samples: Samples, batch_sequences: int, max_samples: int | None) -> Iterator[MakeBatch]:
    """The batches of one pass: each, and every bit of its results, is the same whoever counts it."""
    return samples.measuring().evaluation(Share(batch_sequences, 1, 0, 1), max_samples)
