"""Write an exported folder (see longseq.interop.exported): weights, description, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longseq import __version__
from longseq.config.schema import Config
from longseq.errors import LongseqError
from longseq.interop import exported, travelling
from longseq.interop.model_card import model_card
from longseq.interop.tokenizer_files import write_json, write_tokenizer
from longseq.models.spec import EXPORTED
from longseq.models.weights import save_weights
from longseq.trained_model import Source, find
from longseq_data.vocabulary import Vocabulary


def export(
    target: str | Path | Source,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    dtype: str = "float32",
    code: bool = True,
) -> Path:
    """Make the folder ``out`` of a trained model.

    Args:
        target: a run folder, a checkpoint, or what ``longseq.find`` returned for one of these.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: the running mean of the weights instead of the last ones.
        dtype: of the weights, "float32" or "bfloat16".
        code: put the model code next to the weights, by which transformers opens the folder without longseq.

    Returns:
        the folder.

    Raises:
        LongseqError: if ``out`` exists, the weights are not those of the configured architecture, or the code does not
            compute what the model does.
    """
    out = Path(out)
    refuse_existing(out)
    source = find(target, overrides, ema=ema)
    if code:
        travelling.performer(source.spec, source.step)  # what can be refused is, before the weights are read
    state = source.load(device="cpu").state_dict()
    card = model_card(source, code=code)
    of, first = (source.config, source.vocabulary, source.step), source.begins
    write_folder(out, state, *of, card, first=first, dtype=dtype, code=code)
    return out


def refuse_existing(out: Path) -> None:
    """Raise LongseqError where a folder is to be made and something has its name."""
    if out.exists():
        raise LongseqError(f"{out}: exists already, and is not overwritten: remove it, or choose another name.")


def write_folder(
    out: Path,
    state: dict[str, Tensor],
    config: Config,
    vocabulary: Vocabulary,
    step: int,
    card: str,
    *,
    first: int,
    dtype: str = "float32",
    code: bool = True,
) -> None:
    """An exported folder of these weights.

    Args:
        state: a state dict of :class:`~longseq.models.performer.PerformerLM`.
        first: the token that a sequence begins with.
    """
    kind = getattr(torch, dtype)
    weights = {f"{EXPORTED}{name}": t.to(kind) if t.is_floating_point() else t for name, t in state.items()}
    causal = config.causal
    with exported.writing(out) as folder:
        description = {**exported.description(config, vocabulary, step), "dtype": dtype}
        if code:
            performer = travelling.performer(config.performer_spec(vocabulary.size), step)
            description |= {"auto_map": travelling.auto_map(config.model.objective), "performer": performer}
            travelling.copy_code(folder)
        write_json(folder / "config.json", {**description, "longseq_version": __version__})
        if causal:
            write_json(
                folder / "generation_config.json",
                {
                    "bos_token_id": first,
                    "eos_token_id": vocabulary.eos,
                    "pad_token_id": vocabulary.pad,
                },
            )
        write_tokenizer(folder, vocabulary, first=first, causal=causal)
        (folder / "README.md").write_text(card, encoding="utf-8")
        save_weights(weights, folder / "model.safetensors")
