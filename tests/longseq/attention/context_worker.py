"""One rank of the tests of context parallelism: every case over groups of P ranks against the whole sequence.

``python context_worker.py RANK WORLD STORE RESULT``: rank 0 writes what each rank has found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import ContextGroup, exact_attention, favor_attention
from longseq.attention.context.group import Traffic
from longseq.attention.options import AttentionOptions
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq_data.samples.slices import sliced
from longseq_data.vocabulary import IGNORE
from mixing import MODERN, mix

BATCH, HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 2, 8, 6, 24

PLACES = ("q", "k", "v", "dout")

# What is asked of attention, and the length: 37 and 301 divide by neither 2 nor 4. From 256 positions a slice on, some
# are computed while states travel.
CASES: dict[str, dict] = {
    "causal": {"length": 37, "causal": True},
    "causal, long": {"length": 1301, "causal": True},
    "bidirectional": {"length": 37},
    "bidirectional, padded": {"length": 301, "padded": True},
    "packed": {"length": 301, "causal": True, "packed": 40},
    "packed, long": {"length": 1301, "causal": True, "packed": 500},
    "packed, bidirectional": {"length": 301, "packed": 100},
    "window": {"length": 301, "causal": True, "window": 9},
    "window, bidirectional": {"length": 301, "window": 9},
    "window longer than a slice": {"length": 37, "causal": True, "window": 25},
    "window longer than a slice, bidirectional": {"length": 37, "window": 25},
    "window longer than the sequence": {"length": 37, "causal": True, "window": 100},
    "window alone": {"length": 37, "causal": True, "window": 5, "features": 0},
    "packed window": {"length": 301, "causal": True, "window": 9, "packed": 60},
    "packed window, long": {"length": 1301, "causal": True, "window": 70, "packed": 600},
    "packed window, bidirectional": {"length": 301, "window": 9, "packed": 60},
    "decay": {"length": 301, "causal": True, "decays": True},
    "decay, bidirectional": {"length": 301, "decays": True},
    "everything": {"length": 1301, "causal": True, "window": 9, "packed": 400, "decays": True, "shares": True},
    "everything, bidirectional": {"length": 301, "window": 9, "packed": 60, "decays": True, "shares": True},
    "everything, padded": {"length": 1301, "causal": True, "window": 9, "padded": True, "decays": True},
    "gate": {"length": 301, "causal": True, "gates": True},
    "gate, long": {"length": 1301, "causal": True, "gates": True, "packed": 900},
    "gate, bidirectional": {"length": 301, "gates": True},
    "gate, everything": {"length": 301, "causal": True, "window": 9, "packed": 60, "gates": True, "shares": True},
    "gate, everything, bidirectional": {"length": 301, "window": 9, "packed": 60, "gates": True, "shares": True},
    "gate, everything, padded": {"length": 301, "causal": True, "window": 9, "padded": True, "gates": True},
    "gate, a window longer than a slice": {"length": 37, "window": 25, "gates": True},
    "gate, window alone": {"length": 37, "causal": True, "window": 5, "features": 0, "gates": True},
    "gate, an empty slice": {"length": 5, "causal": True, "packed": 2, "gates": True},
    "gate, exact": {"length": 37, "causal": True, "gates": True, "exact": True},
    "gate, exact, everything": {"length": 301, "padded": True, "packed": 100, "gates": True, "exact": True},
    # Slices of 2, 2, 1 and no tokens, and of 1, 1, 1 and none: what is missing is padding.
    "an empty slice": {"length": 5, "causal": True, "decays": True},
    "an empty slice, bidirectional": {"length": 5},
    "an empty slice, packed": {"length": 5, "causal": True, "packed": 2},
    "fewer positions than slices": {"length": 3, "causal": True, "window": 2, "packed": 2, "decays": True},
    "fewer positions than slices, bidirectional": {"length": 3, "window": 2, "packed": 2, "decays": True},
    "fewer positions than slices, exact": {"length": 3, "packed": 2, "exact": True},
    "exact": {"length": 37, "causal": True, "exact": True},
    "exact, everything": {"length": 37, "padded": True, "packed": 10, "decays": True, "exact": True},
    "exact, causal, everything": {
        "length": 301,
        "causal": True,
        "padded": True,
        "packed": 100,
        "decays": True,
        "exact": True,
    },
    **{
        f"kernel {kernel}": {"length": 301, "causal": True, "kernel": kernel}
        for kernel in ("hyperbolic", "oprf", "smreg", "relu", "relu_direct", "sigmoid", "exp", "abs", "elu")
    },
    **{
        f"kernel {kernel}": {"length": 301, "causal": True, "kernel": kernel, "common": 0.5}
        for kernel in ("trigonometric", "gelu", "cos", "tanh", "identity")
    },
    "kernel trigonometric, bidirectional": {"length": 301, "kernel": "trigonometric"},
    # NaN reaches what sees it, on any rank, and nothing else: in q, k, v or the gradient, at these positions.
    **{
        f"NaN in {('q', 'k', 'v', 'dout')[what]}, {name}": {"nan": (what, 170), **case}
        for what in range(len(PLACES))
        for name, case in {
            "causal": {"length": 301, "causal": True},
            "bidirectional": {"length": 301},
            "packed window": {"length": 301, "causal": True, "window": 9, "packed": 40, "decays": True, "shares": True},
            "packed window, bidirectional": {"length": 301, "window": 9, "packed": 40},
            "window alone": {"length": 301, "causal": True, "window": 9, "features": 0},
            "exact": {"length": 301, "causal": True, "packed": 40, "exact": True},
        }.items()
    },
}


def attend(case: dict, context: ContextGroup | None, backend: str) -> list[Tensor]:
    """Output and gradients of the whole sequence, from this rank's slice of it."""
    length, common = case["length"], case.get("common", 0.0)
    rng = torch.Generator().manual_seed(length)
    sizes = (HEAD_DIM, HEAD_DIM, VALUE_DIM, VALUE_DIM)
    dtype = torch.float64 if common or case.get("kernel") == "trigonometric" else torch.float32  # sums cancel
    q, k, v, dout = (torch.randn(BATCH, HEADS, length, size, generator=rng, dtype=dtype) for size in sizes)
    q, k = q + common, k + common
    if "nan" in case:
        what, at = case["nan"]
        (q, k, v, dout)[what][0, 1, at, 3] = torch.nan
    padding = torch.rand(BATCH, length, generator=rng) < 0.9 if case.get("padded") else None
    borders = torch.rand(BATCH, length, generator=rng) < 1 / case.get("packed", 1)
    segments = borders.cumsum(1) % 3 if "packed" in case else None  # numbers come again
    options: dict = {"causal": case.get("causal", False)}
    learned = []
    for name, key, value in (("shares", "far_share", -0.5), ("decays", "decay", 0.02)):
        if case.get(name):
            options[key] = torch.linspace(value, 2 * value, HEADS).requires_grad_()
            learned.append(options[key])
    gate = F.logsigmoid(2 * torch.randn(BATCH, HEADS, length, generator=rng, dtype=dtype) + 1)
    parts = 1 if context is None else context.size
    rank = 0 if context is None else context.rank
    size = -(-length // parts)

    def mine(x: Tensor, dim: int, fill: float = 0) -> Tensor:
        behind = [0, 0] * (x.ndim - 1 - dim) + [0, size * parts - length]
        return F.pad(x, behind, value=fill).narrow(dim, rank * size, size)

    if context is not None and (padding is not None or size * parts > length):
        padding = torch.ones(BATCH, length, dtype=torch.bool) if padding is None else padding
        padding = mine(padding, 1)
        if padding.all():
            padding = None  # of this rank alone
    if context is not None and segments is not None:
        segments = mine(segments, 1, -1)
    q, k, v, dout, gate = (mine(x, 2).contiguous().requires_grad_() for x in (q, k, v, dout, gate))
    gates = [gate] if case.get("gates") else []
    options["gate"] = gate if gates else None
    hidden = {"key_padding": padding, "segments": segments}
    if case.get("exact"):
        out = exact_attention(q, k, v, **options, **hidden, context=context)
    else:
        kernel, features, window = case.get("kernel", "softmax"), case.get("features", FEATURES), case.get("window", 0)
        options |= {"kernel": kernel, "features": features, "window": window, "backend": backend}
        out = favor_attention(q, k, v, **options, **hidden, context=context)
    grads = torch.autograd.grad((out * dout.detach()).sum(), [q, k, v, *gates, *learned], allow_unused=True)
    if context is None:
        return [out.detach(), *(x for x in grads if x is not None)]
    of_slices = 3 + len(gates)
    slices = [context.gather_rows(x) for x in (out.detach(), *grads[:of_slices])]
    shares = [context.gather_rows(x).sum(0) for x in grads[of_slices:] if x is not None]
    return [torch.cat(list(x), dim=2)[:, :, :length] for x in slices] + shares


def error(case: dict, context: ContextGroup, backend: str) -> float:
    pairs = list(zip(attend(case, context, backend), attend(case, None, backend), strict=True))
    return max(difference(a, b) for a, b in pairs)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a part of b's largest number; infinite where only one is NaN."""
    if not torch.equal(a.isnan(), b.isnan()):
        return torch.inf
    a, b = a.nan_to_num(), b.nan_to_num()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


EXACT = AttentionOptions(kind="exact", learned_decay=True)

# Models: loss and the gradient of every weight.
MODELS: dict[str, dict] = {
    "causal": {"causal": True},
    "causal, everything": {
        "causal": True, "packed": True, "window": 9, "learned_share": True, "learned_decay": True, "qk_norm": True,
        "sequence_tile": 20,
    },
    "learned positions, as many as tokens": {"causal": False, "position": "learned", "max_positions": 301},
    "a plan of layers": {"causal": True, "packed": True, "layers": (AttentionOptions(window=9, features=24), EXACT)},
    "masked, a plan of layers in tiles": {
        "causal": False, "sequence_tile": 20, "layers": (EXACT, AttentionOptions(features=24)),
    },
    "oprf": {"causal": True, "kernel": "oprf"},  # whose constant comes from the moments of all slices
    "aderf": {"causal": True, "kernel": "aderf", "learned_covariance": True, "window": 9},  # and these from theirs
    "masked": {"causal": False},
    "masked, everything": {
        "causal": False, "packed": True, "window": 9, "learned_share": True, "learned_decay": True, "qk_norm": True,
        "activation_checkpointing": True,
    },
    "modern": {"causal": True, "packed": True, "window": 9, **MODERN},
    "modern, in tiles": {"causal": True, "sequence_tile": 20, **MODERN},
    "gates in tiles, a plan of layers": {
        "causal": True, "packed": True, "sequence_tile": 20, "layers": (
            AttentionOptions(features=24, window=9, forget_gate=True), AttentionOptions(kind="exact", forget_gate=True),
        ),
    },
    "masked modern": {"causal": False, "packed": True, "activation_checkpointing": True, **MODERN, "conv": 5},
    "a convolution wider than a slice": {"causal": True, "conv": 200},
}  # fmt: skip


def train(options: dict, context: ContextGroup | None) -> list[Tensor]:
    """The mean loss of two sequences of 301 tokens, half of them scored, and its gradients."""
    torch.manual_seed(0)
    packed = options.get("packed", False)
    spec = {name: value for name, value in options.items() if name != "packed"}
    model = PerformerLM(PerformerSpec(vocabulary=29, dim=16, depth=2, heads=2, ffn_dim=32, features=24, **spec))
    mix(model)
    with torch.no_grad():
        for block in model.blocks:
            if block.attention.frame is not None:
                block.attention.frame.constants.zero_()  # to be found
        model.head.weight.mul_(20)  # so that the loss has something to say
    model.set_context(context)
    tokens, targets = torch.randint(25, (2, 301)), torch.randint(25, (2, 301))
    targets[torch.rand(2, 301) < 0.5] = IGNORE
    batch = {"tokens": tokens, "targets": targets}
    if packed:
        batch["segments"] = (torch.rand(2, 301) < 0.02).cumsum(1)
    count = (targets != IGNORE).sum()
    if context is not None:
        batch = sliced(batch, context.rank, context.size, pad=27)
    logits = model(batch["tokens"], batch["tokens"] != 27, batch.get("segments"))
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
    loss = loss / count
    loss.backward()
    found = [loss.detach()[None], *(x.grad for x in model.parameters() if x.grad is not None)]
    return found if context is None else [context.gather_rows(x).sum(0) for x in found]


def model_error(options: dict, context: ContextGroup) -> float:
    return max(difference(a, b) for a, b in zip(train(options, context), train(options, None), strict=True))


def bytes_sent(context: ContextGroup, length: int, causal: bool, window: int | None) -> dict[str, int]:
    """What this rank hands over in one layer, forward and backward. window: None is exact attention."""
    context.traffic = Traffic()
    q, k, v = (torch.randn(1, 2, length // context.size, 4, requires_grad=True) for _ in range(3))
    if window is None:
        exact_attention(q, k, v, causal=causal, context=context).sum().backward()
    else:
        favor_attention(q, k, v, causal=causal, features=8, window=window, context=context).sum().backward()
    return vars(context.traffic).copy()


def main(rank: int, world: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {}
    for parts in (1, 2, 4):
        for first in range(0, world, parts):
            group = dist.new_group(list(range(first, first + parts)))
            if first <= rank < first + parts:
                groups[parts] = ContextGroup(group)
    found: dict = {"errors": {}, "sent": {}}
    for name, case in CASES.items():
        backends = ("torch",) if "exact" in case else ("torch", "auto")
        found["errors"][name] = {
            f"{backend} {parts}": error(case, group, backend)
            for backend in backends
            for parts, group in groups.items()
            if parts > 1 or backend == "auto"
        }
    for name, options in MODELS.items():
        found["errors"]["model " + name] = {str(parts): model_error(options, group) for parts, group in groups.items()}
    for length in (1 << 12, 1 << 18):
        for causal, window in ((True, 0), (False, 0), (True, 16)):
            found["sent"][f"{length} {causal} {window}"] = bytes_sent(groups[4], length, causal, window)
    for causal in (True, False):
        found["sent"][f"exact {causal}"] = bytes_sent(groups[4], 64, causal, None)
    everyone: list = [None] * world
    dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(result).write_text(json.dumps(everyone))
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
