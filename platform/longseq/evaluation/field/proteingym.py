"""Effects of mutations on ProteinGym's assays: what ``longseq benchmark proteingym`` does, as a function."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longseq.errors import LongseqError
from longseq.evaluation.field.assays import Entry, Scan, collection, scan
from longseq.evaluation.field.averages import Assay, Averages, averages
from longseq.evaluation.field.measures import MEASURES, Floats, Result
from longseq.evaluation.field.models import label, proteins
from longseq.evaluation.field.official import BESIDE, Official, published
from longseq.evaluation.nodes import Nodes
from longseq.evaluation.records import both_directions
from longseq.evaluation.shards import Job, Work, done, refuse_devices
from longseq.printed import plain
from longseq.runs import starts
from longseq.trained_model import EMA, Source, find
from longseq_data.files import sha256_of, write_text

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM

Progress = Callable[[str, str, str, bool], None]  # model, assay, kind, whether it had been done before

_FORMAT = 1  # of what is kept of an assay


@dataclass(frozen=True)
class AssayResult:
    """One model on one assay."""

    assay: Assay
    kind: str  # substitutions or indels
    mutants: int
    measures: dict[str, float]  # Spearman, AUC, MCC, NDCG, Top_recall; NaN where not defined
    by_depth: dict[str, dict[str, float]]  # of substitutions, by their number: 1, 2, 3, 4, 5+
    baselines: dict[str, dict[str, float]]  # of substitutions: what the letters alone say
    scores: Path  # a CSV of every mutant's score

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scores": str(self.scores)}


@dataclass(frozen=True)
class ModelResult:
    """One model on all assays."""

    name: str
    step: int
    objective: str
    assays: list[AssayResult]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "assays": [each.as_dict() for each in self.assays]}

    def averages(self, kind: str, measure: str = "Spearman", baseline: str | None = None) -> Averages:
        """As ProteinGym averages, over this model's assays of a kind; or those of a baseline on them."""
        these = [each for each in self.assays if each.kind == kind]
        if baseline is not None:
            these = [each for each in these if baseline in each.baselines]
            own = {each.assay.id: each.baselines[baseline][measure] for each in these}
            return averages([each.assay for each in these], own)
        values = {each.assay.id: each.measures[measure] for each in these}
        depths = {each.assay.id: {depth: m[measure] for depth, m in each.by_depth.items()} for each in these}
        return averages([each.assay for each in these], values, depths)


@dataclass(frozen=True)
class ProteinGym:
    """What :func:`benchmark_proteingym` returns."""

    models: list[ModelResult]
    absent: list[str]  # DMS_id of assays that the reference names and the folder lacks
    official: list[Official] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # published models to compare with
    passed_over: list[Path] = field(default_factory=list)  # reference files that list no measurements

    def kinds(self) -> list[str]:
        """Of the assays that were scored."""
        return sorted({each.kind for model in self.models for each in model.assays}, reverse=True)

    def assays(self, kind: str) -> list[Assay]:
        """Those of a kind that were scored."""
        return [each.assay for each in self.models[0].assays if each.kind == kind]

    def compared(self, kind: str) -> dict[str, dict[str, Averages]]:
        """Averages over the assays that were scored, by measure: of the models, of baselines, of published models."""
        rows = {model.name: {measure: model.averages(kind, measure) for measure in MEASURES} for model in self.models}
        first = self.models[0]
        for name in next((each.baselines for each in first.assays if each.kind == kind), {}):
            rows[name] = {measure: first.averages(kind, measure, name) for measure in MEASURES}
        assays = self.assays(kind)
        for name in self.beside:
            tables = [table for table in self.official if table.kind == kind and name in table.models]
            of_model = {table.measure: table.averages(name, assays) for table in tables}
            if any(each.assays for each in of_model.values()):
                rows[f"{name}, published"] = of_model
        return rows

    def as_dict(self) -> dict[str, Any]:
        """What ``longseq benchmark proteingym --json`` prints; what is not defined is None."""
        averages = {
            kind: {
                name: {measure: each.as_dict() for measure, each in row.items()}
                for name, row in self.compared(kind).items()
            }
            for kind in self.kinds()
        }
        return plain(
            {"averages": averages, "models": [model.as_dict() for model in self.models], "absent": self.absent}
        )


