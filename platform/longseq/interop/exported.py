"""An exported folder: a model as Hugging Face lays it out, with what longseq must know next to it. No torch here.

    config.json           sizes under Hugging Face's names; the sections model, attention and data.tokenizer; the step
    model.safetensors     the weights, fp32 or bf16, their names behind "model."
    tokenizer.json, tokenizer_config.json, special_tokens_map.json
    generation_config.json   of a causal model
    *_longseq.py          the model code: see longseq.interop.travelling
    README.md             the model card

It is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longseq.config.merging import config_of
from longseq.config.schema import Config
from longseq.errors import LongseqError, RunError, place_of_errors
from longseq_data.vocabulary import Vocabulary

MODEL_TYPE = "longseq"
FORMAT = 1
ARCHITECTURES = {"causal": "LongseqForCausalLM", "masked": "LongseqForMaskedLM", "fim": "LongseqForCausalLM"}
SECTIONS = ("run", "model", "attention", "data")
TOKENIZER = "tokenizer.json"
# Keys that say how a machine computes, or where a run began: no property of the model.
_NOT_ITS_OWN = ("preset", "init_from", "backend", "sequence_tile")
_DATA = ("tokenizer", "length", "packing", "reset", "crop", "image_size", "reverse")


@dataclass(frozen=True)
class Exported:
    """What an exported folder says of its model."""

    folder: Path
    sections: dict[str, dict[str, Any]]
    step: int

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    def config(self, overrides: tuple[str, ...] = ()) -> Config:
        """The model's configuration, without data; and overrides on top of it.

        Raises:
            ConfigError: for overrides that do not fit.
        """
        sections = {name: dict(values) for name, values in self.sections.items()}
        if sections["data"]["tokenizer"] == TOKENIZER:
            sections["data"]["tokenizer"] = str((self.folder / TOKENIZER).absolute())
        return config_of(sections, str(self.folder / "config.json"), overrides)


def is_exported(folder: Path) -> bool:
    """Whether this is a folder of `longseq export` or `longseq import`."""
    return _model_type(folder) == MODEL_TYPE


def read(folder: Path) -> Exported:
    """Open an exported folder.

    Raises:
        RunError: if it is none, or of another version's format.
    """
    path = folder / "config.json"
    found = _model_type(folder)
    if found != MODEL_TYPE:
        what = f"a Hugging Face model of type {found}" if found else "no exported model (it has no config.json)"
        how = " `longseq import` reads ESM-2 and BERT-like ones." if found else " `longseq export` makes them."
        raise RunError(f"{folder}: {what}.{how}")
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = (content.get("architectures") or [""])[0]
    if kind.startswith("Longseq") and kind not in ARCHITECTURES.values():
        raise RunError(
            f"{folder}: a {kind}, saved by transformers, and no language model; give the folder that it began with, or "
            f"save it as one of {', '.join(dict.fromkeys(ARCHITECTURES.values()))}."
        )
    try:
        ours = content["longseq"]
        if ours["format"] != FORMAT:
            raise RunError(
                f"{path}: format {ours['format']}, this version of longseq reads {FORMAT}: export the model again."
            )
        sections = {name: dict(ours[name]) for name in SECTIONS}
        exported = Exported(folder.resolve(), sections, int(ours["step"]))
        _ = sections["data"]["tokenizer"]
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path}: entries of longseq are missing or misspelt: export the model again.") from None
    if not exported.weights.is_file():
        raise RunError(f"{exported.weights}: missing, so this exported folder cannot be used: export the model again.")
    return exported


def sections_of(config: Config) -> dict[str, dict[str, Any]]:
    """The part of a configuration that is the model's own, sizes filled in."""
    spec = config.performer_spec(vocabulary=2)
    sizes = {"dim": spec.dim, "depth": spec.depth, "heads": spec.heads, "ffn_dim": spec.ffn_dim}
    block = asdict(config.block)
    attention = {**asdict(config.attention), "qk_norm": block.pop("qk_norm")}
    model = {**asdict(config.model), **sizes, **block}
    return {
        "run": {"seed": config.run.seed},
        "model": {name: value for name, value in model.items() if name not in _NOT_ITS_OWN},
        "attention": {name: v for name, v in attention.items() if name not in _NOT_ITS_OWN},
        "data": {name: getattr(config.data, name) for name in _DATA},
    }


def description(config: Config, tokens: Vocabulary, step: int) -> dict[str, Any]:
    """config.json of a model after ``step`` optimiser steps (0: none, as of imported weights)."""
    spec, sections = config.performer_spec(tokens.size), sections_of(config)
    sections["data"]["tokenizer"] = TOKENIZER if tokens.name.endswith(".json") else tokens.name
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURES[config.model.objective]],
        "vocab_size": tokens.size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.hidden,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "mask_token_id": tokens.mask,
        "tie_word_embeddings": False,
        "longseq": {"format": FORMAT, "step": step, **sections},
    }


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name ``out`` when the block ends well and goes when it does not.

    Raises:
        LongseqError: if ``out`` exists.
    """
    if out.exists() or out.is_symlink():
        raise LongseqError(f"{out}: exists already, and is not overwritten: remove it, or choose another name.")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with place_of_errors(out):
            yield aside
            if out.exists():
                raise LongseqError(f"{out}: has come into being meanwhile, and is not overwritten: take another name.")
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _model_type(folder: Path) -> str | None:
    """Of a folder's config.json; None where there is none.

    Raises:
        RunError: if it is no JSON, or not a mapping.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content.get("model_type", "unknown"))
    except (ValueError, AttributeError):
        raise RunError(f"{path}: not the JSON description of a model, so it was damaged.") from None
