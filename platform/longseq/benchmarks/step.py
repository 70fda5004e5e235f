"""One whole training step of a language model: forward, loss, backward, AdamW. The paper's Figure 3, with OPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import FavorAttention, SlicedDocuments
from longseq.benchmarks.ladder import Progress, Task, climb
from longseq.benchmarks.request import CAUSAL, STEP_CONTENDERS, StepRequest
from longseq.benchmarks.results import Note, Results
from longseq.models.compiling import compile_blocks, uncompiled
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM
from longseq.models.presets import PRESETS
from longseq.models.spec import PerformerSpec

STEP = "step"
COMPILED = "compiled"


class ReturnsV(FavorAttention):
    """OPT: projections, rotary positions and the output's map as ever, and v where attention would be."""

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        segments: Tensor | SlicedDocuments | None,
        gate: Tensor | None = None,
    ) -> Tensor:
        return v


@dataclass
class Trainer:
    """A model and its optimiser. The contenders train it in turns, each with its attention over the same weights."""

    model: PerformerLM
    optimizer: torch.optim.Optimizer
    attentions: dict[str, list[FavorAttention]]  # one a block
    autocast: torch.dtype | None

    def step(self, contender: str, tokens: Tensor, targets: Tensor) -> Tensor:
        """One training step on (B, L) token ids and targets. Returns the loss."""
        for block, attention in zip(self.model.blocks, self.attentions[contender], strict=True):
            block.attention = attention
        blocks = nullcontext() if contender == COMPILED else uncompiled(self.model)
        with blocks, torch.autocast(tokens.device.type, self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(self.model(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(request: StepRequest, results: Results, progress: Progress) -> None:
    """Fill ``results``."""

    def contenders(direction: str) -> dict[str, Callable[[tuple[Tensor, Tensor]], Mapping[str, Task]]]:
        trainer = make_trainer(request, direction == CAUSAL)
        absent = "window" in request.contenders and request.window < 1
        if absent:
            results.notes.append(Note("window", "asked for with --window 0: there is no window", direction))
        return {name: partial(_tasks, trainer, name) for name in request.contenders if name != "window" or not absent}

    climb(request, partial(make_inputs, request), contenders, results, progress)


def empty_results(request: StepRequest) -> Results:
    """Where the measurements go."""
    about = {name: STEP_CONTENDERS[name] for name in request.contenders}
    return Results("step", (request.batch, "token"), about)


def make_trainer(request: StepRequest, causal: bool) -> Trainer:
    """The preset's model with its first weights."""
    spec = PerformerSpec(
        vocabulary=request.vocabulary,
        causal=causal,
        kernel=request.kernel,
        features=request.features,
        backend=request.backend,
        activation_checkpointing=request.activation_checkpointing,
        **PRESETS[request.preset].sizes,
    )
    torch.manual_seed(0)
    model = PerformerLM(spec).to(request.device)
    autocast = None if request.dtype == "float32" else getattr(torch, request.dtype)
    attentions = {name: _attentions(request, model, name) for name in STEP_CONTENDERS}
    if COMPILED in request.contenders:
        compile_blocks(model)
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-4), attentions, autocast)


def make_inputs(request: StepRequest, length: int) -> tuple[Tensor, Tensor]:
    """Random token ids and targets (B, L)."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(request.vocabulary, (2, request.batch, length), generator=rng).to(request.device)
    return ids[0], ids[1]


def _attentions(request: StepRequest, model: PerformerLM, contender: str) -> list[FavorAttention]:
    """A contender's attention for each block of ``model``, with the weights that are there."""
    spec = replace(
        model.spec,
        kind="exact" if contender == "exact" else "favor",
        window=request.window if contender == "window" else 0,
        forget_gate=contender == "gate",
    )
    if contender == "plan":
        spec = replace(spec, layers=(*[spec] * min(3, spec.depth - 1), replace(spec, kind="exact")))
    attentions: list[FavorAttention] = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if contender == "opt":
            attention: FavorAttention = ReturnsV(spec.dim, spec.heads, causal=spec.causal)
        else:
            attention = Block(spec, layer).attention.to(request.device)
        attention.qkv, attention.out = block.attention.qkv, block.attention.out
        attentions.append(attention)
    return attentions


def _tasks(trainer: Trainer, contender: str, inputs: tuple[Tensor, Tensor]) -> Mapping[str, Task]:
    return {STEP: Task(lambda: (trainer.step(contender, *inputs),))}