def benchmark_proteingym(
    folder: str | Path,
    targets: str | Path | Source | Iterable[str | Path | Source],
    overrides: Sequence[str] = (),
    *,
    assays: Iterable[str] = (),
    reference: str | Path | None = None,
    official: Iterable[str | Path] = (),
    beside: Sequence[str] | None = None,
    ema: bool = False,
    passes: int = 0,
    direction: str | None = None,
    out: str | Path | None = None,
    devices: int = 1,
    progress: Progress = lambda *_: None,
) -> ProteinGym:
    """Score the mutants of ProteinGym's assays (Notin et al. 2023) and hold the scores against the measurements.

    An assay that is done is kept at once, and not done again for the same weights, assay and options.

    Args:
        folder: as ProteinGym distributes it: a reference file and a CSV for each assay, in the folder or one below.
            What the reference names and the folder lacks is left out.
        targets: runs, checkpoints, exported folders, or what ``longseq.find`` returned; one or several.
        overrides: ``section.key=value`` on top of each run's configuration.
        assays: DMS_id of those wanted; none: all.
        reference: the reference file, if it is not in the folder.
        official: files or folders with ProteinGym's published results by assay; those in ``folder`` are found.
        beside: published models to compare with; None: a few, as far as the published results have them.
        ema: with the running mean of the weights.
        passes: of masked models on indels: hide every passes-th position at once; 0: one pass per position, exact.
        direction: forward or both, of causal models; None: both of those that were trained so (data.reverse).
        out: where assays are kept, a folder for each model; default: each run's evaluations/proteingym.
        devices: processes that share the assays; results are the same to the last bit.
        progress: called with the model's name, the assay and its kind before each, or with several devices behind each,
            and whether it was done before.

    Raises:
        LongseqError, DataError: in one sentence, for a model or a file that cannot be used.
    """
    sources = proteins(targets, overrides, ema)
    if passes < 0:
        raise LongseqError(f"passes={passes}: take 0 or more.")
    refuse_devices(devices)
    for source in sources:
        both_directions(source, direction)
    assays = list(assays)
    found = collection(Path(folder), Path(reference) if reference else None, assays)
    tables = published([*map(Path, official), Path(folder)])
    known = list(dict.fromkeys(name for table in tables for name in table.models))
    for name in beside or ():
        if name not in known:
            has = f"those here have {', '.join(known)}" if known else "there are none here (--official)"
            raise LongseqError(f"beside={name}: no such model in published results by assay; {has}.")
    kept: dict[Path, Path] = {}
    for source in sources:
        other = kept.setdefault(_place(source, out), source.weights)
        if other != source.weights:
            raise LongseqError(
                f"{source.folder} and {other.parent} would be kept in one folder, {_place(source, out)}: give each an "
                "out (--out) of its own."
            )
    if devices > 1 or Nodes.here():
        options = {"targets": [str(source.folder) for source in sources], "assays": list(assays), "passes": passes}
        options["direction"] = direction
        options |= {"reference": reference and str(reference), "out": out and str(out)}
        job = Job("proteingym", str(sources[0].folder), str(folder), tuple(overrides), ema, options)
        for told in done(Assays(job), devices):
            progress(*told)
        progress = _said
    models = []
    for source in sources:
        scorer = Scorer(source, label(source, sources), overrides, passes, out, direction)
        results = [scorer.result(entry, progress) for entry in found.entries]
        models.append(ModelResult(scorer.name, source.step, source.config.model.objective, results))
    return ProteinGym(
        models,
        found.absent,
        tables,
        [name for name in BESIDE if name in known] if beside is None else list(beside),
        found.passed_over,
    )


def _said(*_: object) -> None:
    """For what is done, and was told by those who did it."""


