"""longseq models in Hugging Face transformers: ``import longseq.huggingface``, and the Auto classes know them.

    import longseq.huggingface
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("exported/")
    model = AutoModelForCausalLM.from_pretrained("exported/")
    ids = model.generate(**tokenizer("MKV", return_tensors="pt"), max_new_tokens=100, do_sample=True)

The folders are those of ``longseq export`` and ``longseq import``. AutoModel gives hidden states and their mean,
AutoModelForSequenceClassification and AutoModelForTokenClassification put a new head on them. Generation keeps a state
of fixed size in the place of a key-value cache (layers of exact attention have a cache). Prompts may be padded in front
or behind.

The classes are those of the code that travels with a folder (longseq.interop.modeling_longseq), with longseq's own
network, and so its kernels, in the place of the plain one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from longseq.config.merging import config_of
from longseq.errors import LongseqError
from longseq.interop.exported import SECTIONS
from longseq.interop.travelling import copy_code
from longseq.models.performer import PerformerLM

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from longseq.interop import modeling_longseq as code
except ImportError as error:
    raise ImportError(
        f"longseq.huggingface needs transformers ({error}): pip install 'longseq[huggingface]' brings one that fits."
    ) from error

LongseqConfig = code.LongseqConfig


class _Own(code.LongseqPreTrainedModel):
    """With longseq's own network."""

    refusal = LongseqError

    def network(self, config: code.LongseqConfig) -> PerformerLM:
        sections = {name: config.longseq[name] for name in SECTIONS if name in config.longseq}
        network = PerformerLM(config_of(sections, "config.json").performer_spec(config.vocab_size))
        if config.mask_token_id is not None:  # the last id, until the embedding is resized
            network.mask_token = config.mask_token_id
        # The projections of the last step that was trained, as longseq itself takes them.
        network.set_step(max(0, int(config.longseq.get("step", 0)) - 1))
        return network

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers sets: the network's own way to compute layers again."""
        return self.model.spec.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.spec = replace(self.model.spec, activation_checkpointing=value)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        super().save_pretrained(save_directory, *args, **options)
        self._copy_code(save_directory)

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **options: Any) -> Any:
        # With push_to_hub=True save_pretrained uploads before it returns.
        self._copy_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **options)

    def _copy_code(self, folder: str | Path) -> None:
        if getattr(self.config, "auto_map", None):
            copy_code(Path(folder))


class LongseqModel(_Own, code.LongseqModel):
    __doc__ = code.LongseqModel.__doc__


class LongseqForSequenceClassification(_Own, code.LongseqForSequenceClassification):
    __doc__ = code.LongseqForSequenceClassification.__doc__


class LongseqForTokenClassification(_Own, code.LongseqForTokenClassification):
    __doc__ = code.LongseqForTokenClassification.__doc__


class LongseqForMaskedLM(_Own, code.LongseqForMaskedLM):
    __doc__ = code.LongseqForMaskedLM.__doc__


class LongseqForCausalLM(_Own, code.LongseqForCausalLM):
    __doc__ = code.LongseqForCausalLM.__doc__


AutoConfig.register(LongseqConfig.model_type, LongseqConfig, exist_ok=True)
for auto, model in {
    AutoModel: LongseqModel,
    AutoModelForCausalLM: LongseqForCausalLM,
    AutoModelForMaskedLM: LongseqForMaskedLM,
    AutoModelForSequenceClassification: LongseqForSequenceClassification,
    AutoModelForTokenClassification: LongseqForTokenClassification,
}.items():
    auto.register(LongseqConfig, model, exist_ok=True)
