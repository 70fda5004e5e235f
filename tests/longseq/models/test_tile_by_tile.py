"""Every kind of model that is read in tiles gives what one pass gives, in float64, whatever the tiles' size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from longseq.attention.options import SIGNED_KERNELS, AttentionOptions
from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

SPEC = PerformerSpec(vocabulary=11, dim=8, depth=3, heads=2, ffn_dim=12, causal=False, features=6, redraw_every=0)
ROW = np.random.default_rng(3).integers(0, 11, 37).astype(np.uint8)  # 10 is MASK
TILES = (1, 2, 5, 11, 23, 36)  # larger where a window or a convolution is

windows = ({}, {"window": 1}, {"window": 3}, {"window": 3, "learned_share": True}, {"window": 15})
fading = ({}, {"learned_decay": True}, {"forget_gate": True})
blocks = ({}, {"mask_scaling": True, "position": "learned", "max_positions": 37}, {**MODERN, "mask_scaling": True})


def combinations() -> Iterator[dict[str, object]]:
    for causal, window, fades, block in product((False, True), windows, fading, blocks):
        yield {"causal": causal, **window, **fades, **block}
    for kernel, causal in product(("oprf", "relu", "hyperbolic", *SIGNED_KERNELS), (False, True)):
        yield {"causal": causal, "kernel": kernel}
        if kernel not in SIGNED_KERNELS:
            yield {"causal": causal, "kernel": kernel, "window": 3, "forget_gate": True, **MODERN}
    for signed in SIGNED_KERNELS:
        yield {"causal": True, "kernel": signed, "learned_decay": True}
    plan = tuple(
        AttentionOptions(features=6, redraw_every=0, **more)
        for more in ({"window": 5, "learned_decay": True}, {"kernel": "relu"}, {"forget_gate": True})
    )
    yield from ({"causal": causal, "layers": plan, **MODERN} for causal in (False, True))
    yield {"window": 4, "features": 0}
    yield from ({"causal": causal, "kernel": "aderf", "learned_covariance": True} for causal in (False, True))


def built(**options: object) -> PerformerLM:
    torch.manual_seed(1)
    model = PerformerLM(replace(SPEC, **options)).eval().double()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(20)
            block.attention.out.weight.mul_(20)
            if block.attention.log_decay is not None:
                block.attention.log_decay.copy_(torch.tensor([-0.5, -4.0]))  # one head forgets, one remembers
            if block.attention.log_share is not None:
                block.attention.log_share.copy_(torch.tensor([-1.0, 0.5]))
    return mix(model)


def named(options: dict[str, object]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if key not in MODERN and key != "layers")


@torch.no_grad()
def compare(options: dict[str, object], sizes: tuple[int, ...]) -> None:
    wanted = built(**options).hidden(torch.from_numpy(ROW.astype(np.int64))[None])
    assert wanted.std() > 0.1
    for tile in sizes:
        model = built(**options, sequence_tile=tile)
        found = list(hidden_in_tiles(model, ROW))
        assert [start for start, _ in found] == list(range(0, len(ROW), model.spec.tile))
        assert len(found) > 1
        torch.testing.assert_close(torch.cat([x for _, x in found], 1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("number", "options"), enumerate(combinations()))
def test_tiles_give_what_one_pass_gives_in_float64(number, options):
    compare(options, (TILES[number % len(TILES)],))


@pytest.mark.long
@pytest.mark.parametrize("options", combinations(), ids=named)
def test_tiles_of_every_size_give_what_one_pass_gives_in_float64(options):
    compare(options, TILES)
