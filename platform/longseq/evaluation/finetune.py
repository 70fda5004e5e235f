"""Labels that a trained model learns: what ``longseq finetune`` does, as a function."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longseq.config.limits import check_text
from longseq.config.loading import inherited
from longseq.config.merging import config_of
from longseq.config.schema import Config
from longseq.data import resolve_sources
from longseq.errors import LongseqError
from longseq.evaluation.evaluate import Evaluation, evaluate
from longseq.evaluation.label_measures import MEASURES
from longseq.evaluation.request import Settings
from longseq.label_data import labelled
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.launch.start import Training, begin
from longseq.runs.run import Run, dated
from longseq.trained_model import Source, find
from longseq_data.errors import DataError
from longseq_data.readers.label_table import OF_CLASSES, Task, read_table, task_of

BATCH = 32
_RATES = {"head": 3e-3, "lora": 1e-3, "all": 3e-4}
_MOST_TOKENS = 1 << 16  # of a micro-batch, unless one sequence has more
_EPOCHS = 40


@dataclass(frozen=True)
class Finetuning:
    """What :func:`finetune` returns: a training for each seed, and an evaluation of each that came to its end."""

    trainings: list[Training]
    evaluations: list[Evaluation]

    @property
    def code(self) -> int:
        """0, or the exit code of the training that was stopped."""
        return self.trainings[-1].code

    def spread(self, split: str) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation (n − 1; NaN of one) of each measure over the seeds."""
        rows = [each.splits[split] for each in self.evaluations if split in each.splits]
        found = {}
        for name in MEASURES:
            values = np.array([row[name] for row in rows if row.get(name) is not None])
            if len(values):
                found[name] = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return found


def finetune(
    target: str | Path | Source,
    table: str | Path,
    overrides: Sequence[str] = (),
    *,
    sequence: str | None = None,
    label: str | None = None,
    task: Literal["auto"] | Task = "auto",
    learn: Literal["head", "lora", "all"] = "head",
    split_column: str | None = None,
    cluster_column: str | None = None,
    batch: int = BATCH,
    seeds: int = 1,
    bootstrap: int = 1000,
) -> Finetuning:
    """Teach a trained model the labels of a table, and measure how well it predicts those held out.

    Every run is a run like any other (resume, evaluate), which ``predict`` takes, too.

    Args:
        target: a run, checkpoint or exported folder, or what ``longseq.find`` returned.
        table: CSV or TSV with a header; a sequence and its label in each row.
        overrides: ``section.key=value``: ``run.name=mine``, ``trainer.devices=2``, ``finetune.patience=10``.
        sequence, label: the columns; default: by their names, or an error that lists them.
        task: what labels are; "auto": by the labels.
        learn: "head" (the body is frozen), "lora" (PEFT's factors of the blocks' linear maps, and the head) or "all".
        split_column: says train, valid or test; rows where it is empty are left out. None: a hash of the sequence.
        cluster_column: hashed in place of the sequence, so that clusters stay whole.
        batch: sequences of a step.
        seeds: runs with seeds one after another, on the same splits.
        bootstrap: resamplings of the 95 % intervals; 0: none.

    Raises:
        LongseqError, DataError: in one sentence, before anything is trained, for what cannot be learned.
    """
    for name, value, least in (("batch", batch, 1), ("seeds", seeds, 1), ("bootstrap", bootstrap, 0)):
        if value < least:
            raise LongseqError(f"{name}={value}: take {least} or more.")
    refuse_several_tasks(os.environ, "finetune")
    given = {"sequence": sequence, "label": label, "split": split_column, "cluster": cluster_column}
    asked = {**given, "table": str(table), "task": task, "learn": learn}
    config = configured(find(target), asked, overrides, batch)
    name = f"{Path(str(table)).name.partition('.')[0]}-{learn}"
    if seeds > 1 and config.run.name is None:
        config.run.name = dated(name)
    trainings: list[Training] = []
    evaluations: list[Evaluation] = []
    configs = [deepcopy(config) for _ in range(seeds)]
    for number, own in enumerate(configs if seeds > 1 else ()):
        own.run.seed += number
        own.run.name = f"{config.run.name}-seed{own.run.seed}"
        Run.new(own, name)  # a taken name is said before the first of them trains
    for own in configs:
        trainings.append(begin(own, name))
        if trainings[-1].code:
            break
        rows = labelled(own, None).rows
        splits = tuple(split for split in ("valid", "test") if rows.of(split))
        evaluations += evaluate(trainings[-1].run.path, Settings(splits=splits or ("train",), bootstrap=bootstrap))
    return Finetuning(trainings, evaluations)


