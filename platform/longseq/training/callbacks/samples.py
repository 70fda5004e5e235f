"""Sequences that a causal model writes by itself, as text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
import torch
from torch import Tensor

from longseq.attention import FavorAttention
from longseq.config.schema import Config
from longseq.data import vocabulary
from longseq.models.performer import PerformerLM
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import due, sharded_weights
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import writer
from longseq_data.randomness import generator
from longseq_data.vocabulary import ALPHABETS, Vocabulary

_SEQUENCES = 4


class Samples(StepBoundary):
    """Every ``trainer.probe_every`` steps, four sequences of ``trainer.sample_tokens`` drawn from a causal model.

    The draws are a function of the run's seed and the step.
    """

    def __init__(self, config: Config, curves: Curves):
        self.config, self.curves, self.vocabulary = config, curves, vocabulary(config)
        wanted = config.causal and config.trainer.sample_tokens
        readable = self.vocabulary.name != "pixels"
        self.every = config.trainer.probe_every if wanted and readable else 0

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if not due(step, self.every):
            return
        assert isinstance(task, LanguageModelling)
        if not (trainer.is_global_zero or sharded_weights(self.config)):
            return  # only sharded weights need every rank
        training = task.training
        task.eval()
        with self.curves.paused(), _ready(task.model), trainer.precision_plugin.val_step_context():
            prompt = torch.full((_SEQUENCES, 1), self._first(), device=task.device)
            never = list(self.vocabulary.unwritten)  # as `longseq sample` has it
            tokens = sample(task.model, prompt, self.config.trainer.sample_tokens, (self.config.run.seed, step), never)
        task.train(training)
        if trainer.is_global_zero:
            texts = [readable(row, self.vocabulary) for row in tokens.tolist()]
            writer(trainer).add_text("samples", monospaced(texts), step)
            writer(trainer).flush()

    def _first(self) -> int:
        """What stands before a record: the end of another where they are joined, else BOS."""
        data = self.config.data
        return self.vocabulary.eos if data.packing == "concat" and not data.reset else self.vocabulary.bos


def readable(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    """Tokens as text; special ones read <bos>, <eos>, <pad>, <mask>."""
    if vocabulary.name in ALPHABETS:
        return ALPHABETS[vocabulary.name].decode(tokens)
    special = {getattr(vocabulary, name): f"<{name}>" for name in ("bos", "eos", "pad", "mask")}
    pieces: list[str] = []
    run: list[int] = []
    for token in [*tokens, vocabulary.eos]:
        if token not in special:
            run.append(token)
            continue
        pieces += [_text(run, vocabulary), special[token]]
        run = []
    return "".join(pieces[:-1])


def monospaced(texts: Sequence[str]) -> str:
    """Markdown that shows each text on a line of its own, as it stands: an indented block, without what ends a line.

    Line feeds and tabs read \\n and \\t, other control characters and half surrogates \\x0b, \\u2028, and so on; a
    backslash is doubled only where there is one of those to tell it from.
    """
    return "\n".join(f"    {_in_line(text)}" for text in texts)


def _in_line(text: str) -> str:
    if all(c.isprintable() for c in text):
        return text
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def _text(tokens: list[int], vocabulary: Vocabulary) -> str:
    if vocabulary.name == "bytes":
        return bytes(tokens).decode(errors="replace")
    from longseq_data.tokenization import load_tokenizer

    return load_tokenizer(vocabulary.name).decode(tokens)


def _ready(model: PerformerLM) -> AbstractContextManager[None]:
    """Decoding does not call the attention modules themselves, so ZeRO-3 would not gather what they hold directly."""
    modules = (module for module in model.modules() if isinstance(module, FavorAttention))
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    if not any(hasattr(parameter, "ds_id") for parameter in own):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(own)


@torch.no_grad()
def sample(model: PerformerLM, prompt: Tensor, tokens: int, key: tuple[int, int], never: Sequence[int] = ()) -> Tensor:
    """Continue each row of a prompt (B, L) by ``tokens`` tokens drawn from the model's probabilities.

    never: ids that are not drawn.

    Every rank gets the same, and makes the same number of calls, whatever is drawn.
    """
    random = generator(key[0], "samples", key[1])
    logits, state = model.prefill(prompt, last_only=True)
    logits, drawn = logits[:, -1], []
    for number in range(tokens):
        probability = logits.float().softmax(-1)  # (B, V)
        probability[:, list(never)] = 0.0
        below = probability.cumsum(-1).cpu()
        uniform = torch.from_numpy(random.random((len(prompt), 1)))
        drawn.append((below < uniform * below[:, -1:]).sum(-1).clamp_(max=below.shape[-1] - 1))
        if number < tokens - 1:
            logits, state = model.decode(drawn[-1].to(prompt.device), state)
    return torch.stack(drawn, dim=1)
