"""Sequences drawn from a causal model, token by token from a state of fixed size.

A draw is a pure function of the model, the settings, the seed and the sequence's number. Rounding differs between
batches of different shapes, so sequences are always decoded in blocks of ``BLOCK`` rows, number i in row i mod BLOCK,
the last block filled up: asking for more sequences, or fewer, changes none of them in a single bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.evaluation.log_probabilities import log_probabilities, of_tokens
from longseq.models.decoding import Decoder
from longseq.models.performer import DecodingState, PerformerLM
from longseq.models.tile_by_tile import carried
from longseq_data.randomness import uniforms
from longseq_data.vocabulary import Vocabulary

BLOCK = 8


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn.

    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: only the k most probable tokens; 0: all. top_p: of these, the fewest that together have this probability
    (Holtzman et al. 2020, arXiv 1904.09751); 1: all.
    """

    length: int  # tokens to draw at most
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: bool = True  # at EOS; otherwise EOS is never drawn


@dataclass(frozen=True)
class Drawn:
    """One sequence."""

    number: int
    tokens: tuple[int, ...]  # the prompt's and those drawn, without the token before the record and without EOS
    log_likelihood: float  # of these and of EOS if it was drawn, under the model itself: temperature 1, all tokens
    ended: bool  # by EOS


@torch.inference_mode()
def draw(
    model: PerformerLM,
    vocabulary: Vocabulary,
    begins: int,
    prompt: Sequence[int],
    number: int,
    settings: Settings,
    clock: list[float] | None = None,
    context: npt.NDArray[np.integer] | None = None,
) -> Iterator[Drawn]:
    """``number`` sequences, a block at a time.

    Args:
        model: causal, in evaluation mode.
        begins: the token before a record.
        prompt: ordinary tokens that every sequence begins with.
        clock: gets the time after each token.
        context: what comes before the prompt, in place of ``begins``; no part of a log-likelihood.
    """
    device = next(model.parameters()).device
    opening = [begins] if context is None else context.tolist()
    hidden, before, state = _read(model, np.array([*opening, *prompt]), len(opening))
    never = torch.zeros(vocabulary.size, dtype=torch.bool)
    never[list(vocabulary.unwritten)] = True
    never[vocabulary.eos] = not settings.stop
    last = model.head(hidden).expand(BLOCK, -1)
    block = state.select(torch.zeros(BLOCK, dtype=torch.long, device=device))
    decoder = Decoder(model, block)
    for first in range(0, number, BLOCK):
        rows = min(BLOCK, number - first)
        decoder.begin(block)
        yield from _block(decoder, vocabulary, list(prompt), before, last, never, first, rows, settings, clock)


def _read(model: PerformerLM, row: npt.NDArray[np.int64], first: int) -> tuple[Tensor, float, DecodingState]:
    """A prompt of any length: what the head reads last (1, E), the log-likelihood of its tokens from ``first`` on, and
    the state behind it."""
    tokens = torch.from_numpy(row)
    if not (model.spec.reads_on and len(row) > model.spec.tile):
        hidden, state = model.read(tokens[None].to(model.embedding.weight.device))
        own = of_tokens(model, hidden[0, first - 1 : -1], tokens[first:])
        return hidden[:, -1], float(own.double().sum()), state
    total = 0.0
    for tile in carried(model, row):
        start, hidden, behind = tile
        skipped = min(max(first - 1 - start, 0), hidden.shape[1])
        targets = tokens[start + skipped + 1 : start + 1 + hidden.shape[1]]
        own = of_tokens(model, hidden[0, skipped : skipped + len(targets)], targets)
        total += float(own.double().sum())
    return hidden[:, -1], total, model.decoding_state(behind, torch.tensor([len(row)], device=hidden.device))


def _block(
    decoder: Decoder,
    vocabulary: Vocabulary,
    prompt: list[int],
    before: float,
    logits: Tensor,
    never: Tensor,
    first: int,
    rows: int,
    settings: Settings,
    clock: list[float] | None,
) -> list[Drawn]:
    tokens: list[npt.NDArray[np.int64]] = []
    sums = np.full(BLOCK, before)
    ended = np.zeros(BLOCK, dtype=bool)
    ended[rows:] = True  # filling
    lengths = np.full(BLOCK, settings.length)
    # The stream of a sequence is its own: its number decides where in the counters it begins.
    streams = (np.arange(first, first + BLOCK, dtype=np.int64)) << 32
    for at in range(settings.length):
        log_probability = log_probabilities(logits)  # (BLOCK, V)
        chosen = choose(log_probability, uniforms(settings.seed, "sample", streams + at), never, settings)
        sums += np.where(ended, 0.0, log_probability[np.arange(BLOCK), chosen].double().numpy())
        tokens.append(chosen)
        if clock is not None:
            clock.append(time.perf_counter())
        now = (chosen == vocabulary.eos) & ~ended
        lengths[now] = at
        ended |= now
        if ended.all():
            break
        if at < settings.length - 1:
            logits = decoder.step(torch.from_numpy(chosen).to(logits.device))
    table = np.stack(tokens, axis=1) if tokens else np.zeros((BLOCK, 0), np.int64)
    return [
        Drawn(
            first + row,
            (*prompt, *table[row, : lengths[row]].tolist()),
            float(sums[row]),
            bool(lengths[row] < settings.length),
        )
        for row in range(rows)
    ]


def choose(
    log_probability: Tensor, uniform: npt.NDArray[np.float64], never: Tensor, settings: Settings
) -> npt.NDArray[np.int64]:
    """A token for each row (B, V), by inversion in float64 in the order of the ids.

    Args:
        uniform: (B,) in [0, 1).
        never: (V,) True for tokens that must not be drawn.
    """
    scores = log_probability.double().masked_fill(never, -torch.inf)
    if settings.temperature == 0:
        return scores.argmax(-1).numpy()
    # The largest is 0 before the division, which else overflows at temperatures near 0.
    probability = ((scores - scores.amax(-1, keepdim=True)) / settings.temperature).softmax(-1)
    if settings.top_k or settings.top_p < 1:
        ordered, order = torch.sort(probability, dim=-1, descending=True, stable=True)
        if settings.top_k:
            ordered[:, settings.top_k :] = 0.0
        if settings.top_p < 1:
            ordered = ordered / ordered.sum(-1, keepdim=True)
            ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0.0
        probability = torch.zeros_like(probability).scatter_(-1, order, ordered)
    below = probability.cumsum(-1)
    wanted = torch.from_numpy(uniform)[:, None] * below[:, -1:]
    chosen = (below <= wanted).sum(-1)
    # Rounding may carry the last token past the end, to one of probability 0.
    top = (probability > 0).long().mul(torch.arange(probability.shape[-1])).amax(-1)
    return torch.minimum(chosen, top).numpy()
