"""Labels of sequences by a model that has learned them: ``longseq predict``, and ``evaluate`` of such a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longseq.data import identities, resolve_sources
from longseq.errors import LongseqError
from longseq.evaluation.letters import ridge_on_letters
from longseq.evaluation.records import BATCH_TOKENS, Record, records
from longseq.evaluation.request import Settings
from longseq.label_data import labelled
from longseq.runs.changes import FIXED, refuse_changes
from longseq.trained_model import Source, find
from longseq_data.errors import DataError
from longseq_data.readers.label_table import OF_CLASSES, PER_RESIDUE, is_table, read_table, tokens_of
from longseq_data.readers.sources import expand_sources
from longseq_data.samples.label_samples import LabelledSamples

_OF_ROWS = (*(key for key in FIXED if key.startswith("finetune.")), "data.valid_fraction", "data.test_fraction")


class Prediction(NamedTuple):
    """What the model says of one sequence."""

    identifier: str
    value: str | float | list[str] | list[float]  # of residues a list, or a string where classes are letters
    probabilities: dict[str, float]  # of each class of a whole sequence; else empty


def predict(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    sequence: str | None = None,
    id: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Prediction]:
    """The labels that a model of ``longseq finetune`` gives to sequences, in the file's order, one for each.

    Args:
        target: a run, or one of its checkpoints; of a run, the checkpoint of the lowest validation loss.
        file: a CSV or TSV table, or FASTA.
        overrides: ``section.key=value`` on top of the run's configuration.
        sequence: the table's column of sequences; default: that of the run's table, or by its name.
        id: its column of ids; default: the one called id, or else rows count from 1.
        batch_tokens: read at once, padding included; a longer sequence is read alone. Values do not depend on it, but
            for fp32's rounding.

    Raises:
        LongseqError, DataError: at once, for a model or file that cannot be used, and a table's letters that the model
            does not know; while FASTA is read, for a bad record.
    """
    source = find(target, overrides)
    if not source.tuned:
        raise LongseqError(f"{source.folder}: predicts tokens; `longseq finetune` makes a model of labels of it.")
    if batch_tokens < 1:
        raise LongseqError(f"batch_tokens={batch_tokens}: take 1 or more.")
    return _predictions(source, _records(source, str(file), sequence, id), batch_tokens)


def _predictions(source: Source, found: Sequence[Record] | Iterator[Record], batch_tokens: int) -> Iterator[Prediction]:
    from longseq.evaluation.label_outputs import told

    tune = source.config.finetune
    classes = tune.classes
    letters = all(len(name) == 1 for name in classes)
    for record, made in told(source, found, batch_tokens):
        if tune.task in PER_RESIDUE:
            value: Any = [classes[number] for number in made.argmax(1)] if classes else made[:, 0].tolist()
            yield Prediction(record.identifier, "".join(value) if classes and letters else value, {})
        elif tune.task in OF_CLASSES:
            shares = dict(zip(classes, made[0].tolist(), strict=True))
            yield Prediction(record.identifier, classes[int(made[0].argmax())], shares)
        else:
            yield Prediction(record.identifier, float(made[0, 0]), {})


def _records(source: Source, file: str, column: str | None, id: str | None) -> Sequence[Record] | Iterator[Record]:
    (path,) = expand_sources([file])
    own = source.config.finetune.sequence
    if not is_table(path, column or own):
        if column or id:
            raise LongseqError(f"{file}: FASTA has no columns; leave --sequence and --id out, or give a CSV or TSV.")
        strict = find(source.folder, ["data.strict=true"], sums=False)  # as the table was read that was learned from
        return records(strict, path)
    table = read_table(path)
    column = column or (own if own in table.columns else table.sequence_column(None))
    letters = zip(table.identifiers(id), table.cells(column, "the sequences"), strict=True)
    name = source.vocabulary.name
    return [
        _record(source, identifier, tokens_of(each, name, f"{table.place(row)}, {column}"))
        for row, (identifier, each) in enumerate(letters)
    ]


def _record(source: Source, identifier: str, ids: npt.NDArray[np.unsignedinteger]) -> Record:
    row = np.concatenate([[source.begins], ids, [source.vocabulary.eos]])
    return Record(identifier, row.astype(source.vocabulary.dtype))


def label_parts(source: Source, settings: Settings) -> tuple[str, ...]:
    """Names of splits of the table, and other tables; all have been read.

    Raises:
        LongseqError, DataError: for a split without rows, and a table that does not fit the model.
    """
    if settings.devices > 1:
        raise LongseqError(f"devices={settings.devices}: one process is enough for labels; leave it out.")
    if settings.sequences is not None:
        raise LongseqError(f"sequences={settings.sequences}: of labels all rows are measured; leave it out.")
    assert source.run is not None
    files = expand_sources([str(file) for file in settings.files]) if settings.files else []
    splits = list(settings.splits or ())
    if splits or not files:
        refuse_changes(source.run.config(), source.config, source.run, _OF_ROWS)
        resolve_sources(source.config)
        source.run.check_data(source.config, identities(source.config))
        rows = labelled(source.config, None).rows
        splits = splits or [next(split for split in ("test", "valid", "train") if rows.of(split))]
        for split in splits:
            if not rows.of(split):
                raise LongseqError(f"{source.config.finetune.table}: no row is for {split}.")
    for file in files:
        _ = _samples(source, file).rows
    return tuple(dict.fromkeys([*splits, *files]))


def label_results(source: Source, part: str, bootstrap: int, seed: int) -> dict[str, Any]:
    """What an evaluation reports of a split or a table."""
    from longseq.evaluation.label_measures import summary
    from longseq.evaluation.label_outputs import told

    samples = _samples(source, part)
    rows, numbers = samples.rows, samples.rows.of(samples.split)
    found = (_record(source, str(number), rows.sequences[number]) for number in numbers)
    made = [each for _, each in told(source, found)]
    labels, classes = [rows.labels[number] for number in numbers], len(source.config.finetune.classes)
    by_letters = _of_letters(source, [rows.sequences[number] for number in numbers])
    baseline = None if by_letters is None else summary(labels, by_letters, classes, bootstrap=bootstrap, seed=seed)
    return {
        "sources": list(samples.sources),
        **summary(labels, made, classes, bootstrap=bootstrap, seed=seed),
        **({} if baseline is None else {"ridge_on_letters": baseline}),
    }


def _of_letters(
    source: Source, sequences: list[npt.NDArray[np.unsignedinteger]]
) -> list[npt.NDArray[np.float64]] | None:
    """What a regression on the letters of the training rows says of others; None where there is none."""
    if source.config.finetune.task != "regression":
        return None
    try:
        samples = labelled(source.config, "train")
        rows, numbers = samples.rows, samples.rows.of("train")
    except DataError:  # the table has moved
        return None
    truth = np.array([rows.labels[number][0] for number in numbers])
    told = ridge_on_letters([rows.sequences[number] for number in numbers], truth, sequences)
    return None if told is None else list(told[:, None, None])


def _samples(source: Source, part: str) -> LabelledSamples:
    if part in ("train", "valid", "test"):
        return labelled(source.config, part)
    return labelled(source.config, None, part)