def configured(source: Source, asked: dict[str, Any], overrides: Sequence[str], batch: int = BATCH) -> Config:
    """The configuration of a run that learns labels: the model's own, what is ``asked`` of its section ``finetune``,
    defaults that fit the table, and overrides.

    Raises:
        LongseqError, DataError: for a model or a table that cannot be used.
    """
    if source.tuned:
        raise LongseqError(
            f"{source.folder}: has learned labels already; give the model that it began with: "
            f"{source.config.model.init_from}."
        )
    if source.vocabulary.name == "pixels":
        raise LongseqError(f"{source.folder}: a model of pixels; this works on proteins, DNA and text.")
    fixed = {word.partition("=")[0] for word in overrides}
    config = config_of(_sections(source, asked), "longseq finetune", overrides)
    resolve_sources(config)
    _describe(config)
    rows = labelled(config, None).rows
    train = rows.of("train")
    steps = min(max(len(train) // batch, 10), 500)  # about an epoch
    config.data.length = config.data.length if "data.length" in fixed else rows.longest + 2
    defaults = {
        "trainer.valid_every": steps,
        "trainer.max_steps": _EPOCHS * steps,
        "data.valid_samples": len(rows.rows),
    }
    _fill(config, defaults, fixed)
    validated, last = config.trainer.valid_every, config.trainer.max_steps
    defaults = {"trainer.checkpoint_every": validated, "trainer.keep_best": int(validated > 0)}
    defaults |= {"optim.warmup_steps": min(100, last // 20), "data.batch_tokens": batch * config.data.length}
    _fill(config, defaults, fixed)
    _fill(config, {"trainer.accumulate": _accumulated(config), "optim.lr": _RATES[config.finetune.learn]}, fixed)
    if train and config.finetune.task in OF_CLASSES:
        config.finetune.classes = list(rows.classes)
        check_text("finetune.classes", config.finetune.classes, "labels", str(config.finetune.table))
    elif train:
        numbers = np.concatenate([rows.labels[row] for row in train])
        numbers = numbers[~np.isnan(numbers)]
        if not len(numbers) or not np.ptp(numbers):  # whose deviation is not quite 0
            same = f"the same {config.finetune.label}, {numbers[0]:g}" if len(numbers) else "no number"
            raise DataError(f"{config.finetune.table}: all training rows have {same}: there is nothing to learn.")
        with np.errstate(over="ignore", invalid="ignore"):
            config.finetune.center, config.finetune.scale = float(numbers.mean()), float(numbers.std())
        if not 0 < config.finetune.scale < math.inf:
            raise DataError(
                f"{config.finetune.table}: {config.finetune.label} has numbers whose squares are too large or too "
                "small for a computer: give them in another unit."
            )
    config.check()
    return config


def _sections(source: Source, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    own, sections = source.config.data, inherited(str(source.folder))
    learned = {name: value for name, value in asked.items() if value is not None}
    sections["model"]["init_from"] = str(source.folder)
    sections["attention"]["redraw_every"] = 0  # what is frozen stays the same
    joined = own.packing == "concat"  # which decides the token before a sequence
    sections["data"] |= {"tokenizer": source.vocabulary.name, "packing": "concat" if joined else "crop"}
    sections["data"] |= {"reset": own.reset, "valid_fraction": 0.1, "test_fraction": 0.2}
    return {
        **sections,
        "optim": {"weight_decay": 0.01, "clip": 1.0},
        "trainer": {"probe_every": 0, "keep_checkpoints": 1},
        "finetune": {**learned, "feature_seed": source.config.run.seed},
    }


def _describe(config: Config) -> None:
    """Fill in columns and task by the table."""
    tune = config.finetune
    table = read_table(str(tune.table))
    tune.sequence = table.sequence_column(tune.sequence)
    tune.label = table.label_column(tune.label, [tune.sequence, tune.split, tune.cluster])
    if tune.task == "auto":
        tune.task = task_of(table, tune.sequence, tune.label)


def _accumulated(config: Config) -> int:
    """The fewest micro-batches that are not too large for one process."""
    rows = config.samples_per_step // config.replicas
    most = max(1, _MOST_TOKENS // config.data.length)
    return next((count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most), 1)


def _fill(config: Config, defaults: Mapping[str, float], fixed: set[str]) -> None:
    for key, value in defaults.items():
        section, _, name = key.partition(".")
        if key not in fixed:
            setattr(getattr(config, section), name, value)
