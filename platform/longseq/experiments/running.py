"""The runs of an experiment, one after another, each trained by ``longseq.fit`` and scored by ``longseq.evaluate``.

A run that is finished is not trained again, one that was interrupted goes on, and a score that is known is kept: the
same command goes on where it was stopped, and with more seeds adds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from longseq.config.loading import read_config
from longseq.config.merging import shown
from longseq.config.plan import named
from longseq.errors import EXIT_GO_ON, DivergedError, LongseqError
from longseq.evaluation.evaluate import Evaluation, evaluate
from longseq.evaluation.request import Settings as EvaluationSettings
from longseq.experiments.plan import Plan, Variant, slug
from longseq.launch.start import Training, fit, resume
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq_data.files import write_text

_LEARNED = ("qk_norm", "learned_share", "learned_decay", "forget_gate", "learned_covariance")
_RESULT = ("group", "variant", "seed", "splits", "curve")


class Verbs(Protocol):
    """What an experiment does with a run."""

    def fit(self, config: Path, overrides: Sequence[str]) -> Training: ...

    def resume(self, folder: Path) -> Training: ...

    def evaluate(self, run: Path, settings: EvaluationSettings) -> Evaluation: ...


class Here:
    """On this machine."""

    def fit(self, config: Path, overrides: Sequence[str]) -> Training:
        return fit(config, overrides)

    def resume(self, folder: Path) -> Training:
        return resume(folder)

    def evaluate(self, run: Path, settings: EvaluationSettings) -> Evaluation:
        (evaluation,) = evaluate([run], settings)
        return evaluation


@dataclass(frozen=True)
class Settings:
    """What the command line adds to a plan."""

    out: Path
    config: Path
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    sequences: int | None  # scored of each split; None: all


@dataclass(frozen=True)
class Trial:
    """One run."""

    group: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{slug(self.group, self.variant.name)}-seed{self.seed}"


class Interrupted(Exception):
    """Ctrl-C: the run under way has saved."""


def trials(plan: Plan, seeds: Sequence[int]) -> Iterator[Trial]:
    """A whole table of one seed before the next."""
    for seed in seeds:
        for group in plan.groups:
            for variant in plan.variants.values():
                yield Trial(group, variant, seed)


def arguments(plan: Plan, settings: Settings, trial: Trial) -> list[str]:
    """The overrides of a run's configuration."""
    words = [*plan.overrides, *settings.overrides, *plan.groups[trial.group], *trial.variant.overrides]
    words += [f"run.seed={trial.seed}", f"run.dir={settings.out / 'runs'}", f"run.name={trial.name}"]
    if plan.curve or trial.variant.steps < 1:
        steps = read_config(settings.config, words).trainer.max_steps
        steps = max(1, round(trial.variant.steps * steps))
        words.append(f"trainer.max_steps={steps}")
        words += [f"trainer.valid_every={max(1, steps // 10)}"] if plan.curve else []
    if trial.variant.origin:
        words.append(f"model.init_from={_folder(settings, _origin(plan, trial))}")
    return words


