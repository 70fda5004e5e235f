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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.benchmarks.variants import VARIANTS
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq_data.files import write_text

_FILLER = 0
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class RecallRequest:
    """The task and the model.

    At most ``steps`` at the first distance and ``more_steps`` at each further one; ``enough`` is the accuracy at which
    a distance is learned.
    """

    distances: tuple[int, ...] = (64, 256, 1024, 2048)  # each at least ``pairs``
    pairs: int = 8
    keys: int = 16
    values: int = 16
    batch: int = 32
    steps: int = 2500
    more_steps: int = 300
    enough: float = 0.99
    window: int = 32
    features: int = 128
    dim: int = 64
    depth: int = 2
    heads: int = 2
    lr: float = 3e-3


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
    vocabulary = 1 + request.keys + request.keys * request.values
    spec = PerformerSpec(
        vocabulary=vocabulary,
        dim=request.dim,
        depth=request.depth,
        heads=request.heads,
        ffn_dim=4 * request.dim,
        causal=True,
        seed=seed,
        **VARIANTS[variant].fields(request.window, request.features, request.depth),
    )
    model = PerformerLM(spec)
    rng = torch.Generator().manual_seed(seed)
    trained = 0
    for distance in request.distances:
        optimizer = torch.optim.AdamW(model.parameters(), lr=request.lr, weight_decay=0.0)
        started, right, step = time.monotonic(), 0.0, 0
        steps = request.steps if distance == request.distances[0] else request.more_steps
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = request.lr * min(1.0, step / 50)
            model.set_step(trained)
            trained += 1
            ids, targets = sequences(request, distance, request.batch, rng)
            logits = model(ids)[:, -request.pairs :]
            targets = targets[:, -request.pairs :]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right = 0.9 * right + 0.1 * (logits.argmax(-1) == targets).float().mean().item()
            if step % 50 == 0:
                tell(f"{variant} at {distance}: step {step} of {steps}, accuracy {100 * right:.1f} %")
            if right > request.enough:
                break
        accuracy = _accuracy(model, request, distance, rng)
        tell(f"{variant} at {distance}: {100 * accuracy:.1f} % after {step} steps")
        yield Recall(variant, seed, distance, accuracy, step, time.monotonic() - started)


@torch.no_grad()
def _accuracy(model: PerformerLM, request: RecallRequest, distance: int, rng: torch.Generator) -> float:
    hits = []
    for _ in range(8):
        ids, targets = sequences(request, distance, request.batch, rng)
        hits.append((model(ids)[:, -request.pairs :].argmax(-1) == targets[:, -request.pairs :]).float().mean())
    return torch.stack(hits).mean().item()
