"""The model code that travels with an exported folder, for transformers where longseq is not installed. No torch here.

The code is the files ``FILES`` of this room, as they are. What it makes its network of is ``performer`` in config.json.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from longseq.attention.options import AttentionOptions
from longseq.errors import LongseqError
from longseq.models.spec import PerformerSpec

FILES = ("modeling_longseq.py", "performer_longseq.py", "favor_longseq.py")
_CLASSES = {
    "AutoModel": "LongseqModel",
    "AutoModelForSequenceClassification": "LongseqForSequenceClassification",
    "AutoModelForTokenClassification": "LongseqForTokenClassification",
}
_LANGUAGE = {
    "causal": {"AutoModelForCausalLM": "LongseqForCausalLM"},
    "masked": {"AutoModelForMaskedLM": "LongseqForMaskedLM"},
}
_LANGUAGE["fim"] = _LANGUAGE["causal"]

# What the code computes: the fields of its Layer and of its Sizes, but for those that ``performer`` derives.
_LAYER = (
    "kind", "kernel", "features", "window", "qk_norm", "learned_share", "learned_decay", "forget_gate", "projection",
    "learned_covariance",
)  # fmt: skip
_SIZES = (
    "dim", "heads", "causal", "dropout", "position", "max_positions", "rotary_base", "norm", "norm_kind", "norm_eps",
    "embedding_norm", "attention_bias", "bias", "head", "mask_scaling", "ffn", "conv", "value_residual", "seed",
)  # fmt: skip
_DERIVED = ("vocabulary", "depth", "ffn_dim", "layers", "redraw_every")
# How a machine computes it, and no property of the model.
_MACHINE = ("backend", "activation_checkpointing", "activation_offload", "sequence_tile", "carry")


def auto_map(objective: str) -> dict[str, str]:
    """The classes that transformers' Auto classes find in the code, by the model's objective."""
    classes = {"AutoConfig": "LongseqConfig", **_CLASSES, **_LANGUAGE[objective]}
    return {auto: f"{FILES[0].removesuffix('.py')}.{name}" for auto, name in classes.items()}


def performer(spec: PerformerSpec, step: int) -> dict[str, Any]:
    """All that the code makes its network of, after ``step`` optimiser steps.

    Raises:
        LongseqError: naming a key that the code knows nothing of, and that is not off.
    """
    own = {field.name for field in dataclasses.fields(AttentionOptions)}
    _refuse_unknown(spec, {*_SIZES, *_DERIVED, *_MACHINE, *own}, "model")
    for options in spec.plan:
        _refuse_unknown(options, {*_LAYER, *_SIZES, *_DERIVED, *_MACHINE}, "attention")
    return {
        **{name: getattr(spec, name) for name in _SIZES},
        "hidden": spec.hidden,
        "layers": [{name: getattr(options, name) for name in _LAYER} for options in spec.plan],
        "draw": spec.draw_at(max(0, step - 1)),
    }


def copy_code(folder: Path) -> None:
    """Put the code into an exported folder."""
    for name in FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def _refuse_unknown(options: AttentionOptions, known: set[str], section: str) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in known and value != field.default:
            raise LongseqError(
                f"{section}.{field.name}={value}: the model code that travels with an exported folder does not compute "
                "it: export with --no-code (code=False), and transformers opens the folder where longseq is installed."
            )
