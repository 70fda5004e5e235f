"""``longseq bench quality``: the same small language model with every kind of attention, on character text.

Each file's last tenth is held out. A result is a function of (files, sizes, variant, seed) and of the code; each is
kept in a file of its own as soon as it is known, so a benchmark that was cut short goes on where it stopped. Processes
that are given different variants or seeds can fill one folder together. Another version of the code wants a fresh one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import FavorAttention
from longseq.benchmarks import half_precision, small_models
from longseq.benchmarks.request import QualityRequest
from longseq.benchmarks.variants import VARIANTS
from longseq.errors import LongseqError
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq_data.files import write_text
from longseq_data.os_errors import explained


@dataclass(frozen=True)
class Text:
    """Character ids of the training and of the held-out part."""

    train: Tensor
    valid: Tensor
    vocabulary: int
    fingerprint: str


@dataclass(frozen=True)
class Trial:
    """One trained model: held-out loss in nats a character, and that of the training's last 50 steps."""

    variant: str
    seed: int
    valid: float
    train: float
    seconds: float


def read_text(paths: Sequence[Path]) -> Text:
    """The files' characters; characters that the training part lacks become its most frequent one.

    Raises:
        LongseqError: for a file that cannot be read as UTF-8, or too little text.
    """
    parts = [_read_file(path) for path in sorted(paths)]
    train = "".join(part[: len(part) * 9 // 10] for part in parts)
    valid = "".join(part[len(part) * 9 // 10 :] for part in parts)
    ids = {character: number for number, character in enumerate(sorted(set(train)))}
    common = max(ids, key=train.count) if ids else ""
    as_tensor = [torch.tensor([ids.get(c, ids.get(common, 0)) for c in part]) for part in (train, valid)]
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    return Text(as_tensor[0], as_tensor[1], len(ids), digest)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LongseqError(f"{explained(error, path, 'cannot be read')}.") from None
    except UnicodeDecodeError as error:
        raise LongseqError(f"cannot read {path} as UTF-8 text: {error}.") from None


def measure(
    request: QualityRequest,
    text: Text,
    variants: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    tell: Callable[[str], None],
) -> list[Trial]:
    """Train every variant with every seed that ``folder`` holds no result of; all results of this request."""
    if len(text.valid) < 2 * request.length or len(text.train) < 2 * request.length:
        raise LongseqError(
            f"too little text for --length {request.length}: {len(text.train)} characters to train on and "
            f"{len(text.valid)} held out; give more files or a shorter length."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for variant in variants:
            kept = _path(folder, request, text, variant, seed)
            if not kept.exists():
                trial = _train(request, text, variant, seed, tell)
                write_text(kept, json.dumps({"request": asdict(request), "text": text.fingerprint} | asdict(trial)))
            tell(f"{variant}, seed {seed}: {_read(kept).valid:.4f} nats a character")
    return trials(request, text, folder)


def trials(request: QualityRequest, text: Text, folder: Path) -> list[Trial]:
    """The results of this request that the folder holds, in the order of VARIANTS."""
    found = [_read(path) for path in folder.glob(f"{_stem(request, text)}-*.json")]
    order = {name: number for number, name in enumerate(VARIANTS)}
    return sorted(found, key=lambda trial: (order.get(trial.variant, len(order)), trial.seed))


def table(request: QualityRequest, found: Iterable[Trial]) -> str:
    """Mean and spread of the held-out loss by variant, best first."""
    by_variant: dict[str, list[Trial]] = {}
    for trial in found:
        by_variant.setdefault(trial.variant, []).append(trial)
    rows = sorted(by_variant.items(), key=lambda row: fmean(t.valid for t in row[1]))
    lines = [
        f"{request.steps:,} steps of {request.batch} × {request.length} characters; {request.depth} layers, "
        f"dim {request.dim}, {request.heads} heads, {request.features} features, window {request.window}",
        f"{'variant':24}{'held out':>10}{'spread':>9}{'train':>9}{'seeds':>7}{'s/seed':>9}  what",
    ]
    for name, group in rows:
        losses = [trial.valid for trial in group]
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "–"
        lines.append(
            f"{name:24}{fmean(losses):10.4f}{spread:>9}{fmean(t.train for t in group):9.4f}{len(losses):7}"
            f"{fmean(t.seconds for t in group):9.0f}  {VARIANTS[name].about if name in VARIANTS else ''}"
        )
    return "\n".join(lines)


def spec_of(request: QualityRequest, variant: str, vocabulary: int, seed: int) -> PerformerSpec:
    """The model of one variant."""
    fields = VARIANTS[variant].fields(request.window, request.features, request.depth)
    return small_models.spec_of(request, vocabulary, seed, **fields)


def _train(request: QualityRequest, text: Text, variant: str, seed: int, tell: Callable[[str], None]) -> Trial:
    torch.manual_seed(seed)
    model = PerformerLM(spec_of(request, variant, text.vocabulary, seed))
    if VARIANTS[variant].half:
        for attention in (module for module in model.modules() if isinstance(module, FavorAttention)):
            attention.mix = functools.partial(_mix_rounded, attention)  # type: ignore[method-assign]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=request.lr, betas=(0.9, 0.98))
    crops = torch.Generator().manual_seed(seed)  # the same crops for every variant
    started = time.monotonic()
    last: list[float] = []

    def loss_of(step: int) -> Tensor:
        model.set_step(step - 1)
        starts = torch.randint(len(text.train) - request.length, (request.batch,), generator=crops)
        ids = torch.stack([text.train[start : start + request.length + 1] for start in starts])
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def note(step: int, loss: Tensor) -> bool:
        last[:] = [*last[-49:], loss.item()]
        if step % 50 == 0:
            tell(f"{variant}, seed {seed}: step {step} of {request.steps}, loss {fmean(last):.3f}")
        return False

    def rate(step: int) -> float:
        return request.lr * _schedule(step - 1, request.steps)

    small_models.train(model, optimizer, request.steps, rate, loss_of, note)
    seconds = time.monotonic() - started
    return Trial(variant, seed, _held_out_loss(model.eval(), text.valid, request), fmean(last), seconds)


def _mix_rounded(layer: FavorAttention, q: Tensor, k: Tensor, v: Tensor, *unused: None) -> Tensor:
    return half_precision.mix(layer, q, k, v)


@torch.no_grad()
def _held_out_loss(model: PerformerLM, ids: Tensor, request: QualityRequest) -> float:
    """Mean loss over consecutive, disjoint crops of the held-out part."""
    crops = (len(ids) - 1) // request.length
    inputs = ids[: crops * request.length].view(crops, -1)
    targets = ids[1 : crops * request.length + 1].view(crops, -1)
    total = 0.0
    for at in range(0, crops, request.batch):
        batch = slice(at, at + request.batch)
        logits = model(inputs[batch])
        total += F.cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), reduction="sum").item()
    return total / targets.numel()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _stem(request: QualityRequest, text: Text) -> str:
    asked = json.dumps(asdict(request), sort_keys=True) + text.fingerprint
    return f"L{request.length}-" + hashlib.blake2b(asked.encode(), digest_size=4).hexdigest()


def _path(folder: Path, request: QualityRequest, text: Text, variant: str, seed: int) -> Path:
    return folder / f"{_stem(request, text)}-{variant}-{seed}.json"


def _read(path: Path) -> Trial:
    kept = json.loads(path.read_text())
    return Trial(*(kept[name] for name in Trial.__dataclass_fields__))
