"""How well checkpoints predict: loss, perplexity, bits, accuracy, calibration, beside the empirical baseline.

The test split is scored, and the OOD files where data.ood names them; or any file, with --data. Intervals are 95 %, by
the bootstrap over sequences. Several checkpoints make one table. Results are kept in the run's folder as JSON under
evaluations/, and as curves over the steps in TensorBoard. Weights are read from safetensors; nothing is unpickled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.numbers import natural, positive
from longseq.commands.training import FIXED, check_data, refuse_changes, say
from longseq.config import Config
from longseq.data import SPLITS, corpus_of, reading, resolve_sources, split_spec
from longseq.errors import ConfigError, LongseqError
from longseq.evaluation.request import Request, is_split, samples_of
from longseq.opening import TARGET_HELP, Source, checkpoints_of, find, of_checkpoint, run_of
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.ingest.survey import survey
from longseq_data.os_errors import explained
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.sharing import Samples
from longseq_data.samples.streaming import StreamSpec

if TYPE_CHECKING:
    from longseq.evaluation.metrics import Counts
    from longseq.evaluation.tally import Tally

# What the weights fit, and which records were trained on.
_FIXED = tuple(
    key
    for key in FIXED
    if key not in ("data.test", "data.length", "data.packing", "data.reset", "data.crop", "data.batch_tokens")
)
# Enough targets to know the frequencies of 29 tokens to 0.1 %, in a few seconds of reading. Tokenizers are slower.
_BASELINE_TARGETS = 20_000_000
_BASELINE_TARGETS_TOKENIZED = 2_000_000
_SILENCE = 30.0  # seconds between two lines of a log
_OVERRIDE = re.compile(r"[A-Za-z]\w*(\.[\w-]+)+=")
_DEVICES = "trainer.devices="
_CURVES = ("loss", "perplexity", "bits", "accuracy", "ece", "bits_per_byte", "word_perplexity", "bits_per_dimension")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|CHECKPOINT|FOLDER [key=value ...]",
        help=f"{TARGET_HELP}, or several of them; then keys, e.g. data.ood=viruses.fasta.gz or attention.kind=exact",
    )
    parser.set_defaults(overrides=[])
    parser.add_argument(
        "--split",
        action="append",
        choices=SPLITS,
        help="may be repeated; default: test, and ood where there is one; none with --data",
    )
    parser.add_argument("--data", action="append", metavar="FILE", help="score any FASTA or text; may be repeated")
    parser.add_argument("--sequences", type=positive, metavar="N", help="score a sample of N sequences of each split")
    parser.add_argument("--all-checkpoints", action="store_true", help="every whole checkpoint of each run, over steps")
    parser.add_argument("--ema", action="store_true", help="score the running mean of the weights (trainer.ema_decay)")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="of top-k accuracy; default 5")
    parser.add_argument(
        "--bootstrap", type=natural, default=1000, metavar="N", help="resamplings of intervals; default 1000, 0: none"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the bootstrap; default 0")
    parser.add_argument(
        "--devices",
        type=positive,
        metavar="N",
        help="processes that share the work, a GPU each where there are any; the results are the same (default 1, or "
        "trainer.devices=N)",
    )
    parser.add_argument("--details", action="store_true", help="also tables by length, by confidence and by token")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    keys = [word for word in args.words if _OVERRIDE.match(word) and not Path(word).exists()]
    targets = [Path(word) for word in args.words if word not in keys]
    overrides = [*keys, *args.overrides]
    if not targets:
        raise LongseqError(f"evaluate: no model; give {TARGET_HELP}.")
    devices = _devices(args, overrides)
    args.overrides = [word for word in overrides if not word.startswith(_DEVICES)]
    groups = _groups(targets, args)
    looked: list[object] = []
    # A bad file is said before anything is scored.
    prepared = [(group, _parts(group[0], args, looked)) for group in groups]

    progress = _Progress()
    reports, unkept = [], []
    try:
        for group, parts in prepared:
            for source, report in _evaluated(group, parts, devices, args, progress):
                reports.append(report)
                try:
                    _keep(source, report, parts, args)
                except OSError as error:
                    unkept.append(explained(error, error.filename or source.folder))
    finally:  # what is done is shown, whatever happens to the rest
        if reports:
            alone = len(targets) == 1 and not args.all_checkpoints
            printed = json.dumps(reports[0] if alone else reports, indent=2)
            print(printed if args.json else _text(reports, args, unkept))
    if unkept:
        raise LongseqError(f"the results above could not be kept: {unkept[0]}, and evaluate again.")
    return 0


def _devices(args: argparse.Namespace, overrides: list[str]) -> int:
    words = [word.removeprefix(_DEVICES) for word in overrides if word.startswith(_DEVICES)]
    if words and args.devices is None:
        try:
            return positive(words[-1])
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"trainer.devices: {error}.") from None
    return args.devices or 1


def _groups(targets: list[Path], args: argparse.Namespace) -> list[list[Source]]:
    """The models, those of one run together."""
    groups: dict[Path, list[Source]] = {}
    for target in targets:
        if args.all_checkpoints:
            checkpoints = checkpoints_of(run_of(target))
            sources = [of_checkpoint(each, args.overrides, ema=args.ema) for each in checkpoints]
        else:
            sources = [find(target, args.overrides, ema=args.ema)]
        for source in sources:
            group = groups.setdefault(source.run.path if source.run else source.folder, [])
            if source.folder not in [other.folder for other in group]:
                group.append(source)
    return list(groups.values())


def _parts(source: Source, args: argparse.Namespace, looked: list[object]) -> tuple[str, ...]:
    """Names of splits, and files, all of which have been looked at: ``looked``, those of the models before it too."""
    config = deepcopy(source.config)
    files = [word if "://" in word else str(user_path(word).absolute()) for word in args.data or ()]
    splits = args.split or []
    if source.run is None and (splits or not files):
        raise LongseqError(
            f"{source.folder}: an exported folder, which knows no splits: say what to score with --data FILE alone."
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
    if splits:
        data = config.data
        files = [getattr(data, split) for split in SPLITS]
        what = (reading(config), files, data.strict, data.valid_fraction, data.test_fraction, data.split_by)
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


def _evaluated(
    group: list[Source], parts: tuple[str, ...], devices: int, args: argparse.Namespace, progress: _Progress
) -> Iterator[tuple[Source, dict]]:
    """A report for each model of a run, as soon as it is done."""
    # Heavy imports only now: what can be refused has been refused.
    from longseq.evaluation.parallel import scored

    request = Request(
        folders=tuple(str(source.folder) for source in group),
        overrides=tuple(args.overrides),
        parts=parts,
        ema=args.ema,
        sequences=args.sequences,
        top_k=args.top_k,
    )
    train = _training_counts(group[0])

    def show(number: int, part: int, sequences: int) -> None:
        progress(f"scoring {_label(parts[part], parts)}, step {group[number].step}", sequences)

    results: dict[str, dict] = {}
    try:
        for number, part, tally in scored(request, devices, show):
            results[_label(parts[part], parts)] = _results(group[number], parts[part], tally, train, args)
            if len(results) == len(parts):
                progress.clear()
                yield group[number], _report(group[number], results, args)
                results = {}
    finally:
        progress.clear()


def _results(source: Source, part: str, tally: Tally, train: Counts | None, args: argparse.Namespace) -> dict:
    from longseq.evaluation.metrics import frequency_baseline
    from longseq.evaluation.scoring import refuse_nothing
    from longseq.evaluation.summary import summary
    from longseq.evaluation.tokens import token_names

    samples = samples_of(source, part)
    refuse_nothing(samples, tally)
    names = token_names(source.vocabulary)
    settings = {"top_k": args.top_k, "bootstrap": args.bootstrap, "seed": args.seed}
    return {
        "sources": list(samples.sources),
        **summary(tally, names, source.vocabulary.name, **settings),
        "baseline": None if train is None else frequency_baseline(train, tally.wanted).as_dict(),
        # The best that any fixed frequencies can do here: those of the split itself.
        "baseline_own_frequencies": frequency_baseline(tally.wanted, tally.wanted).as_dict(),
    }


def _report(source: Source, results: dict[str, dict], args: argparse.Namespace) -> dict:
    return {
        "checkpoint": str(source.folder),
        "name": source.name,
        "step": source.step,
        "objective": source.config.model.objective,
        "weights": "ema" if args.ema else "last",
        "overrides": args.overrides,
        "sequences_limit": args.sequences,
        "splits": results,
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


def _keep(source: Source, report: dict, parts: tuple[str, ...], args: argparse.Namespace) -> None:
    """As JSON, then as points in TensorBoard. Raises OSError where the disk is full, say."""
    from longseq.evaluation.keeping import add_points, keep_json

    variant = _variant(parts, args)
    labels = "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", label)[:40] for label in report["splits"])
    folder = source.run.evaluations_dir if source.run else source.folder / "evaluations"
    kept = folder / f"{source.folder.stem}-{labels}{variant}.json"
    keep_json(report, kept)
    args.kept = [*getattr(args, "kept", []), kept]
    if source.run:
        points = {
            f"{label}/{key}": float(value)
            for label, values in report["splits"].items()
            for key, value in values.items()
            if key in _CURVES or key.startswith("top_")
        }
        add_points(source.run.tensorboard_dir / f"evaluation{variant}", points, source.step)


def _variant(parts: tuple[str, ...], args: argparse.Namespace) -> str:
    """A suffix for results that are not those of the run's own settings, so that they replace nothing."""
    ema = "-ema" if args.ema else ""
    files = [part for part in parts if not is_split(part)]
    settings = (sorted(args.overrides), args.sequences, files, args.top_k, args.bootstrap, args.seed)
    if settings == ([], None, [], 5, 1000, 0):
        return ema
    return f"{ema}-" + hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()


