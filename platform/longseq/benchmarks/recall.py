"""``longseq bench recall``: multi-query associative recall at a distance (Arora et al. 2023, arXiv 2312.04927).

A sequence begins with pairs of a key and its value, goes on with filler, and ends with all the keys in another order:
at each the model must name its value. From a pair to its question there are ``distance`` positions on average. What
lies within the window is exact; an answer from beyond it has to come through the features. A pair is one token, so
that a single look at the right place answers: what is measured is how far and how sharply attention sees, not whether
two layers learn to compose.

Each variant learns the distances one after another, every distance going on from the weights of the one before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.benchmarks import small_models
from longseq.benchmarks.request import RecallRequest
from longseq.benchmarks.variants import VARIANTS
from longseq.models.performer import PerformerLM
from longseq_data.files import write_text

Tell = Callable[[str], None]

_FILLER = 0
_IGNORED = -100


@dataclass(frozen=True)
class Recall:
    """Accuracy of one variant at one distance, on fresh sequences, after ``steps`` more steps of training."""

    variant: str
    seed: int
    distance: int
    accuracy: float
    steps: int
    seconds: float


def sequences(request: RecallRequest, distance: int, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and targets, (rows, L); targets are −100 but after a question.

    L = distance + pairs: the pairs, the filler, the questions.
    """
    pairs = request.pairs
    order = torch.rand(rows, request.keys, generator=rng).argsort(1)[:, :pairs]
    values = torch.randint(request.values, (rows, pairs), generator=rng)
    asked = torch.rand(rows, pairs, generator=rng).argsort(1)
    filler = torch.full((rows, distance - pairs), _FILLER)
    shown = 1 + request.keys + order * request.values + values
    ids = torch.cat((shown, filler, 1 + order.gather(1, asked)), dim=1)
    targets = torch.full_like(ids, _IGNORED)
    targets[:, -pairs:] = values.gather(1, asked)
    return ids, targets


def measure(
    request: RecallRequest, variants: Sequence[str], seed: int, folder: Path, tell: Callable[[str], None]
) -> list[Recall]:
    """Train every variant through all distances; results are kept in ``folder`` and not measured twice."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = hashlib.blake2b(json.dumps(asdict(request), sort_keys=True).encode(), digest_size=4).hexdigest()
    found: list[Recall] = []
    for variant in variants:
        path = folder / f"{asked}-{variant}-{seed}.json"
        if not path.exists():
            results = [asdict(result) for result in _train(request, variant, seed, tell)]
            write_text(path, json.dumps({"request": asdict(request), "results": results}))
        found += [Recall(**result) for result in json.loads(path.read_text())["results"]]
    return found


def table(request: RecallRequest, found: Iterable[Recall]) -> str:
    """Accuracy in per cent, a row per variant and a column a distance."""
    found = list(found)
    lines = [
        f"accuracy %, {request.pairs} pairs of {request.keys} keys and {request.values} values, window "
        f"{request.window}, {request.features} features; chance {100 / request.values:.1f} %; steps in brackets",
        f"{'variant':24}" + "".join(f"{f'at {distance:,}':>15}" for distance in request.distances),
    ]
    for variant in dict.fromkeys(result.variant for result in found):
        by_distance = {result.distance: result for result in found if result.variant == variant}
        cells = (by_distance.get(distance) for distance in request.distances)
        lines.append(
            f"{variant:24}" + "".join(f"{f'{100 * c.accuracy:.1f} ({c.steps})' if c else '–':>15}" for c in cells)
        )
    return "\n".join(lines)


def _train(request: RecallRequest, variant: str, seed: int, tell: Callable[[str], None]) -> Iterable[Recall]:
    torch.manual_seed(seed)
    fields = VARIANTS[variant].fields(request.window, request.features, request.depth)
    vocabulary = 1 + request.keys + request.keys * request.values
    model = PerformerLM(small_models.spec_of(request, vocabulary, seed, **fields))
    rng = torch.Generator().manual_seed(seed)
    trained = 0
    for distance in request.distances:
        started = time.monotonic()
        name = f"{variant} at {distance}"
        steps = _learn(request, model, distance, trained, rng, partial(_tell, tell, name))
        trained += steps
        accuracy = _accuracy(model, request, distance, rng)
        tell(f"{name}: {100 * accuracy:.1f} % after {steps} steps")
        yield Recall(variant, seed, distance, accuracy, steps, time.monotonic() - started)


def _tell(tell: Tell, name: str, text: str) -> None:
    tell(f"{name}: {text}")


def _learn(
    request: RecallRequest, model: PerformerLM, distance: int, trained: int, rng: torch.Generator, tell: Tell
) -> int:
    """Train at one distance, after so many steps at others; how many steps it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=request.lr, weight_decay=0.0)
    steps, right = request.more_steps if trained else request.steps, 0.0

    def loss_of(step: int) -> Tensor:
        nonlocal right
        model.set_step(trained + step - 1)
        ids, targets = sequences(request, distance, request.batch, rng)
        logits, targets = model(ids)[:, -request.pairs :], targets[:, -request.pairs :]
        right = 0.9 * right + 0.1 * (logits.argmax(-1) == targets).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def enough(step: int, _: Tensor) -> bool:
        if step % 50 == 0:
            tell(f"step {step} of {steps}, accuracy {100 * right:.1f} %")
        return right > request.enough

    return small_models.train(model, optimizer, steps, lambda step: request.lr * min(1.0, step / 50), loss_of, enough)


@torch.no_grad()
def _accuracy(model: PerformerLM, request: RecallRequest, distance: int, rng: torch.Generator) -> float:
    hits = []
    for _ in range(8):
        ids, targets = sequences(request, distance, request.batch, rng)
        hits.append((model(ids)[:, -request.pairs :].argmax(-1) == targets[:, -request.pairs :]).float().mean())
    return torch.stack(hits).mean().item()
