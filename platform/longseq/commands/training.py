"""What ``fit`` and ``resume`` share: checks before anything is started, and the start itself."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from longseq import starts
from longseq.checkpoint import Checkpoint, checkpoints_in, expected_bytes, remove_partials
from longseq.config import Config
from longseq.config_loading import shown
from longseq.curves import read_curves
from longseq.data import SPLITS, Where, cache_folder, read_while_training, reading, sources_of, vocabulary
from longseq.data_sources import reweighted, unweighted
from longseq.errors import EXIT_GO_ON, USER_ERRORS, ConfigError, LongseqError, RunError
from longseq.launch import local
from longseq.models.presets import PRESETS
from longseq.opening import find
from longseq.owner import Process, words_of
from longseq.run import Run, as_typed
from longseq.training.schedule import schedule_change
from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.ingest.survey import UNITS, Report, survey
from longseq_data.prepare.identity import identity_of
from longseq_data.readers.fasta import NUCLEOTIDES_SENTENCE
from longseq_data.splits import SplitRule

TAKE_OVER_HELP = (
    "start although what had the run cannot be asked whether it still trains: a process of another machine, or a job "
    "where SLURM does not answer"
)


def train(run: Run, config: Config, checkpoint: Checkpoint | None, origin: Path | None = None) -> int:
    """Train in processes of their own and say how it ended. Returns the exit code.

    origin: of a training that begins, what :func:`check_origin` has found.
    """
    remove_partials(run.checkpoints_dir)  # of a start that was killed
    run = run.begin(words_of(Process.this()))
    began, end = time.monotonic(), "crashed"
    try:
        code = local.train(run, config.trainer.devices, checkpoint.path if checkpoint else None, origin)
        end = {0: "finished", EXIT_GO_ON: "saved"}.get(code, "stopped at once")
    except LongseqError as error:
        end = f"error {error}"
        raise
    finally:
        starts.note_end(run.starts_dir, run.start, end)
        remove_partials(run.checkpoints_dir)
    newest = run.last_good()
    where = (
        f"step {newest.position.step} of {config.trainer.max_steps}, {newest.path}" if newest else "no checkpoint yet"
    )
    print(f"{_HOW_IT_ENDED.get(code, 'Stopped at once')}: {where}")
    start = checkpoint.position.step if checkpoint else 0
    print("\n".join(results(run, start, time.monotonic() - began)))
    if code == 0:
        print(f"Evaluate it:   longseq evaluate {as_typed(run.path)}")
        print(f"Look at it:    tensorboard --logdir {as_typed(run.tensorboard_dir)}")
    elif newest:
        print(f"Go on with:    {run.resume_command}")
    return code


_HOW_IT_ENDED = {0: "Finished", EXIT_GO_ON: "Stopped and saved"}


def results(run: Run, start: int, seconds: float) -> list[str]:
    """What came of a start at step ``start`` that took so long, and where it is: lines for people."""
    curves = read_curves(run.tensorboard_dir) if run.tensorboard_dir.exists() else {}
    lines = []
    speeds = {step: rate for step, rate in curves.get("train/tokens_per_second", {}).items() if step > start}
    # Steps after the last point in the curves, and after the last checkpoint, were trained, too.
    progress = starts.read_progress(run.starts_dir, run.start) if run.start else None
    saved = [checkpoint.step for checkpoint in run.checkpoints()]
    last = max([progress.step if progress else start, *(step for step in [*speeds, *saved] if step > start)])
    if last > start:
        speed = f", {sum(speeds.values()) / len(speeds):,.0f} tokens/s" if speeds else ""
        steps = f"{last - start:,} step{'s' if last - start > 1 else ''}"
        lines.append(f"Trained:       {steps} in {_duration(seconds)}{speed}")
    valid = curves.get("valid/loss", {})
    if valid:
        best = min(valid, key=lambda step: valid[step])
        perplexity, accuracy = (curves[f"valid/{name}"][best] for name in ("perplexity", "accuracy"))
        quality = f"loss {valid[best]:.4f}, perplexity {perplexity:.2f}, accuracy {accuracy:.1%}"
        lines.append(f"Best on valid: {quality}, at step {best}")
    if saved:
        steps = f"step{'s' if len(saved) > 1 else ''} {', '.join(map(str, saved))}"
        lines.append(f"Checkpoints:   {steps}, in {as_typed(run.checkpoints_dir)}")
    found = len(list(run.evaluations_dir.glob("*.json")))
    if found:
        lines.append(f"Evaluations:   {found}, in {as_typed(run.evaluations_dir)}")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


# What the weights or the order of the samples depend on, and a run keeps for its life.
FIXED = (
    *("run.name", "run.dir", "run.seed"),
    *("model.preset", "model.dim", "model.depth", "model.heads", "model.ffn_dim", "model.objective"),
    *(
        "model.init_from",
        "model.position",
        "model.max_positions",
        "model.rotary_base",
        "model.norm",
        "model.norm_eps",
        "model.embedding_norm",
    ),
    *("model.attention_bias", "model.head", "model.mask_scaling"),
    *("attention.qk_norm", "data.train", "data.valid", "data.test", "data.valid_fraction", "data.test_fraction"),
    *("data.split_by", "data.reverse_complement", "data.length", "data.packing", "data.batch_tokens"),
    *("data.shuffle_buffer", "data.later_epochs", "data.clusters"),
    *("data.format", "data.tokenizer", "data.column", "data.part_bytes", "data.image_size", "data.reset", "data.crop"),
)


_SIZES = ("dim", "depth", "heads", "ffn_dim")
_FILES = ("data.train", "data.valid", "data.test")


def refuse_changes(before: Config, after: Config, run: Run, keys: Sequence[str]) -> None:
    """Refuse overrides that would make another experiment of a run.

    Raises:
        RunError: naming the key and both values.
    """
    for key in keys:
        section, _, name = key.partition(".")
        old, new = (_value(config, section, name) for config in (before, after))
        if old != new:
            if key == "data.train" and unweighted(old) == unweighted(new):
                continue
            if key in _FILES and _only_moved(run, name, before, after):
                continue
            moved = ", whose content is another" if key in _FILES else ""
            raise RunError(
                f"{key}={shown(new)}: the run {run.path} was started with {shown(old)}{moved}, and keeps it. "
                "Start another run with `longseq fit` for another experiment."
            )


def _only_moved(run: Run, split: str, before: Config, after: Config) -> bool:
    names = [[source["name"] for source in config.data.sources(split)] for config in (before, after)]
    old, new = before.data.files(split), after.data.files(split)
    return names[0] == names[1] and run.only_moved(split, old, new, [identity_of(source) for source in new])


def _value(config: Config, section: str, name: str) -> object:
    """The value of a key, and where it is null the preset's: naming the size that a model has changes nothing."""
    value = getattr(getattr(config, section), name)
    if value is None and section == "model" and name in _SIZES:
        return getattr(PRESETS[config.model.preset], name)
    return value


