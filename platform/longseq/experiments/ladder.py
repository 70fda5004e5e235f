"""A ladder of models: small ones of a configuration's family, trained, that say what a larger one will reach.

The family has one depth, one head_dim, one ratio of ffn_dim to dim: its members differ in their width, by which the
learning rate is transferred (longseq.training.transfer). Each rung is a run of ``longseq.fit``, of a size and a number
of tokens; the fit of loss(N, D) is that of longseq.experiments.scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.data import resolve_sources, sources_of, vocabulary
from longseq.errors import DivergedError, LongseqError
from longseq.experiments.plan import Plan, Variant
from longseq.experiments.running import Settings, Verbs, perform
from longseq.experiments.scaling import Law, Point, Prediction, check, fit, predict
from longseq.printed import as_json
from longseq_data.files import user_path, write_text

_GROUP, _SPLIT = "rung", "valid"
_SIZES = 4  # of a ladder that is not told any


@dataclass(frozen=True)
class Member:
    """A size of the family."""

    dim: int
    heads: int
    ffn_dim: int
    parameters: int

    @property
    def overrides(self) -> tuple[str, ...]:
        return f"model.dim={self.dim}", f"model.heads={self.heads}", f"model.ffn_dim={self.ffn_dim}"


@dataclass(frozen=True)
class Rung:
    """A size, trained on so many tokens."""

    member: Member
    budget: float  # tokens per weight that were asked for
    steps: int
    tokens: int
    lr: float
    warmup_steps: int
    runs: tuple[str, ...] = ()  # folders, one a seed
    loss: float = math.nan  # validation, nats, mean over the seeds; NaN: not trained, infinite: it diverged
    spread: float = 0.0  # half of the distance between the largest and the smallest


@dataclass(frozen=True)
class Ladder:
    """What a ladder found."""

    folder: Path
    base_dim: int  # the width of the learning rate
    lr: float
    rates: dict[float, float]  # the loss of each tried at the smallest size, infinite if it diverged; empty: none was
    rungs: tuple[Rung, ...]
    law: Law
    prediction: Prediction  # of the configuration itself
    measured: Rung | None  # the same, trained

    def as_dict(self) -> dict[str, Any]:
        """What ``longseq ladder --json`` prints and ladder.json holds."""
        return {**asdict(self), "folder": str(self.folder)}


def ladder(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    sizes: Sequence[int] = (),
    tokens_per_parameter: Sequence[float] = (5.0, 10.0, 20.0),
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    sequences: int | None = 1024,
    out: str | Path | None = None,
    verify: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    verbs: Verbs | None = None,
) -> Ladder:
    """Train small models of a configuration's family, fit loss(N, D), and predict the loss of the configuration's own
    size at the largest number of tokens per parameter. What is finished is not trained again: the same call goes on.
    A rate that diverges where rates are tried is the worst one.

    Args:
        config: a YAML file, or a name of ``longseq configs``; with ``overrides`` the largest member of the family.
        sizes: weights of the rungs, each met by the nearest width; none: up to four widths below the configuration's.
        tokens_per_parameter: budgets, in tokens per weight; with one, the law holds for it alone.
        rates: learning rates tried at the smallest size and the largest budget, of which the best is taken; none:
            optim.lr is right there (or at optim.base_dim).
        seeds: of runs, which are averaged.
        sequences: scored of the validation split; None: all.
        out: folder of runs and results; None: ladders/NAME.
        verify: train the configuration's own size, too, and hold the prediction against it.
        tell: gets what is done, a line at a time.
        verbs: how runs are trained and scored; None: on this machine.

    Raises:
        LongseqError, DataError: in one sentence, for what makes no ladder, and for a run that failed.
        Interrupted: if a run was stopped; it has saved.
    """
    if not seeds or not tokens_per_parameter:
        raise LongseqError("a ladder needs a seed and a number of tokens per parameter: leave empty ones out.")
    for name, values in (("tokens_per_parameter", tokens_per_parameter), ("rates", rates), ("sizes", sizes)):
        if not all(0 < value < math.inf for value in values):
            raise LongseqError(f"{name}={','.join(f'{value:g}' for value in values)}: take numbers above 0.")
    path = Path(config)
    whole = load_config(path, list(overrides))
    resolve_sources(whole)
    if whole.model.init_from:
        raise LongseqError(
            f"model.init_from={whole.model.init_from}: rungs have other sizes, and begin anew; leave it out."
        )
    if not sources_of(whole, _SPLIT):
        raise LongseqError(
            f"{config}: has no validation split to compare sizes on: set data.valid or data.valid_fraction."
        )
    members = family(whole, sizes)
    target, base_dim = members.pop(), whole.optim.base_dim or members[0].dim
    folder = user_path(out or Path("ladders") / path.stem).absolute()
    settings = Settings(folder, path, tuple(overrides), tuple(seeds), sequences)
    most = max(tokens_per_parameter)

    def trained(rungs: Sequence[Rung], named: bool, may_diverge: bool = False) -> list[Rung]:
        variants = {_name(rung, named): Variant(_name(rung, named), _overrides(rung, base_dim)) for rung in rungs}
        plan = Plan(Path("ladder.yaml"), "a ladder", groups={_GROUP: ()}, variants=variants, splits=(_SPLIT,))
        try:
            found = perform(plan, settings, tell, verbs, may_diverge=may_diverge)
        except DivergedError as error:  # whose advice is another rate for this run alone
            raise LongseqError(
                f"a rung diverged, so its loss tells no law: lower optim.lr={rungs[0].lr:g}, or --rates, and choose "
                f"another --out. What the run said: {error}"
            ) from error
        return [_with_losses(rung, name, found, settings) for rung, name in zip(rungs, variants, strict=True)]

    budgets = sorted(set(tokens_per_parameter))
    planned = [_rung(whole, member, budget, whole.optim.lr) for member in members for budget in budgets]
    if len({_name(rung, False) for rung in planned}) < len(planned):
        raise LongseqError(
            f"tokens_per_parameter={budgets}: two budgets are equally many steps of "
            f"data.batch_tokens={whole.data.batch_tokens}; take others, or a smaller batch."
        )
    check([(rung.member.parameters, rung.tokens) for rung in planned])
    lr, tried = whole.optim.lr, {}
    if rates:
        smallest = trained([_rung(whole, members[0], most, rate) for rate in sorted(set(rates))], True, True)
        tried = {rung.lr: rung.loss for rung in smallest}
        lr = min(tried, key=lambda rate: tried[rate])
        if math.isinf(tried[lr]):
            raise LongseqError(f"rates={','.join(f'{rate:g}' for rate in tried)}: all diverged; take lower ones.")
        for edge, name in ((min(tried), "smallest"), (max(tried), "largest")):
            if len(tried) > 1 and lr == edge:
                tell(f"optim.lr={lr:g} was best, the {name} that was tried: one beyond may be better")
    rungs = trained([replace(rung, lr=lr) for rung in planned], bool(rates))
    points = [Point(rung.member.parameters, rung.tokens, rung.loss) for rung in rungs]
    asked = _rung(whole, target, most, lr)
    prediction = predict(points, target.parameters, asked.tokens)
    result = Ladder(folder, base_dim, lr, tried, tuple(rungs), fit(points), prediction, None)
    write_text(folder / "ladder.json", as_json(result.as_dict(), indent=1) + "\n")
    if verify:
        tell(f"predicted a loss of {prediction.loss:.4f}; it is trained now (kept in {folder / 'ladder.json'})")
        result = replace(result, measured=trained([asked], bool(rates))[0])
        write_text(folder / "ladder.json", as_json(result.as_dict(), indent=1) + "\n")
    return result


def family(config: Config, sizes: Sequence[int] = ()) -> list[Member]:
    """The rungs' sizes, rising, and last the configuration's own.

    Raises:
        LongseqError: for sizes that no width is near to, and a configuration with too few smaller widths.
    """
    vocabulary_size = vocabulary(config).size
    spec = config.performer_spec(vocabulary_size)

    def member(heads: int) -> Member:
        dim = heads * spec.head_dim
        ffn = max(1, round(spec.ffn_dim * heads / spec.heads))
        small = replace(config, model=replace(config.model, dim=dim, heads=heads, ffn_dim=ffn))
        return Member(dim, heads, ffn, small.performer_spec(vocabulary_size).parameter_count)

    smaller = [member(heads) for heads in range(1, spec.heads)]
    if len(smaller) < 2:
        raise LongseqError(
            f"model.heads={spec.heads} of model.dim={spec.dim}: widths of the family are multiples of {spec.head_dim}, "
            f"and {len(smaller)} is smaller: take more heads (model.heads={max(4, spec.dim // 16)})."
        )
    if sizes:
        chosen = {min(smaller, key=lambda each: abs(math.log(each.parameters / size))) for size in sizes}
        if len(chosen) < len(set(sizes)):
            there = ", ".join(f"{each.parameters:,}" for each in smaller)
            raise LongseqError(f"sizes {', '.join(map(str, sizes))}: two are nearest to one width; there are {there}.")
    else:
        steps = min(_SIZES, len(smaller))
        ratio = (len(smaller)) ** (1 / (steps - 1))
        chosen = {smaller[round(ratio**step) - 1] for step in range(steps)}
    return [*sorted(chosen, key=lambda each: each.parameters), member(spec.heads)]


def _rung(config: Config, member: Member, budget: float, lr: float) -> Rung:
    steps = max(1, round(budget * member.parameters / config.data.batch_tokens))
    warmup = min(config.optim.warmup_steps, max(1, steps // 10))
    return Rung(member, budget, steps, steps * config.data.batch_tokens, lr, warmup)


def _name(rung: Rung, with_rate: bool) -> str:
    name = f"d{rung.member.dim} s{rung.steps}"
    return f"{name} lr{rung.lr!r}" if with_rate else name


def _overrides(rung: Rung, base_dim: int) -> tuple[str, ...]:
    return (
        *rung.member.overrides,
        *(f"trainer.max_steps={rung.steps}", f"optim.lr={rung.lr}", f"optim.base_dim={base_dim}"),
        f"optim.warmup_steps={rung.warmup_steps}",
    )


def _with_losses(rung: Rung, name: str, found: dict[str, dict[str, Any]], settings: Settings) -> Rung:
    mine = {
        run: result for run, result in found.items() if result["variant"] == name and result["seed"] in settings.seeds
    }
    losses = [math.inf if loss is None else loss for loss in (r["splits"][_SPLIT]["loss"] for r in mine.values())]
    runs = tuple(str(settings.out / "runs" / run) for run in mine)
    loss = fmean(losses)
    return replace(rung, runs=runs, loss=loss, spread=0.0 if math.isinf(loss) else (max(losses) - min(losses)) / 2)
