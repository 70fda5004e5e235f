"""``longseq bench needle``: what only a long context can know.

Values are planted at the beginning of a long stretch of real text, one token each, and asked for at its end, ``gap``
tokens later: at the key k the model must name the value that was planted with k. Everything between is text, of which
nothing may be let through: an average over a hundred thousand tokens would drown four.

One small model learns the task at short lengths first and goes on at longer ones. Next to it, a model whose context is
``short`` tokens: the same weights after the lengths up to that, trained on with as many optimiser steps on the last
``short`` tokens of the same long sequences. It knows the task, and cannot see the values: it can only guess.
"""

from __future__ import annotations

import copy
import gzip
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from longseq.benchmarks import small_models
from longseq.benchmarks.request import NeedleRequest
from longseq.errors import LongseqError
from longseq.models.head import IGNORE
from longseq.models.performer import PerformerLM
from longseq_data.os_errors import explained
from longseq_data.synth.synthetic import SyntheticSpec, synthesize

_BYTES = 256
_MOST_ROWS, _WARMUP = 64, 20
_SLOWER = 3  # the learning rate at longer lengths, where a step is a single sequence


@dataclass(frozen=True)
class Needle:
    """What one model has learned, on sequences of the full length."""

    context: int  # tokens it sees of them
    accuracy: float
    questions: int
    steps: int
    seconds: float


def read_texts(paths: Sequence[Path]) -> Tensor:
    """The bytes of text files, or the residues of FASTA files (plain or gzipped), one after the other: (n,) uint8.

    Without files, those of synthetic proteins.

    Raises:
        LongseqError: for a file that cannot be read.
    """
    if not paths:
        made = SyntheticSpec(families=64, records=8000)
        return _joined([sequence.encode() for _, sequence in synthesize(made)])
    parts = []
    for path in paths:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except OSError as error:
            raise LongseqError(f"{explained(error, path, 'cannot be read')}.") from None
        except EOFError as error:
            raise LongseqError(f"{path}: cut short ({error}): copy it again.") from None
        if data.startswith(b">"):
            data = b"\n".join(b"".join(record.splitlines()[1:]) for record in data.split(b">")[1:])
        parts.append(data)
    return _joined(parts)