def note_weights(before: Config, after: Config, samples: int) -> None:
    """Write down which weights the sources had until now, where they change after so many samples."""
    data = after.data
    data.reweighted = reweighted(before.data.sources("train"), data.sources("train"), before.data.reweighted, samples)


def check_precision(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to go on in another precision.

    Raises:
        RunError: naming both.
    """
    trained, wanted = checkpoint.position.precision, config.trainer.precision
    if trained != wanted:
        raise RunError(
            f"{checkpoint.path}: trained with trainer.precision={trained}; in {wanted} it would be another experiment: "
            f"go on with {trained}."
        )


def check_data(config: Config, begun: bool = False) -> None:
    """Look at the beginning of every file before anything is made, and say what letters are read as X.

    begun: their blocks are being made (data.begin_reading), and parsed nowhere else.

    Raises:
        DataError: for a file that cannot be trained on.
    """
    for split in SPLITS:
        for where in sources_of(config, split):
            name = f"data.{split}" + (f" ({where.name})" if where.name else "")
            if where.corpus:
                _say_corpus(name, where.corpus, split)
            elif where.own and where.paths:
                _check_files(config, name, where, split, begun and split in read_while_training(config))


def _say_corpus(name: str, path: str, split: str) -> None:
    corpus = Corpus.open(path, split)
    unit = UNITS.get(corpus.vocabulary.name, "tokens")
    print(f"{name}: {len(corpus):,} records, {corpus.tokens:,} {unit} of {path}", file=sys.stderr)
    if read_manifest(Path(path)).report.get("nucleotides"):
        print(f"longseq: warning: {name}: {NUCLEOTIDES_SENTENCE}", file=sys.stderr)


def _check_files(config: Config, name: str, where: Where, split: str, begun: bool) -> None:
    data, read = config.data, reading(config)
    # Shares are held out of the training files alone, and only where no files were named for that split.
    shares = split == "train"
    report = survey(
        read,
        where.paths,
        strict=data.strict,
        rule=SplitRule(
            data.valid_fraction if shares and not data.valid else 0.0,
            data.test_fraction if shares and not data.test else 0.0,
            data.split_by if read.has_residues else "id",
        ),
        cache=cache_folder(data.cache) if begun else None,
    )
    if shares and report.complete:
        _refuse_empty_splits(config, name, report)
    found = report.identifiers
    if shares and found.again and found.by == "sequence":
        print(
            f"longseq: note: {name}: {found.again:,} of {report.records:,} records have an identifier that "
            f"came before (the first: '{found.first_again[:40]}'): a hash of the sequences decides the splits.",
            file=sys.stderr,
        )
    elif shares and found.repeated:
        print(
            f"longseq: warning: {name}: {report.records:,} records have {len(report.identifiers.places):,} "
            "different identifiers, which decide their splits: the splits may be uneven, or empty.",
            file=sys.stderr,
        )
    say(name, report)


def say(name: str, report: Report) -> None:
    """What a look at some data found, and which letters were read as X, on stderr."""
    extent = "" if report.complete else " at the beginning of the files"
    print(f"{name}: {report.records:,} records, {report.residues:,} {report.unit}{extent}", file=sys.stderr)
    if report.warning:
        print(f"longseq: warning: {name}: {report.warning}", file=sys.stderr)
    if report.unknown:
        letters = ", ".join(f"{letter!r} × {count:,}" for letter, count in report.unknown.most_common(5))
        first = f"; the first in {report.notes[0].partition(' is read as')[0]}" if report.notes else ""
        print(
            f"longseq: warning: letters outside the alphabet are read as {report.other}: {letters}{first}. "
            "Refuse them with data.strict=true.",
            file=sys.stderr,
        )


def _refuse_empty_splits(config: Config, name: str, report: Report) -> None:
    """A split that turns out empty at the first validation would cost the steps before it."""
    data, found = config.data, report.identifiers
    shares = 0.0 if data.valid else data.valid_fraction, 0.0 if data.test else data.test_fraction
    validates = bool(config.trainer.valid_every) and not data.valid
    if not found.splits["train"]:
        raise DataError(f"{name}: {found.lost('train', *shares, otherwise='name files in data.valid and data.test')}.")
    if validates and not found.splits["valid"]:
        otherwise = "name files in data.valid, or validate never (trainer.valid_every=0)"
        raise DataError(f"{name}: {found.lost('valid', *shares, otherwise=otherwise)}.")
    if shares[1] and not found.splits["test"]:
        otherwise = "name files in data.test, when training or later with `longseq evaluate RUN data.test=FILE`"
        print(f"longseq: note: {name}: {found.lost('test', *shares, otherwise=otherwise)}.", file=sys.stderr)


def check_origin(config: Config) -> Path | None:
    """Say what differs from the model whose weights a training begins with.

    Returns:
        the checkpoint or exported folder that has them, checksums looked at; None where a training begins with none.

    Raises:
        LongseqError: if there is no such model, or it reads other tokens.
    """
    if not config.model.init_from:
        return None
    try:
        source = find(Path(config.model.init_from))
    except USER_ERRORS as error:
        raise ConfigError(f"model.init_from: {error}") from None
    own, theirs = vocabulary(config), source.vocabulary
    # A run's own copy of a tokenizer has another path: its ids are what counts.
    if replace(own, name="") != replace(theirs, name="") or own.name.endswith(".json") != theirs.name.endswith(".json"):
        raise ConfigError(
            f"model.init_from={config.model.init_from}: a model of {theirs.size:,} {theirs.name} tokens, but the data "
            f"are read as {own.size:,} {own.name} tokens: give it data and data.tokenizer that fit the model."
        )
    words = [
        f"{name} {old} → {new}"
        for name, old, new in (
            ("objective", source.config.model.objective, config.model.objective),
            ("attention", _attention(source.config), _attention(config)),
            ("rotary_base", source.config.model.rotary_base, config.model.rotary_base),
        )
        if old != new
    ]
    changes = f", and trained on with {', '.join(words)}" if words else ""
    print(f"weights of {source.folder}, step {source.step}{changes}", file=sys.stderr)
    return source.folder


def _attention(config: Config) -> str:
    attention = config.attention
    return attention.kind if attention.kind == "exact" else f"{attention.kind} {attention.kernel}"


def say_schedule(before: Config, after: Config, step: int) -> None:
    """Say where a run that goes on at ``step`` gets another learning rate than was planned."""
    change = schedule_change(before, after, step)
    if change:
        print(change, file=sys.stderr)


def check_disk(config: Config, folder: Path) -> None:
    """Refuse to start where the checkpoints of a run in ``folder`` would not fit.

    Raises:
        LongseqError: with what is needed and what is free.
    """
    written = len(checkpoints_in(folder / "checkpoints"))  # on the disk already, for a resume
    while not folder.exists():
        folder = folder.parent
    weights = config.performer_spec(vocabulary(config).size).parameter_count
    settings = config.trainer
    kept = settings.keep_checkpoints + settings.keep_best
    kept += settings.max_steps // settings.keep_every if settings.keep_every else 0
    more = max(1, kept + 1 - written)
    needed = more * expected_bytes(weights, ema=settings.ema_decay > 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LongseqError(
            f"{folder}: {free / 2**20:,.0f} MiB free, but {more} more checkpoints (trainer.keep_checkpoints="
            f"{settings.keep_checkpoints}, keep_best={settings.keep_best}, keep_every={settings.keep_every}, and one "
            f"being written) need about {needed / 2**20:,.0f} MiB: make room, keep fewer, or set run.dir to another "
            "disk."
        )
