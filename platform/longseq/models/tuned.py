"""A language model that has learned labels: its body, and a linear map in the place of its head."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longseq.errors import LongseqError
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

# The linear maps of the blocks, by the ends of their names.
_MAPS = r"blocks\.\d+\.(attention\.(qkv|out)|mlp\.[02])"
_LEAST = 1e-6  # deviation, as a share of the largest: what varies less is constant


@dataclass(frozen=True)
class Learning:
    """What a :class:`TunedModel` has to say, and what of it learns.

    Attributes:
        outputs: classes, or 1 for a number.
        residues: whether each residue has a label, or the sequence one.
        learn: "head", "lora" or "all".
        rank, alpha: LoRA's (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · B A.
    """

    outputs: int
    residues: bool
    learn: str
    rank: int = 8
    alpha: int = 16


class Readout(nn.Module):
    """(B, L, E) to (B, outputs), of the mean over the residues; or of each position, (B, L, outputs).

    Features are scaled by mean and deviation where they were learned from: the vectors of similar proteins are nearly
    the same, and a map that had to find the difference first would learn for ever.
    """

    center: Tensor
    deviation: Tensor

    def __init__(self, dim: int, outputs: int, residues: bool):
        super().__init__()
        self.residues = residues
        self.linear = nn.Linear(dim, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        # The bits of fp32, as half-precision training casts every floating-point buffer.
        self.register_buffer("center", torch.zeros(dim).view(torch.int32))
        self.register_buffer("deviation", torch.ones(dim).view(torch.int32))

    def features(self, hidden: Tensor, real: Tensor) -> Tensor:
        """What is scaled, in fp32; real: (B, L) bool, True where a position is a residue."""
        hidden = hidden.float()
        if self.residues:
            return hidden
        return (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        return self.of_features(self.features(hidden, real))

    def of_features(self, features: Tensor) -> Tensor:
        """(..., E) in fp32 to (..., outputs)."""
        center, deviation = (bits.view(torch.float32) for bits in (self.center, self.deviation))
        scaled = (features - center) / deviation
        made: Tensor = self.linear(scaled.to(self.linear.weight.dtype))
        return made.float()

    @torch.no_grad()
    def scale(self, features: Tensor) -> None:
        """Take mean and deviation from features (n, E)."""
        wide = features.double()
        deviation = wide.std(0, correction=0)
        deviation = deviation.where(deviation > _LEAST * deviation.max(), 1.0)
        for bits, values in ((self.center, wide.mean(0)), (self.deviation, deviation)):
            bits.copy_(values.float().view(torch.int32))


class TunedModel(PerformerLM):
    """Tokens of marked sequences (see LabelledSamples) to labels: logits of classes, or a scaled number.

    Raises:
        LongseqError: for LoRA without PEFT.
    """

    head: Readout  # type: ignore[assignment]

    def __init__(self, spec: PerformerSpec, learning: Learning):
        super().__init__(spec)
        self.learning = learning
        if learning.learn == "lora":
            _add_lora(self, learning)
        elif learning.learn == "head":
            self.requires_grad_(False)
        self.head = Readout(spec.dim, learning.outputs, learning.residues)

    def train(self, mode: bool = True) -> TunedModel:
        super().train(mode)
        if self.learning.learn == "head":  # what does not learn has no dropout
            self.dropout.eval()
            self.blocks.eval()
        return self

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, outputs), or (B, L, outputs), in fp32. padding: (B, L) bool, True where a token is real; None: all."""
        with torch.no_grad() if self.learning.learn == "head" else nullcontext():
            hidden = self.hidden(tokens, padding)
        made: Tensor = self.head(hidden, _residues(tokens, padding))
        return made

    @torch.no_grad()
    def scale(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Scale the head's features by those of some batches of tokens and padding."""
        found = []
        for tokens, padding in batches:
            real = _residues(tokens, padding)
            features = self.head.features(self.hidden(tokens, padding), real)
            found.append((features[real] if self.learning.residues else features).cpu())
        self.head.scale(torch.cat(found))


def _residues(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """(B, L) bool: real tokens but for the first and the last."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = tokens.shape[1] if padding is None else padding.sum(1, keepdim=True)
    return ((positions > 0) & (positions < lengths - 1)).expand(tokens.shape)


def _add_lora(model: nn.Module, learning: Learning) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise LongseqError(
            f"finetune.learn=lora needs PEFT ({error}): pip install 'longseq[finetune]', or take head or all."
        ) from error
    config = LoraConfig(r=learning.rank, lora_alpha=learning.alpha, target_modules=_MAPS)
    inject_adapter_in_model(config, model)