def _joined(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def sequences(
    request: NeedleRequest, text: Tensor, length: int, rows: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids and targets (rows, length); targets are −100 but at the questions, the last ``keys`` positions."""
    keys, values = request.keys, request.values
    starts = torch.randint(len(text) - length + 1, (rows,), generator=rng)
    ids = torch.stack([text[start : start + length] for start in starts.tolist()]).long()
    room = length - keys - request.gap_at(length)
    places = torch.rand(rows, room, generator=rng).argsort(1)[:, :keys]
    planted = torch.randint(values, (rows, keys), generator=rng)
    ids.scatter_(1, places, _BYTES + torch.arange(keys) * values + planted)
    asked = torch.rand(rows, keys, generator=rng).argsort(1)
    ids[:, -keys:] = _BYTES + keys * values + asked
    targets = torch.full_like(ids, IGNORE)
    targets[:, -keys:] = planted.gather(1, asked)
    return ids, targets


def measure(
    request: NeedleRequest, text: Tensor, tell: Callable[[str], None], say: Callable[[str], None]
) -> list[Needle]:
    """Train both models, and test them on text that neither has seen.

    ``tell`` hears of every ten steps, ``say`` of every length that was learned.

    Raises:
        LongseqError: for too little text.
    """
    held_out = max(len(text) // 10, request.length + 1)
    if len(text) < 2 * held_out:
        raise LongseqError(
            f"too little text: {len(text):,} characters, and --length {request.length} needs {2 * held_out:,}; give "
            "more files or a shorter length."
        )
    train, test = text[:-held_out], text[-held_out:]
    torch.manual_seed(request.seed)
    vocabulary = _BYTES + request.keys * request.values + request.keys  # bytes of text, values with their keys, keys
    options = {"kernel": request.kernel, "features": request.features, "rotary_base": request.rotary_base}
    spec = small_models.spec_of(request, vocabulary, request.seed, **options, sequence_tile=request.tile)
    model = PerformerLM(spec)
    began, steps, short, found = time.monotonic(), 0, None, []
    for length in request.lengths:
        if short is None and length > request.short:
            short, steps_before, seconds_before = copy.deepcopy(model), steps, time.monotonic() - began
        taken, right = _learn(request, model, train, length, length, request.steps, tell)
        steps += taken
        say(f"{length:,} tokens: {right:.1%} right after {taken} steps")
    seconds = time.monotonic() - began
    if short is not None:
        again = time.monotonic()
        more = steps - steps_before
        _learn(request, short, train, request.length, request.short, more, tell, stop=False)
        found.append(_test(request, short, test, request.short, steps, seconds_before + time.monotonic() - again))
    found.append(_test(request, model, test, request.length, steps, seconds))
    return found


def table(request: NeedleRequest, found: Sequence[Needle]) -> str:
    """Accuracy of both, next to chance."""
    lines = [
        f"{request.keys} values planted in the first {request.length - request.gap - request.keys:,} of "
        f"{request.length:,} tokens and asked for at the end; {request.depth} layers of width {request.dim}",
        f"{'context':>10}{'accuracy':>11}{'questions':>11}{'steps':>8}{'seconds':>9}",
        *(
            f"{needle.context:>10,}{needle.accuracy:>11.1%}{needle.questions:>11,}{needle.steps:>8,}"
            f"{needle.seconds:>9,.0f}"
            for needle in found
        ),
        f"{'chance':>10}{1 / request.values:>11.1%}",
    ]
    return "\n".join(lines)


def numbers(request: NeedleRequest, found: Sequence[Needle]) -> dict[str, object]:
    """Everything, for the JSON file."""
    return {"request": asdict(request), "models": [asdict(needle) for needle in found], "chance": 1 / request.values}


def _learn(
    request: NeedleRequest,
    model: PerformerLM,
    text: Tensor,
    length: int,
    context: int,
    steps: int,
    tell: Callable[[str], None],
    *,
    stop: bool = True,
) -> tuple[int, float]:
    """Train on sequences of ``length``, of which the model sees the last ``context``; steps, running accuracy."""
    rng = torch.Generator().manual_seed(request.seed + length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=request.lr, weight_decay=0.0)
    rows, right = min(_MOST_ROWS, max(1, request.step_tokens // length)), 0.0

    def loss_of(_: int) -> Tensor:
        nonlocal right
        ids, targets = sequences(request, text, length, rows, rng)
        loss, correct = model(ids[:, -context:], targets=targets[:, -context:])
        right = 0.9 * right + 0.1 * correct.item() / (rows * request.keys)
        return loss / (rows * request.keys)

    def enough(step: int, _: Tensor) -> bool:
        if step % 10 == 0:
            tell(f"{length:,} tokens, {context:,} of them seen: step {step}, accuracy {right:.1%}")
        return stop and step >= request.least and right > request.enough

    def rate(step: int) -> float:
        return request.lr * min(1.0, step / _WARMUP) / (1 if length <= request.short else _SLOWER)

    return small_models.train(model, optimizer, steps, rate, loss_of, enough), right


@torch.no_grad()
def _test(request: NeedleRequest, model: PerformerLM, text: Tensor, context: int, steps: int, seconds: float) -> Needle:
    rng = torch.Generator().manual_seed(request.seed + 1)
    hits = 0
    for _ in range(request.tested):
        ids, targets = sequences(request, text, request.length, 1, rng)
        hits += int(model(ids[:, -context:], targets=targets[:, -context:])[1])
    questions = request.tested * request.keys
    return Needle(context, hits / questions, questions, steps, seconds)
