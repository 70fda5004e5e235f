"""longseq's models for Hugging Face transformers. The three files *_longseq.py travel with the weights.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

computes what longseq computes, to rounding, where longseq is not installed: by the plain PyTorch network of
performer_longseq.py. Where it is, ``import longseq.huggingface`` opens the same folder without ``trust_remote_code``,
by longseq's own network, which is faster and needs less memory.

Axes in comments: B batch, L length, E width.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .favor_longseq import FeatureMap  # noqa: F401 - transformers 5.0 copies the files that this one imports, no others
from .performer_longseq import Performer

# generate() hands the state on, and reorders it for beams, under the name that the library's own outputs have for it.
_STATE_NAMES = ("cache", "past_key_values")  # since 5.24, and before
_STATE = next((field.name for field in fields(CausalLMOutputWithPast) if field.name in _STATE_NAMES), "")
if not _STATE or int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"the code of the model cannot work with transformers {transformers.__version__}")

IGNORE = -100  # a label that is not scored


class LongseqConfig(PretrainedConfig):
    """Sizes under Hugging Face's names, under ``performer`` all that the network is made of, and under ``longseq`` the
    sections of longseq's configuration and the step."""

    model_type = "longseq"

    def __init__(self, longseq: dict[str, Any] | None = None, performer: dict[str, Any] | None = None, **names: Any):
        super().__init__(**names)
        self.longseq, self.performer = longseq or {}, performer or {}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            setattr(self, name, names.get(name, 0))
        self.mask_token_id = names.get("mask_token_id")


class LongseqPreTrainedModel(PreTrainedModel):
    """What all models share: the network, under ``model``, and its head or none."""

    config_class = LongseqConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers has it
    objective = ""  # of the models that the class opens; any
    refusal: type[Exception] = ValueError

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        own = config.longseq.get("model", {}).get("objective", "")
        kind = {"fim": "causal"}.get(own, own)
        if self.objective not in ("", kind):  # its logits would be those of other positions
            auto = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}.get(kind, "another class")
            raise self.refusal(
                f"{config.name_or_path or 'config.json'}: a {own} model (model.objective={own}), and not a "
                f"{self.objective} one: open it with {auto}."
            )
        self.model = self.network(config)
        if not self.objective:
            self.model.head = None
        if not self.model.embedding.weight.is_meta:  # of no weights to come: it has initialised itself
            for module in self.model.modules():
                module._is_hf_initialized = True

    def network(self, config: LongseqConfig) -> Any:
        return Performer(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear | None:
        head = self.model.head
        return getattr(head, "logits", head)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        head = self.get_output_embeddings()  # keeps its class, which knows more than a linear map
        assert head is not None
        head.weight, head.bias, head.out_features = value.weight, value.bias, value.out_features

    def states(self, asked: bool | None) -> list[Tensor] | None:
        """Where the network is to put its hidden states; None: nowhere."""
        return [] if (getattr(self.config, "output_hidden_states", False) if asked is None else asked) else None

    def pooled(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mean (B, E) of hidden (B, L, E) over the tokens that are neither padding nor the ends of a sequence."""
        ends = [id_ for id_ in (self.config.bos_token_id, self.config.eos_token_id) if id_ is not None]
        inside = ~torch.isin(input_ids, input_ids.new_tensor(ends))
        if attention_mask is not None:
            inside = inside & attention_mask.bool()
        weight = inside[..., None].to(hidden.device).float()
        return ((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)).to(hidden.dtype)


class LongseqModel(LongseqPreTrainedModel):
    """What the head would read of each token, and its mean over the tokens but for the ends (``pooler_output``).

    ``hidden_states``: what enters the first block, what each block but the last gives, and ``last_hidden_state``.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]  # noqa: RUF012

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **unused: Any,
    ) -> Any:  # fmt: skip
        states = self.states(output_hidden_states)
        hidden = self.model.hidden(input_ids, _real(attention_mask), states=states)
        pooled = self.pooled(hidden, input_ids, attention_mask)
        return _as(return_dict, BaseModelOutputWithPooling(hidden, pooled, _tuple(states)))


class _Labelled(LongseqPreTrainedModel):
    """A linear map of the hidden states, and its loss."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]  # noqa: RUF012
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the steps that it accumulates
    residues: bool

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, **unused: Any,
    ) -> Any:  # fmt: skip
        states = self.states(output_hidden_states)
        hidden = self.model.hidden(input_ids, _real(attention_mask), states=states)
        logits = self.classifier(hidden if self.residues else self.pooled(hidden, input_ids, attention_mask))
        output = TokenClassifierOutput if self.residues else SequenceClassifierOutput
        loss = None if labels is None else self.loss(logits.float(), labels.to(logits.device))
        return _as(return_dict, output(loss=loss, logits=logits, hidden_states=_tuple(states)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


class LongseqForSequenceClassification(_Labelled):
    """A linear map of the mean that :class:`LongseqModel` pools: classes, several labels or numbers a sequence.

    The loss follows ``config.problem_type`` as everywhere in transformers; None: mean squares for one label, cross
    entropy for integers, binary cross entropy for other labels.
    """

    residues = False

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        whole = not labels.is_floating_point()
        kind = "regression" if self.num_labels == 1 else f"{'single' if whole else 'multi'}_label_classification"
        kind = self.config.problem_type or kind
        if kind == "regression":
            return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return super().loss(logits, labels)


class LongseqForTokenClassification(_Labelled):
    """A linear map of each token's hidden state to labels of tokens."""

    residues = True


