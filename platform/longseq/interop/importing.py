"""The weights of Hugging Face Transformers as those of a Performer: ESM-2 (EsmForMaskedLM) and BERT-like models (BERT,
ProtBERT: BertForMaskedLM). transformers itself is not needed.

With ``attention.kind=exact`` the model that comes out computes what they compute. Whose attention it is decides nothing
else: with ``favor`` it is the Performer to fine-tune (Choromanski et al. 2020, section 4.3).

What differs from theirs and does not change the function: queries, keys and values are one matrix; the logits have a
matrix of their own, which begins as the embedding that they are tied to; BERT's token type 0 is added to the positions.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longseq.config.merging import config_of
from longseq.config.schema import Config
from longseq.errors import LongseqError, RunError
from longseq.interop.foreign_vocabulary import ForeignVocabulary
from longseq.models.performer import PerformerLM
from longseq.models.weight_files import check_finite, read_weights
from longseq_data.os_errors import explained

# Of other tasks, or computed from the sizes.
_NOT_NEEDED = (
    "pooler.",
    "contact_head.",
    "position_ids",
    "inv_freq",
    "seq_relationship.",
    "cls.predictions.decoder.bias",
)


@dataclass(frozen=True)
class Imported:
    """A state dict of :class:`PerformerLM` and the configuration that it belongs to."""

    state: dict[str, Tensor]
    config: Config
    vocabulary: ForeignVocabulary


@dataclass
class _Weights:
    """Their tensors by name; what has been taken is known, so that nothing is left out unseen."""

    folder: Path
    tensors: Mapping[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def __call__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise RunError(f"{self.folder}: has no weight {name}, so its files are those of another architecture.")
        self.taken.add(name)
        return self.tensors[name].float()

    def get(self, name: str) -> Tensor | None:
        return self(name) if name in self.tensors else None

    def linear(self, theirs: str, ours: str) -> dict[str, Tensor]:
        """A linear map or a norm with its bias."""
        return {f"{ours}.{part}": self(f"{theirs}.{part}") for part in ("weight", "bias")}

    def qkv(self, theirs: str, ours: str) -> dict[str, Tensor]:
        parts = ("query", "key", "value")
        return {
            f"{ours}.{kind}": torch.cat([self(f"{theirs}.{part}.{kind}") for part in parts])
            for kind in ("weight", "bias")
        }

    def refuse_rest(self) -> None:
        rest = sorted(
            name for name in self.tensors if name not in self.taken and not any(part in name for part in _NOT_NEEDED)
        )
        if rest:
            more = f" and {len(rest) - 1} more weights" if len(rest) > 1 else ""
            raise RunError(
                f"{self.folder}: {rest[0]}{more} would be left out: this is a variant that longseq does not know."
            )


def import_transformer(folder: Path) -> Imported:
    """Read a Hugging Face folder.

    Raises:
        LongseqError: in one sentence, for a folder that is none, or of an architecture that is not known.
    """
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        kind = str(given["model_type"])
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise RunError(f"{explained(error, path, 'cannot be read')}.") from None
        what = "it has no config.json" if folder.exists() else "no such folder"
        raise RunError(f"{folder}: {what}; give a Hugging Face model folder of ESM-2 or BERT.") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not the description of a Hugging Face model (it names no model_type).") from None
    if kind not in _FAMILIES:
        raise LongseqError(
            f"{folder}: a model of type {kind}; longseq imports {' and '.join(_FAMILIES)} (ESM-2, BERT, ProtBERT)."
        )
    weights = _Weights(folder, _tensors(folder))
    vocabulary = ForeignVocabulary.read(folder, given)
    try:
        sections, state = _FAMILIES[kind](given, weights)
    except KeyError as error:
        raise RunError(f"{path}: has no {error.args[0]}, which a model of type {kind} needs.") from None
    weights.refuse_rest()
    _take_rows(state, vocabulary, folder)
    sections["data"] = {"tokenizer": vocabulary.tokens, "packing": "crop"}
    config = config_of(sections, str(path))
    expected = _shapes(config, vocabulary.size)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise RunError(
                f"{folder}: the weights for {name} are {found.get(name, 'missing')}, and config.json wants {shape}."
            )
    return Imported(state, config, vocabulary)


def _shapes(config: Config, size: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = PerformerLM(config.performer_spec(size))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _esm(given: dict[str, Any], w: _Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _require(w.folder, given, "hidden_act", "gelu", absent="gelu")
    _require(w.folder, given, "is_folding_model", False, absent=False)
    _require(w.folder, given, "is_decoder", False, absent=False)
    sections = _sections(w.folder, given)
    model, state = sections["model"], dict[str, Tensor]()
    before = bool(given.get("emb_layer_norm_before"))
    model |= {"norm": "pre", "embedding_norm": before, "mask_scaling": bool(given.get("token_dropout"))}
    state["embedding.weight"] = w("esm.embeddings.word_embeddings.weight")
    if given.get("position_embedding_type", "absolute") == "absolute":
        # They count from the padding's index on.
        rows = w("esm.embeddings.position_embeddings.weight")[_whole(w.folder, given, "pad_token_id", 0) + 1 :]
        state["positions.weight"] = rows
        model |= {"position": "learned", "max_positions": len(rows)}
    else:
        _require(w.folder, given, "position_embedding_type", "rotary", absent="rotary")
    if before:
        state |= w.linear("esm.embeddings.layer_norm", "embedding_norm")
    for layer in range(model["depth"]):
        theirs, ours = f"esm.encoder.layer.{layer}", f"blocks.{layer}"
        state |= w.linear(f"{theirs}.attention.LayerNorm", f"{ours}.attention_norm")
        state |= w.qkv(f"{theirs}.attention.self", f"{ours}.attention.qkv")
        state |= w.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        state |= w.linear(f"{theirs}.LayerNorm", f"{ours}.mlp_norm")
        state |= _mlp(w, theirs, ours)
    state |= w.linear("esm.encoder.emb_layer_norm_after", "norm")
    state |= w.linear("lm_head.dense", "head.dense") | w.linear("lm_head.layer_norm", "head.norm")
    decoder = w.get("lm_head.decoder.weight")
    state["head.logits.weight"] = state["embedding.weight"] if decoder is None else decoder
    state["head.logits.bias"] = w("lm_head.bias")
    return sections, state


def _bert(given: dict[str, Any], w: _Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _require(w.folder, given, "hidden_act", "gelu", absent="gelu")
    _require(w.folder, given, "position_embedding_type", "absolute", absent="absolute")
    _require(w.folder, given, "is_decoder", False, absent=False)
    sections = _sections(w.folder, given)
    model, state = sections["model"], dict[str, Tensor]()
    embeddings = "bert.embeddings"
    state["embedding.weight"] = w(f"{embeddings}.word_embeddings.weight")
    types = w(f"{embeddings}.token_type_embeddings.weight")
    state["positions.weight"] = w(f"{embeddings}.position_embeddings.weight") + types[0]
    model |= {"norm": "post", "embedding_norm": True}
    model |= {"position": "learned", "max_positions": len(state["positions.weight"])}
    state |= w.linear(f"{embeddings}.LayerNorm", "embedding_norm")
    for layer in range(model["depth"]):
        theirs, ours = f"bert.encoder.layer.{layer}", f"blocks.{layer}"
        state |= w.qkv(f"{theirs}.attention.self", f"{ours}.attention.qkv")
        state |= w.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        state |= w.linear(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        state |= _mlp(w, theirs, ours)
        state |= w.linear(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
    head = "cls.predictions"
    state |= w.linear(f"{head}.transform.dense", "head.dense") | w.linear(f"{head}.transform.LayerNorm", "head.norm")
    decoder = w.get(f"{head}.decoder.weight")
    state["head.logits.weight"] = state["embedding.weight"] if decoder is None else decoder
    state["head.logits.bias"] = w(f"{head}.bias")
    return sections, state


_FAMILIES = {"esm": _esm, "bert": _bert}


def _mlp(w: _Weights, theirs: str, ours: str) -> dict[str, Tensor]:
    return w.linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.0") | w.linear(
        f"{theirs}.output.dense", f"{ours}.mlp.2"
    )


def _sections(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What both families have in common."""
    model = {
        "dim": _whole(folder, given, "hidden_size", 1),
        "depth": _whole(folder, given, "num_hidden_layers", 1),
        "heads": _whole(folder, given, "num_attention_heads", 1),
        "ffn_dim": _whole(folder, given, "intermediate_size", 1),
        "objective": "masked",
        "norm_eps": given.get("layer_norm_eps", 1e-12),
        "attention_bias": True,
        "head": "transform",
    }
    # No redraw while nothing is trained; exact attention is what the weights were made for.
    return {"model": model, "attention": {"kind": "exact"}}


