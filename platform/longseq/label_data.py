"""From the ``finetune`` section of a configuration to labelled sequences. No torch here."""

from __future__ import annotations

import sys
from typing import cast

from longseq.config.schema import Config
from longseq.data import begins, split_spec, vocabulary
from longseq.errors import ConfigError
from longseq_data.errors import DataError
from longseq_data.readers.label_table import OF_CLASSES, LabelSpec, Task
from longseq_data.samples.label_samples import LabelledSamples
from longseq_data.samples.rank_share import Batches


def batches_of(config: Config, split: str) -> Batches:
    """What a training reads of a split: tokens, or with finetune.table labelled sequences."""
    return labelled(config, split) if config.finetune.table else split_spec(config, split)


def labelled(config: Config, split: str | None, source: str | None = None) -> LabelledSamples:
    """The rows of a split of finetune.table; or, of another table with its columns, all rows."""
    tune, tokens = config.finetune, vocabulary(config)
    spec = LabelSpec(
        source=source or str(tune.table),
        tokens=tokens.name,
        sequence=str(tune.sequence),
        label=str(tune.label),
        task=cast(Task, tune.task),
        split=None if source else tune.split,
        cluster=None if source else tune.cluster,
        valid_fraction=config.data.valid_fraction,
        test_fraction=config.data.test_fraction,
        classes=tuple(tune.classes),
    )
    return LabelledSamples(spec, split, tokens, begins(config, tokens), config.run.seed, tune.center, tune.scale)


def check_table(config: Config) -> None:
    """Read finetune.table before anything is made, and say what it holds.

    Raises:
        DataError: for one that cannot be learned from.
        ConfigError: where its sequences are longer than data.length.
    """
    found, tune = labelled(config, None).rows, config.finetune
    counts = {split: len(found.of(split)) for split in ("train", "valid", "test")}
    said = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"finetune.table: {len(found.rows):,} labelled rows of {len(found.table):,} ({said})", file=sys.stderr)
    for count, what in zip(found.left_out, (f"no label in {tune.label}", f"an empty {tune.split}"), strict=True):
        if count:
            print(f"longseq: note: {tune.table}: {count:,} rows with {what} are left out", file=sys.stderr)
    if len(found.rows) == 1:
        raise DataError(f"{tune.table}: one labelled row cannot be both learned from and held out; give more.")
    for split in ("train", *(["valid"] if config.trainer.valid_every else [])):
        if not counts[split]:
            how = (
                f"the column {tune.split} names none" if tune.split and split == "train" else "the hash puts none there"
            )
            raise DataError(
                f"{tune.table}: no row is for {split}: {how}; write a column that says train, valid or test and name "
                "it with --split-column, or change data.valid_fraction and data.test_fraction."
            )
    if not counts["test"]:
        print(f"longseq: note: {tune.table}: no row is for test; what is measured is valid", file=sys.stderr)
    train = found.of("train")
    if tune.task in OF_CLASSES:
        learned = {int(label) for row in train for label in found.labels[row] if label >= 0}
        if len(learned) < 2:
            only = f"one class, {found.classes[learned.pop()]!r}" if learned else "no class"
            raise DataError(f"{tune.table}: the training rows have {only}: there is nothing to tell apart.")
        unseen = [name for number, name in enumerate(found.classes) if number not in learned]
        if unseen:
            print(f"longseq: warning: {tune.table}: no training row has class {', '.join(unseen)}", file=sys.stderr)
    if found.longest + 2 > config.data.length:
        raise ConfigError(
            f"data.length={config.data.length}: the longest sequence of {tune.table} has {found.longest:,} tokens and "
            f"two marks, and sequences are read whole: take {found.longest + 2}, or shorten the table's."
        )