class LongseqForMaskedLM(LongseqPreTrainedModel):
    """Logits of each position's own token."""

    objective = "masked"

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, **unused: Any,
    ) -> Any:  # fmt: skip
        states = self.states(output_hidden_states)
        logits = self.model.head(self.model.hidden(input_ids, _real(attention_mask), states=states))
        loss = _loss(logits, labels, num_items_in_batch)
        return _as(return_dict, MaskedLMOutput(loss=loss, logits=logits, hidden_states=_tuple(states)))


class LongseqForCausalLM(LongseqPreTrainedModel, GenerationMixin):
    """Logits of each position's next token; ``generate`` decodes at constant time and memory per token."""

    objective = "causal"
    _is_stateful = True  # the state cannot go back, as assisted generation would have it

    def __init__(self, config: LongseqConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, cache: Any = None, past_key_values: Any = None, logits_to_keep: int = 0,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, **unused: Any,
    ) -> Any:  # fmt: skip
        """Logits (B, L, vocabulary), the mean loss if labels are given, and the decoding state if it is asked for.

        Args:
            cache, past_key_values: a decoding state, which ``input_ids`` goes on from; transformers 5.24 and newer call
                it cache.
            logits_to_keep: of so many last positions; 0: of all.
            num_items_in_batch: what Trainer divides the sum of the losses by, of all steps that it accumulates.
        """
        state, states = past_key_values if cache is None else cache, self.states(output_hidden_states)
        if state is not None:
            logits, state, states = self._following(input_ids, state, states)
            return _as(return_dict, CausalLMOutputWithPast(logits=logits, hidden_states=states, **{_STATE: state}))
        real = _real(attention_mask)
        if use_cache and labels is None and not self.training:
            hidden, state = self.model.read(input_ids, real, states=states)
        else:
            hidden = self.model.hidden(input_ids, real, states=states)
        logits = self.model.head(hidden if labels is not None else hidden[:, -logits_to_keep:])
        shifted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        loss = _loss(logits, shifted, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=_tuple(states), **{_STATE: state})
        return _as(return_dict, output)

    def _following(self, input_ids: Tensor, state: Any, states: list[Tensor] | None) -> tuple[Any, ...]:
        """Logits, state and hidden states of the next tokens, one after the other."""
        found, each = [], []
        for tokens in input_ids.unbind(1):
            own: list[Tensor] | None = None if states is None else []
            logits, state = self.model.decode(tokens, state, states=own)
            found.append(logits)
            each.append(own or [])
        layers = None if states is None else tuple(torch.cat(layer, dim=1) for layer in zip(*each, strict=True))
        return torch.stack(found, dim=1), state, layers

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = True, cache: Any = None,
        past_key_values: Any = None, given: Any = None, **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        wanted: dict[str, Any] = {
            name: others[name] for name in ("output_hidden_states", "logits_to_keep") if name in others
        }
        state = next((each for each in (cache, past_key_values, given) if each is not None), None)
        if state is not None:
            if len(state.positions) < len(input_ids):  # a state that was given, of prompts that generate() repeats
                rows = torch.arange(len(state.positions), device=state.positions.device)
                state = state.select(rows.repeat_interleave(len(input_ids) // len(rows)))
            following = self._unread(input_ids, attention_mask, state)  # 1, but where a state was given
            return {"input_ids": input_ids[:, -following:], _STATE: state, "use_cache": True, **wanted}
        return {**_padded_in_front(input_ids, attention_mask), "use_cache": use_cache, **wanted}

    def _unread(self, input_ids: Tensor, attention_mask: Tensor | None, state: Any) -> int:
        """How many of the last tokens (B, L) the state has not read."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = (mask.sum(1).to(state.positions.device) - state.positions).tolist()
        if min(rows) < 1 or min(rows) < max(rows) or not bool(mask[:, -rows[0] :].all()):
            raise self.refusal(
                f"generate: the state that was given leaves {', '.join(map(str, rows))} tokens of the prompts to read: "
                "give prompts that go on from it by one token or more, all by as many, and padded on the left."
            )
        return rows[0]

    def _prepare_cache_for_generation(
        self, config: Any, model_kwargs: dict[str, Any], *others: Any, **more: Any
    ) -> Any:
        given = [model_kwargs.pop(name) for name in _STATE_NAMES if model_kwargs.get(name) is not None]
        if not given:
            return super()._prepare_cache_for_generation(config, model_kwargs, *others, **more)
        model_kwargs["given"] = given[0]  # transformers would ask it what it asks its own caches
        return None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is made by the first forward pass

    def _reorder_cache(self, cache: Any, beams: Tensor) -> Any:
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


def _loss(logits: Tensor, labels: Tensor | None, items: Tensor | int | None) -> Tensor | None:
    if labels is None:
        return None
    reduction = "mean" if items is None else "sum"
    wanted = labels.to(logits.device).flatten()
    loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=IGNORE, reduction=reduction)
    return loss if items is None else loss / items


def _tuple(states: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if states is None else tuple(states)


def _as(return_dict: bool | None, output: Any) -> Any:
    return output.to_tuple() if return_dict is False else output
