"""longseq models in Hugging Face transformers: ``import longseq.huggingface``, and the Auto classes know them.

    import longseq.huggingface
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("exported/")
    model = AutoModelForCausalLM.from_pretrained("exported/")
    ids = model.generate(**tokenizer("MKV", return_tensors="pt"), max_new_tokens=100, do_sample=True)

The folders are those of ``longseq export`` and ``longseq import``. Generation keeps a state of fixed size in the place
of a key-value cache (layers of exact attention have a cache). Prompts may be padded in front or behind.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.config.loading import config_of
from longseq.errors import LongseqError
from longseq.interop.exported import ARCHITECTURES, MODEL_TYPE
from longseq.models.head import TransformHead
from longseq.models.performer import DecodingState, PerformerLM
from longseq_data.vocabulary import IGNORE

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
except ImportError as error:
    raise ImportError(
        f"longseq.huggingface needs transformers ({error}): pip install 'longseq[huggingface]'."
    ) from error

# generate() hands the state on, and reorders it for beams, under the name that the library's own outputs have for it.
_STATE_NAMES = ("cache", "past_key_values")  # since 5.24, and before
_STATE = next((field.name for field in fields(CausalLMOutputWithPast) if field.name in _STATE_NAMES), "")
if not _STATE or int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"longseq.huggingface cannot work with transformers {transformers.__version__}: "
        "pip install 'longseq[huggingface]' brings a release that it was tried with."
    )


class LongseqConfig(PretrainedConfig):
    """Sizes under Hugging Face's names, and under ``longseq`` the sections of the configuration and the step."""

    model_type = MODEL_TYPE

    def __init__(self, longseq: dict[str, Any] | None = None, **names: Any):
        super().__init__(**names)
        self.longseq = longseq or {}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            setattr(self, name, names.get(name, 0))
        self.mask_token_id = names.get("mask_token_id")


class LongseqPreTrainedModel(PreTrainedModel):
    """What the causal and the masked model share."""

    config_class = LongseqConfig
    base_model_prefix = "model"
    objective: str  # that the class is for
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        sections = {name: value for name, value in config.longseq.items() if isinstance(value, dict)}
        ours = config_of(sections, "config.json")
        if ours.model.objective != self.objective:  # its logits would be those of other positions
            auto = ARCHITECTURES[ours.model.objective].replace("Longseq", "AutoModel")
            raise LongseqError(
                f"{config.name_or_path or 'config.json'}: a {ours.model.objective} model "
                f"(model.objective={ours.model.objective}), and not a {self.objective} one: open it with {auto}."
            )
        self.model = PerformerLM(ours.performer_spec(config.vocab_size))
        # The projections of the last step that was trained, as longseq itself takes them.
        self.model.set_step(max(0, int(config.longseq.get("step", 0)) - 1))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """PerformerLM has initialised itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        assert isinstance(value, torch.nn.Embedding)
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        head = self.model.head
        return head.logits if isinstance(head, TransformHead) else head


class LongseqForMaskedLM(LongseqPreTrainedModel):
    """Logits of each position's own token."""

    objective = "masked"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> MaskedLMOutput:
        logits = self.model(input_ids, _real(attention_mask))
        return MaskedLMOutput(loss=_loss(logits, labels), logits=logits)


class LongseqForCausalLM(LongseqPreTrainedModel, GenerationMixin):
    """Logits of each position's next token; ``generate`` decodes at constant time and memory per token."""

    objective = "causal"
    _is_stateful = True  # the state cannot go back, as assisted generation would have it

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: DecodingState | None = None,
        past_key_values: DecodingState | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocabulary), the mean loss if labels are given, and the decoding state if it is asked for.

        Args:
            cache, past_key_values: a decoding state, which ``input_ids`` goes on from; transformers 5.24 and newer call
                it cache.
        """
        state = past_key_values if cache is None else cache
        if state is not None:
            following = []
            for tokens in input_ids.unbind(1):
                logits, state = self.model.decode(tokens, state)
                following.append(logits)
            return CausalLMOutputWithPast(logits=torch.stack(following, dim=1), **{_STATE: state})
        if use_cache and labels is None and not self.training:
            logits, state = self.model.prefill(input_ids, _real(attention_mask))
            return CausalLMOutputWithPast(logits=logits, **{_STATE: state})
        logits = self.model(input_ids, _real(attention_mask))
        shifted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return CausalLMOutputWithPast(loss=_loss(logits, shifted), logits=logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        cache: DecodingState | None = None,
        past_key_values: DecodingState | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        state = past_key_values if cache is None else cache
        if state is not None:
            return {"input_ids": input_ids[:, -1:], _STATE: state, "use_cache": True}
        return {**_padded_in_front(input_ids, attention_mask), "use_cache": use_cache}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is made by the first forward pass

    def _reorder_cache(self, cache: DecodingState, beams: Tensor) -> DecodingState:
        return cache.select(beams)


def _padded_in_front(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | None]:
    """The same prompts (B, L), what is padded moved in front: the last position is the one to go on from."""
    real = _real(attention_mask)
    if real is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    order = real.to(torch.uint8).argsort(dim=1, stable=True)  # False first
    return {"input_ids": input_ids.gather(1, order), "attention_mask": real.gather(1, order)}


def _real(attention_mask: Tensor | None) -> Tensor | None:
    """None where nothing is padded: attention needs no mask then."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def _loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


AutoConfig.register(MODEL_TYPE, LongseqConfig, exist_ok=True)
AutoModelForCausalLM.register(LongseqConfig, LongseqForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LongseqConfig, LongseqForMaskedLM, exist_ok=True)