def _label(part: str, parts: tuple[str, ...]) -> str:
    """What a split or a file is called: the file's name where no two are alike."""
    if is_split(part):
        return part
    name = part.rstrip("/").rpartition("/")[2]
    alike = [other for other in parts if other.rstrip("/").rpartition("/")[2] == name]
    return name if len(alike) == 1 else part


def _text(reports: list[dict], args: argparse.Namespace, unkept: list[str]) -> str:
    from longseq.evaluation.table import details, table

    kept: list[Path] = getattr(args, "kept", [])
    text = [table(reports), *([details(reports)] if args.details else [])]
    if kept and not unkept:
        where = kept[0] if len(kept) == 1 else ", ".join(str(path) for path in dict.fromkeys(k.parent for k in kept))
        text.append(f"kept in {where}")
    return "\n\n".join(text)


class _Progress:
    """A bar on a terminal, a line now and then in a log. The number of sequences is not known before the end."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.bar = tqdm(unit=" sequences", disable=not sys.stderr.isatty(), leave=False)
        self._spoke = time.monotonic()

    def __call__(self, what: str, sequences: int) -> None:
        if self.bar.disable:
            if time.monotonic() - self._spoke > _SILENCE:
                print(f"{what}: {sequences:,} sequences", file=sys.stderr, flush=True)
                self._spoke = time.monotonic()
            return
        self.bar.set_description(what)
        self.bar.n = sequences
        self.bar.refresh()

    def clear(self) -> None:
        self.bar.clear()