def perform(
    plan: Plan,
    settings: Settings,
    tell: Callable[[str], None],
    verbs: Verbs | None = None,
    *,
    may_diverge: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train and score what is not yet; everything that is known then, by the run's name.

    Args:
        tell: gets what is done, a line at a time.
        verbs: None: on this machine.
        may_diverge: whether a run that diverges is a result, its losses None, and not an error.

    Raises:
        LongseqError: if a run fails, or the folder holds another experiment.
        Interrupted: if one was stopped.
    """
    verbs = verbs or Here()
    _claim(plan, settings)
    for trial in trials(plan, settings.seeds):
        kept = settings.out / "results" / f"{trial.name}.json"
        if kept.exists():
            continue
        tell(f"{trial.group}, {trial.variant.name}, seed {trial.seed}")
        found: dict[str, Any] = {"group": trial.group, "variant": trial.variant.name, "seed": trial.seed}
        try:
            _train(plan, settings, trial, tell, verbs)
        except DivergedError as error:
            if not may_diverge:
                raise
            tell(f"{trial.variant.name}: diverged, and counts as the worst: {error}")
            _write({**found, "splits": {split: {"loss": None} for split in plan.splits}, "curve": {}}, kept)
            continue
        found["splits"] = _scores(plan, settings, _folder(settings, trial), (), verbs)
        if trial.variant.origin:
            origin = _folder(settings, _origin(plan, trial))
            found["before"] = _scores(plan, settings, origin, _attention(_folder(settings, trial), origin), verbs)
        curves = read_curves(_folder(settings, trial) / "tensorboard")
        found["curve"] = {str(step): value for step, value in curves.get("valid/accuracy", {}).items()}
        _write(found, kept)
    return results(plan, settings)


def results(plan: Plan, settings: Settings) -> dict[str, dict[str, Any]]:
    """What the folder holds of this experiment, of whatever seeds, by the run's name."""
    found = {path.stem: _read(path, _RESULT) for path in sorted((settings.out / "results").glob("*.json"))}
    return {name: r for name, r in found.items() if r["variant"] in plan.variants and r["group"] in plan.groups}


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        _ = [content[key] for key in keys]
        return content
    except (ValueError, LookupError, TypeError):
        raise LongseqError(f"{path}: damaged: remove it, and the same command makes it again.") from None


def _write(content: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _claim(plan: Plan, settings: Settings) -> None:
    """Refuse a folder that holds results of other settings; new variants and groups may come to it."""
    (settings.out / "results").mkdir(parents=True, exist_ok=True)
    path = settings.out / "settings.json"
    mine: dict[str, Any] = {
        "experiment": plan.name,
        "config": str(settings.config),
        "overrides": sorted([*plan.overrides, *settings.overrides]),
        "sequences": settings.sequences,
    }
    before = _read(path, list(mine)) if path.exists() else mine
    runs = {
        slug(group, variant.name): [*words, *variant.overrides, f"from={variant.origin}", f"steps={variant.steps}"]
        for group, words in plan.groups.items()
        for variant in plan.variants.values()
    }
    known = before.get("runs", {})
    differing = [(name, before[name], value) for name, value in mine.items() if before[name] != value]
    differing += [(name, known[name], value) for name, value in runs.items() if known.get(name, value) != value]
    for name, old, new in differing:
        raise LongseqError(f"{settings.out}: holds results of {name}={old}, not {new}: choose another --out.")
    _write({**mine, "runs": {**known, **runs}}, path)


def _train(plan: Plan, settings: Settings, trial: Trial, tell: Callable[[str], None], verbs: Verbs) -> None:
    folder = _folder(settings, trial)
    if (folder / "FINISHED").exists():
        return
    if (folder / "config.yaml").exists():
        training = verbs.resume(folder)
    else:
        training = verbs.fit(settings.config, arguments(plan, settings, trial))
    for line in training.report:
        tell(line)
    if training.code == EXIT_GO_ON:
        raise Interrupted
    if training.code:
        raise LongseqError(f"{trial.name}: ended with exit code {training.code}; the same command goes on from here.")


def _attention(run: Path, origin: Path) -> tuple[str, ...]:
    """What makes of the attention of ``origin`` that of ``run``, but for what only training can add: for a look at the
    weights before they were trained on."""
    new, old = (asdict(Run.open(path).config().attention) for path in (run, origin))
    if new["layers"]:
        layers = ({"kind": new["kind"], **named(entry)} for entry in new["layers"])
        new["layers"] = [{name: of for name, of in layer.items() if name not in _LEARNED} for layer in layers]
    return tuple(
        f"attention.{name}={shown(value)}" for name, value in new.items() if value != old[name] and name not in _LEARNED
    )


def _scores(
    plan: Plan, settings: Settings, run: Path, overrides: tuple[str, ...], verbs: Verbs
) -> dict[str, dict[str, Any]]:
    how = EvaluationSettings(splits=plan.splits, overrides=overrides, sequences=settings.sequences)
    evaluation = verbs.evaluate(run, how)
    wanted = ("loss", "perplexity", "accuracy", "sequences", "targets", "baseline")
    return {split: {k: r[k] for k in wanted if k in r} for split, r in evaluation.splits.items()}


def _origin(plan: Plan, trial: Trial) -> Trial:
    assert trial.variant.origin
    return Trial(trial.group, plan.variants[trial.variant.origin], trial.seed)


def _folder(settings: Settings, trial: Trial) -> Path:
    return settings.out / "runs" / trial.name


def facts(plan: Plan, settings: Settings, found: dict[str, dict[str, Any]]) -> str:
    """One line on the models and their training, of a run of the first variant that has one."""
    order = list(plan.variants)
    for name in sorted(found, key=lambda name: order.index(found[name]["variant"])):
        path = settings.out / "runs" / name
        if (path / "config.yaml").is_file():
            config = Run.open(path).config()
            spec = config.performer_spec(29)
            tokens = config.trainer.max_steps * config.data.batch_tokens
            return (
                f"{spec.depth} layers, {spec.heads} heads, width {spec.dim}, MLP {spec.hidden}, "
                f"{spec.features} features; {config.trainer.max_steps:,} steps of {config.data.batch_tokens:,} tokens "
                f"= {tokens:,} tokens a run, "
                f"length {config.data.length}"
            )
    return ""
