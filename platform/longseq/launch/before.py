"""Checks before a start: the weights that a training begins with, and room for its checkpoints."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from longseq.config.schema import Config
from longseq.data import vocabulary
from longseq.errors import USER_ERRORS, ConfigError, LongseqError
from longseq.runs.checkpoint import checkpoints_in, expected_bytes
from longseq.trained_model import find
from longseq.training.schedule import schedule_change
from longseq_data.vocabulary import InfillVocabulary


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
        source = find(config.model.init_from)
        source.refuse_labels()
    except USER_ERRORS as error:
        raise ConfigError(f"model.init_from: {error}") from None
    own, theirs = vocabulary(config), source.vocabulary
    if isinstance(own, InfillVocabulary) != isinstance(theirs, InfillVocabulary):
        old, new = source.config.model.objective, config.model.objective
        raise ConfigError(
            f"model.init_from={config.model.init_from}: a model of model.objective={old} is not trained on with "
            f"model.objective={new}: fim has three more tokens, which mark prefix, suffix and middle; take "
            f"model.objective={'fim' if old == 'fim' else 'causal or masked'}, or leave model.init_from out."
        )
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
    return config.performer_spec(vocabulary=2).in_words(
        lambda layer: layer.kind if layer.kind == "exact" else f"{layer.kind} {layer.kernel}"
    )


def check_benchmarks(config: Config) -> None:
    """Read what trainer.benchmarks names.

    Raises:
        ConfigError: naming the key, and of a file its line.
    """
    if config.trainer.benchmarks:  # which take their time to import
        from longseq.training.benchmarks import watched

        for each in watched(config):
            if each.absent:
                print(f"longseq: warning: benchmark {each.own.name}: {each.absent}", file=sys.stderr, flush=True)


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


def say_schedule(before: Config, after: Config, step: int) -> None:
    """Say where a run that goes on at ``step`` gets another learning rate than was planned."""
    change = schedule_change(before, after, step)
    if change:
        print(change, file=sys.stderr)


def say_cpus(config: Config, gpus: bool) -> None:
    """Say on stderr that a job which asks for no ``gpus`` does without, where nobody has asked for that."""
    if config.trainer.accelerator == "auto" and not gpus:
        print(
            "longseq: warning: trainer.accelerator=auto, but the job asks for no GPU (--gpus-per-node, or "
            "gpus_per_node of the site's profile): it works on CPUs.",
            file=sys.stderr,
        )
