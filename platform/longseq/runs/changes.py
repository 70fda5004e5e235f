"""What a run keeps for its life, and what may change when it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from longseq.config.finetune import FinetuneConfig
from longseq.config.merging import shown
from longseq.config.schema import Config
from longseq.config.sources import reweighted, unweighted
from longseq.data import SPLITS
from longseq.errors import RunError
from longseq.models.presets import BLOCK_KEYS, PRESETS
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run
from longseq_data.prepare.identity import identity_of

# What the weights or the order of the samples depend on, and a run keeps for its life.
FIXED = (
    *("run.name", "run.dir", "run.branch", "run.seed"),
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
    *(f"model.{name}" for name in BLOCK_KEYS),
    *("optim.name", "optim.base_dim"),
    *("attention.qk_norm", "data.train", "data.valid", "data.test", "data.valid_fraction", "data.test_fraction"),
    *("data.split_by", "data.reverse_complement", "data.reverse", "data.fim_rate", "data.length", "data.packing"),
    "data.batch_tokens",
    *("data.shuffle_buffer", "data.later_epochs", "data.clusters"),
    *(f"finetune.{item.name}" for item in fields(FinetuneConfig) if item.name not in ("table", "patience")),
    *("data.format", "data.tokenizer", "data.column", "data.part_bytes", "data.image_size", "data.reset", "data.crop"),
)


_SIZES = ("dim", "depth", "heads", "ffn_dim")
_FILES = ("data.train", "data.valid", "data.test", "data.clusters")


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
            named = key in _FILES and _names(before, name) == _names(after, name)
            if named and _only_moved(run, name, before, after):
                continue
            raise RunError(
                f"{key}={shown(new)}: the run {run.path} was started with {shown(old)}"
                f"{', whose content is another' if named else ''}, and keeps it. "
                "Start another run with `longseq fit` for another experiment."
            )


def _names(config: Config, key: str) -> list[tuple[str, list[str]]]:
    """What the sources of a key are called, and their files wherever they lie."""
    data = config.data
    sources = data.sources(key) if key in SPLITS else []
    named = [(source["name"], source["path"]) for source in sources] or [("", data.files(key))]
    return [(name, [Path(path).name for path in paths]) for name, paths in named]


def _only_moved(run: Run, split: str, before: Config, after: Config) -> bool:
    old, new = before.data.files(split), after.data.files(split)
    return run.only_moved(split, old, new, [identity_of(source) for source in new])


def _value(config: Config, section: str, name: str) -> object:
    """The value of a key, and where it is null what that means: naming what a run has changes nothing."""
    value = getattr(getattr(config, section), name)
    if value is None and section == "model" and name in _SIZES:
        return getattr(PRESETS[config.model.preset], name)
    if (section, name) == ("attention", "qk_norm") or (section == "model" and name in BLOCK_KEYS):
        return getattr(config.block, name)
    return config.fim_rate if (section, name) == ("data", "fim_rate") else value


def note_weights(before: Config, after: Config, samples: int, waits: bool = False) -> None:
    """Write down which weights the sources had until now, where they change after so many samples.

    waits: for another job, which may train on until then.

    Raises:
        RunError: for other weights where it waits.
    """
    data, had = after.data, before.data.sources("train")
    weights = [[source["weight"] for source in sources] for sources in (had, data.sources("train"))]
    if waits and weights[0] != weights[1]:
        raise RunError(
            f"data.train: the weights were {weights[0]} and are {weights[1]}: others hold from the sample on where "
            "this job begins, which nobody knows while it waits (--dependency): submit it once the other job has ended."
        )
    data.reweighted = reweighted(had, data.sources("train"), before.data.reweighted, samples)


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