def _whole(folder: Path, given: dict[str, Any], name: str, least: int) -> int:
    value = given[name]
    if not isinstance(value, int) or value < least:
        raise RunError(f"{folder}: {name}={value} in config.json, which is no whole number from {least} on.")
    return value


def _require(folder: Path, given: dict[str, Any], name: str, wanted: object, *, absent: object) -> None:
    value = given.get(name, absent)
    if value != wanted:
        raise LongseqError(f"{folder}: {name}={value} in config.json; longseq imports models with {name}={wanted}.")


def _take_rows(state: dict[str, Tensor], vocabulary: ForeignVocabulary, folder: Path) -> None:
    """Of embedding and logits, the rows of the tokens that the model has here, in their order."""
    rows = torch.tensor(vocabulary.rows)
    for name in ("embedding.weight", "head.logits.weight", "head.logits.bias"):
        if int(rows.max()) >= len(state[name]):
            raise RunError(
                f"{folder}: the vocabulary has {int(rows.max()) + 1} tokens or more, and the weights are those of "
                f"{len(state[name])}."
            )
        state[name] = state[name][rows]


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, of safetensors files or of PyTorch's (without unpickling code)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if single.is_file():
        tensors = read_weights(single)
    elif index.is_file():
        tensors = {name: tensor for part in _parts(index) for name, tensor in read_weights(folder / part).items()}
    elif pickled.is_file():
        tensors = _unpickled(pickled)
    else:
        raise RunError(f"{folder}: holds no weights (model.safetensors or pytorch_model.bin).")
    # Names of older releases.
    renamed = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): t for name, t in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if tensor.is_floating_point()}


def _parts(index: Path) -> Iterable[str]:
    """The files that the weights are spread over."""
    try:
        return sorted({str(part) for part in json.loads(index.read_text())["weight_map"].values()})
    except OSError as error:
        raise RunError(f"{explained(error, index, 'cannot be read')}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{index}: names no files of weights, so it was damaged: copy it again.") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    kinds = (EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{explained(error, path, 'cannot be read')}.") from None
    except (*kinds, pickle.UnpicklingError):
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise RunError(
            f"{path}: holds no plain weights by name, or was damaged; nothing else is unpickled. Copy it again, or "
            "give the model's safetensors."
        )
    check_finite(tensors, path)
    return tensors