class Scorer:
    """One model, which scores assays as :func:`benchmark_proteingym` is asked to and keeps what it has done."""

    def __init__(
        self,
        source: Source,
        name: str,
        overrides: Sequence[str],
        passes: int,
        out: str | Path | None,
        direction: str | None = None,
    ):
        self.source, self.name, self.overrides, self.passes = source, name, overrides, passes
        self.both = both_directions(source, direction)
        self.place = _place(source, out)

    @cached_property
    def weights(self) -> str:
        return sha256_of(self.source.weights)

    @cached_property
    def model(self) -> PerformerLM:
        return self.source.load()

    def result(self, entry: Entry, progress: Progress) -> AssayResult:
        """Of one assay, which is scored if that was not done before."""
        mutants = scan(entry.file, entry.cutoff)
        given = [_FORMAT, self.weights, *self.overrides, self.passes]
        given += [sha256_of(entry.file), entry.target, str(entry.cutoff), *(["both"] if self.both else [])]
        key = hashlib.sha256(json.dumps(given).encode()).hexdigest()
        kept = self.place / mutants.kind / f"{entry.assay.id}.json"
        result = _read(kept, key)
        progress(self.name, entry.assay.id, mutants.kind, result is not None)
        if result is None:
            from longseq.evaluation.field.fitness import fitness

            scores, result = fitness(self.source, self.model, entry, mutants, self.passes, self.both)
            _keep(kept, key, mutants, scores, result)
        return AssayResult(
            entry.assay,
            mutants.kind,
            len(mutants.mutants),
            result.measures,
            result.by_depth,
            result.baselines,
            kept.with_suffix(".csv"),
        )


class Assays(Work[tuple[int, int], list[Any]]):
    """Assays of each model, for processes that share them; a row is what ``progress`` is told of one.

    Options: targets, reference, assays, passes, direction, out.
    """

    grows = False

    def __init__(self, job: Job, source: Source | None = None):
        self.job, options = job, job.options
        sources = [find(target, job.overrides, ema=job.ema, sums=False) for target in options["targets"]]
        self.source = sources[0]
        self.scorers = [
            Scorer(each, label(each, sources), job.overrides, options["passes"], options["out"], options["direction"])
            for each in sources
        ]
        reference = options["reference"] and Path(options["reference"])
        self.entries = collection(Path(job.file), reference, options["assays"]).entries

    def groups(self) -> Iterator[tuple[int, int]]:
        return product(range(len(self.scorers)), range(len(self.entries)))

    def rows(self, group: tuple[int, int]) -> list[list[Any]]:
        told: list[list[Any]] = []
        self.scorers[group[0]].result(self.entries[group[1]], lambda *what: told.append(list(what)))
        return told


def _place(source: Source, out: str | Path | None) -> Path:
    """Where a model's assays are kept."""
    name = (source.folder.stem if source.run else source.folder.name) + ("-ema" if source.weights.name == EMA else "")
    if out is not None:
        return Path(out) / (f"{source.name}-{name}" if source.run else name)
    return (source.run.evaluations_dir if source.run else source.folder / "evaluations") / "proteingym" / name


def _whole(values: dict[str, Any]) -> dict[str, Any]:
    """NaN again for None."""
    return {
        key: _whole(each) if isinstance(each, dict) else math.nan if each is None else each
        for key, each in values.items()
    }


def _read(path: Path, key: str) -> Result | None:
    """What is kept of an assay; None where there is nothing, or of other weights, mutants or options."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # half-written by nobody, but edited
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key and path.with_suffix(".csv").is_file():
            return Result(*(_whole(kept[name]) for name in ("measures", "by_depth", "baselines")))
    return None


def _keep(path: Path, key: str, mutants: Scan, scores: Floats, result: Result) -> None:
    """The scores, and then, as the sign that they are whole, what they are worth."""
    starts.check_own()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mutant", "DMS_score", *([] if mutants.fit is None else ["DMS_score_bin"]), "score"])
    labels = [[]] * len(scores) if mutants.fit is None else [[int(is_fit)] for is_fit in mutants.fit]
    measured = mutants.measured.tolist()
    for name, value, own, score in zip(mutants.mutants, measured, labels, scores.tolist(), strict=True):
        writer.writerow([name, value, *own, score])
    write_text(path.with_suffix(".csv"), text.getvalue())
    write_text(path, json.dumps(plain({"key": key, **asdict(result)}), indent=1) + "\n")
