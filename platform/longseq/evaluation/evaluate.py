"""Evaluate trained models: what ``longseq evaluate`` does, as a function that returns data."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longseq.config.schema import Config
from longseq.data import SPLITS, corpus_of, reading, resolve_sources, split_spec
from longseq.data_report import check_data, say
from longseq.errors import ConfigError, LongseqError
from longseq.evaluation.label_measures import MEASURES
from longseq.evaluation.predict import label_parts, label_results
from longseq.evaluation.request import Settings, is_split, parts_of, samples_of
from longseq.evaluation.shards import Job
from longseq.evaluation.tallies import Tallies, scored
from longseq.runs.changes import FIXED, refuse_changes
from longseq.trained_model import Source, checkpoints_of, find, of_checkpoint, run_of
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.ingest.survey import survey
from longseq_data.os_errors import explained
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.rank_share import Samples
from longseq_data.samples.streaming import StreamSpec

if TYPE_CHECKING:
    from longseq.evaluation.metrics import Counts
    from longseq.evaluation.tally import Tally

Progress = Callable[[str, int], None]  # what is being scored, and its sequences so far

# What the weights fit, and which records were trained on.
_FIXED = tuple(
    key
    for key in FIXED
    if key not in ("data.test", "data.length", "data.packing", "data.reset", "data.crop", "data.batch_tokens")
)
# Enough targets to know the frequencies of 29 tokens to 0.1 %, in a few seconds of reading. Tokenizers are slower.
_BASELINE_TARGETS = 20_000_000
_BASELINE_TARGETS_TOKENIZED = 2_000_000
_CURVES = ("loss", "perplexity", "bits", "accuracy", "ece", "bits_per_byte", "word_perplexity", "bits_per_dimension")


@dataclass(frozen=True)
class Evaluation:
    """How well one checkpoint predicts."""

    checkpoint: Path
    name: str  # of the run, or of the exported folder
    step: int
    objective: str
    weights: str  # last or ema
    overrides: tuple[str, ...]
    sequences_limit: int | None
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split or file: loss, perplexity, accuracy, ...
    kept: Path | None = None  # the JSON file
    unkept: str | None = None  # why it could not be written

    def as_dict(self) -> dict[str, Any]:
        """What ``longseq evaluate --json`` prints and the JSON file holds."""
        return {
            "checkpoint": str(self.checkpoint),
            "name": self.name,
            "step": self.step,
            "objective": self.objective,
            "weights": self.weights,
            "overrides": list(self.overrides),
            "sequences_limit": self.sequences_limit,
            "splits": self.splits,
        }


def evaluate(targets: str | Path | Iterable[str | Path], settings: Settings = Settings()) -> list[Evaluation]:
    """Score models on splits or files.

    Args:
        targets: run folders, checkpoints or exported folders; one or several.

    Raises:
        LongseqError, DataError: in one sentence, for a model or data that cannot be scored, or results that cannot be
            kept; before anything is scored where that can be known.
    """
    several = [targets] if isinstance(targets, str | Path) else targets
    found = list(evaluations([Path(target) for target in several], settings))
    refuse_unkept(found)
    return found


def evaluations(
    targets: Sequence[Path], settings: Settings, progress: Progress = lambda *_: None
) -> Iterator[Evaluation]:
    """As :func:`evaluate`, one after another as they are done; one that cannot be kept says so in ``unkept``."""
    looked: list[object] = []
    # A bad file is said before anything is scored.
    prepared = [(group, _parts(group[0], settings, looked)) for group in _groups(targets, settings)]
    for group, parts in prepared:
        yield from _scored(group, parts, settings, progress)


def refuse_unkept(found: Sequence[Evaluation]) -> None:
    """Raise LongseqError if some results could not be written."""
    unkept = [each.unkept for each in found if each.unkept]
    if unkept:
        raise LongseqError(f"the results above could not be kept: {unkept[0]}, and evaluate again.")


def _groups(targets: Sequence[Path], settings: Settings) -> list[list[Source]]:
    """The models, those of one run together."""
    groups: dict[Path, list[Source]] = {}
    for target in targets:
        if settings.all_checkpoints:
            checkpoints = checkpoints_of(run_of(target))
            sources = [of_checkpoint(each, _read_by(target, settings), ema=settings.ema) for each in checkpoints]
        else:
            sources = [find(target, _read_by(target, settings), ema=settings.ema)]
        for source in sources:
            group = groups.setdefault(source.run.path if source.run else source.folder, [])
            if source.folder not in [other.folder for other in group]:
                group.append(source)
    return list(groups.values())


def _read_by(target: Path, settings: Settings) -> tuple[str, ...]:
    """The overrides, and where windows have another length as many tokens a step as fit the run: none is trained."""
    given = dict(word.partition("=")[::2] for word in settings.overrides)
    if not given.get("data.length", "").isdecimal() or "data.batch_tokens" in given:
        return settings.overrides
    others = [word for word in settings.overrides if not word.startswith("data.length=")]
    config = find(target, others, ema=settings.ema, sums=False).config
    rows = config.replicas * config.trainer.accumulate
    return *settings.overrides, f"data.batch_tokens={rows * int(given['data.length'])}"


def _parts(source: Source, settings: Settings, looked: list[object]) -> tuple[str, ...]:
    """Names of splits, and files, all of which have been looked at: ``looked``, those of the models before it too."""
    if source.tuned:
        return label_parts(source, settings)
    config = deepcopy(source.config)
    files = [word if "://" in word else str(user_path(word).absolute()) for word in map(str, settings.files)]
    splits = list(settings.splits or ())
    if source.run is None and (splits or not files):
        raise LongseqError(
            f"{source.folder}: an exported folder, which knows no splits: name files to score, and no split "
            "(evaluate --data FILE)."
        )
    if source.run is not None:
        if not files or splits:
            resolve_sources(config)
        before = source.run.config()
        if not files or splits:
            refuse_changes(before, config, source.run, _FIXED)
        if not files:
            splits = splits or (["test", "ood"] if config.data.ood or corpus_of(config, "ood") else ["test"])
    parts = []
    for part in dict.fromkeys([*splits, *files]):
        samples = samples_of(source, part)
        parts.append(part)
        if not is_split(part):
            _look(part, samples, looked)
        elif isinstance(samples, MixtureSpec):
            parts += [f"{part}/{name}" for name in samples.names]
        parts += parts_of(source, part)[1:]
    if splits:
        data = config.data
        files_of_splits = [getattr(data, split) for split in SPLITS]
        what = (reading(config), files_of_splits, data.strict, data.valid_fraction, data.test_fraction, data.split_by)
        if what not in looked:
            check_data(config)
            looked.append(what)
    return tuple(parts)


def _look(name: str, samples: Samples, looked: list[object]) -> None:
    """The beginning of a file, as before a training."""
    if not isinstance(samples, StreamSpec):
        return
    what = (name, samples.reading, samples.sources, samples.strict)
    if what not in looked:
        say(name, survey(samples.reading, samples.sources, strict=samples.strict))
        looked.append(what)


def _scored(
    group: list[Source], parts: tuple[str, ...], settings: Settings, progress: Progress
) -> Iterator[Evaluation]:
    """The models of one run."""
    if group[0].tuned:
        for source in group:
            found = {
                _label(part, parts): label_results(source, part, settings.bootstrap, settings.seed) for part in parts
            }
            yield _evaluation(source, found, parts, settings)
        return
    work = Tallies(
        Job(
            "evaluate",
            str(group[0].folder),
            parts[0],
            _read_by(group[0].folder, settings),
            settings.ema,
            {
                "folders": [str(source.folder) for source in group],
                "parts": parts,
                "sequences": settings.sequences,
                "top_k": settings.top_k,
            },
        ),
        sources=group,
    )
    train = _training_counts(group[0])

    def show(number: int, part: int, sequences: int) -> None:
        progress(f"scoring {_label(parts[part], parts)}, step {group[number].step}", sequences)

    results: dict[str, dict[str, Any]] = {}
    for number, part, tally in scored(work, settings.devices, show):
        source = group[number]
        results[_label(parts[part], parts)] = _results(source, parts[part], tally, train, settings)
        if len(results) == len(parts):
            yield _evaluation(source, results, parts, settings)
            results = {}


def _evaluation(
    source: Source, results: dict[str, dict[str, Any]], parts: tuple[str, ...], settings: Settings
) -> Evaluation:
    facts: dict[str, Any] = {
        "checkpoint": source.folder,
        "name": source.name,
        "step": source.step,
        "objective": source.config.model.objective,
        "weights": "ema" if settings.ema else "last",
        "overrides": settings.overrides,
        "sequences_limit": settings.sequences,
        "splits": results,
    }
    if not settings.keep:
        return Evaluation(**facts)
    try:
        return Evaluation(**facts, kept=_keep(source, Evaluation(**facts), parts, settings))
    except OSError as error:
        return Evaluation(**facts, unkept=explained(error, error.filename or source.folder))


def _results(source: Source, part: str, tally: Tally, train: Counts | None, settings: Settings) -> dict[str, Any]:
    from longseq.evaluation.metrics import frequency_baseline
    from longseq.evaluation.split_scores import refuse_nothing
    from longseq.evaluation.summary import summary
    from longseq.evaluation.tokens import token_names

    samples = samples_of(source, part)
    refuse_nothing(samples, tally)
    names = token_names(source.vocabulary)
    return {
        "sources": list(samples.sources),
        **summary(
            tally,
            names,
            source.vocabulary.name,
            top_k=settings.top_k,
            bootstrap=settings.bootstrap,
            seed=settings.seed,
        ),
        "baseline": None if train is None else frequency_baseline(train, tally.wanted).as_dict(),
        # The best that any fixed frequencies can do here: those of the split itself.
        "baseline_own_frequencies": frequency_baseline(tally.wanted, tally.wanted).as_dict(),
    }


def _training_counts(source: Source) -> Counts | None:
    """How often each token is a target in the training data; None where they are not there."""
    config: Config = deepcopy(source.config)
    if source.run is None:
        return None
    try:
        resolve_sources(config)
        tokenized = config.data.tokenizer.endswith(".json")
        return split_spec(config, "train").target_counts(
            _BASELINE_TARGETS_TOKENIZED if tokenized else _BASELINE_TARGETS
        )
    except (DataError, ConfigError) as error:
        print(f"longseq: warning: no baseline, as the training data cannot be read: {error}", file=sys.stderr)
        return None


def _keep(source: Source, evaluation: Evaluation, parts: tuple[str, ...], settings: Settings) -> Path:
    """As JSON, then as points in TensorBoard. Raises OSError where the disk is full, say."""
    from longseq.evaluation.result_files import add_points, keep_json

    variant = _variant(parts, settings)
    labels = "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", label)[:40] for label in evaluation.splits)
    folder = source.run.evaluations_dir if source.run else source.folder / "evaluations"
    kept = folder / f"{source.folder.stem}-{labels}{variant}.json"
    keep_json(evaluation.as_dict(), kept)
    if source.run:
        points = {
            f"{label}/{key}": float(value)
            for label, values in evaluation.splits.items()
            for key, value in values.items()
            if (key in (*_CURVES, *MEASURES) or key.startswith("top_")) and value is not None
        }
        add_points(source.run.tensorboard_dir / f"evaluation{variant}", points, source.step)
    return kept


def _variant(parts: tuple[str, ...], settings: Settings) -> str:
    """A suffix for results that are not those of the run's own settings, so that they replace nothing."""
    ema = "-ema" if settings.ema else ""
    files = [part for part in parts if not is_split(part)]
    what = (
        *(sorted(settings.overrides), settings.sequences, files),
        *(settings.top_k, settings.bootstrap, settings.seed),
    )
    if what == ([], None, [], 5, 1000, 0):
        return ema
    return f"{ema}-" + hashlib.blake2b(repr(what).encode(), digest_size=4).hexdigest()


def _label(part: str, parts: tuple[str, ...]) -> str:
    """What a split or a file is called: the file's name where no two are alike."""
    if is_split(part):
        return part
    name = part.rstrip("/").rpartition("/")[2]
    alike = [other for other in parts if other.rstrip("/").rpartition("/")[2] == name]
    return name if len(alike) == 1 else part
