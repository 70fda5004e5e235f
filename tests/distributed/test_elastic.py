"""A run goes on with other processes, another ZeRO stage, another strategy: the same samples, the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import checkpoint, checkpoints, curve, largest_difference, longseq

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4  # nats, over 10 steps; one record's loss in another place moves a step by about 1e-2
HALF, WHOLE = 10, 20


def layout(devices: int, stage: int) -> tuple[str, ...]:
    return (f"trainer.devices={devices}", f"trainer.zero_stage={stage}")


@pytest.fixture(scope="module")
def unbroken(fit: Callable[..., Path]) -> Callable[..., Path]:
    """unbroken(how): 20 steps trained with some overrides, with a checkpoint in the middle."""
    return lambda how: fit(f"whole-{name_of(how)}", *how, f"trainer.checkpoint_every={HALF}")


@pytest.fixture(scope="module")
def resumed(
    folder: Path, unbroken: Callable[..., Path], stopped: Callable[..., Path]
) -> Callable[[tuple[str, ...], tuple[str, ...]], Path]:
    """resumed(before, after): 10 steps trained with some overrides, and 10 more with others on top of them."""

    def resumed(before: tuple[str, ...], after: tuple[str, ...]) -> Path:
        run = stopped(unbroken(before), f"{name_of(before)}-to-{name_of(after)}", HALF)
        ended = longseq("resume", run, *after, "trainer.slow_factor=0", folder=folder)
        assert ended.code == 0, ended.err
        assert "warning" not in ended.err
        assert checkpoints(run) == [HALF, WHOLE]
        return run

    return resumed


def name_of(how: tuple[str, ...]) -> str:
    return "-".join(part.split(".")[-1].replace("=", "-") for part in how)


def assert_goes_on_as(unbroken: Path, run: Path, tolerance: float = TOLERANCE) -> None:
    for tag in ("train/loss", "train/accuracy", "train/gradient_norm", "train/learning_rate", "valid/loss"):
        assert largest_difference(curve(run, tag), curve(unbroken, tag)) <= tolerance, tag


FAST = [
    *(((1, 1), (2, 1)), ((2, 2), (1, 2)), ((2, 3), (4, 3))),  # other processes
    *(((2, 2), (2, 3)), ((2, 3), (2, 2))),  # another stage
]
SAME_STAGE = [((n, stage), (m, stage)) for stage in (0, 1, 2, 3) for n, m in ((1, 2), (2, 1), (2, 4), (4, 2))]
OTHER_STAGE = [((2, a), (2, b)) for a in (0, 1, 2, 3) for b in (0, 1, 2, 3) if a != b]
BOTH = [((4, 3), (1, 0)), ((1, 0), (4, 3)), ((4, 2), (2, 3)), ((2, 3), (4, 2))]


@pytest.mark.parametrize(("before", "after"), FAST)
def test_another_world_or_stage_goes_on_with_the_same_losses(one_process, resumed, before, after):
    assert_goes_on_as(one_process, resumed(layout(*before), layout(*after)))


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [case for case in SAME_STAGE + OTHER_STAGE + BOTH if case not in FAST])
def test_every_change_of_world_and_stage_goes_on_with_the_same_losses(one_process, resumed, before, after):
    assert_goes_on_as(one_process, resumed(layout(*before), layout(*after)))


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("devices", "others"), [(2, 3), (3, 2)])
def test_worlds_that_do_not_divide_each_other_go_on_with_the_same_losses(unbroken, resumed, devices, others, stage):
    six = "data.batch_tokens=384"  # sequences a step, which both share evenly
    assert_goes_on_as(unbroken((*layout(1, 1), six)), resumed((*layout(devices, stage), six), layout(others, stage)))


def test_the_step_is_shared_out_anew_between_accumulated_batches(one_process, resumed):
    """Lightning counts batches: the validation after step 20 must still be the one after step 20."""
    run = resumed(layout(2, 2), (*layout(1, 2), "trainer.accumulate=4"))
    assert_goes_on_as(one_process, run)
    assert list(curve(run, "valid/loss")) == [10, 20]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("trainer.strategy=single",), ("trainer.strategy=deepspeed", *layout(2, 3))),
        (layout(2, 2), ("trainer.strategy=ddp", "trainer.devices=2")),
        pytest.param(
            ("trainer.strategy=ddp", "trainer.devices=2"),
            ("trainer.strategy=single", "trainer.devices=1"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_another_strategy_goes_on_with_the_same_losses(one_process, resumed, before, after):
    assert_goes_on_as(one_process, resumed(before, after))


def master_weights(saved: Path) -> dict[str, torch.Tensor]:
    """Every fp32 weight of a checkpoint in one piece."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for shard in (saved / "training").glob("rank-*.safetensors"):
        for key, tensor in load_file(shard).items():
            kind, start, name = key.split(":", 2)
            if kind == "fp32":
                pieces.setdefault(name, {})[int(start)] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def test_bf16_keeps_its_master_weights_from_one_stage_to_another(resumed):
    """At a rate of 0 they stay what they were, to the last bit: they did not go by way of the model's bf16 weights."""
    run = resumed((*layout(2, 2), "trainer.precision=bf16"), (*layout(2, 3), "optim.lr=0"))
    before, after = (master_weights(checkpoint(run, step)) for step in (HALF, WHOLE))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in before.values())


# ZeRO-2 is shown by test_interruptions.
SAME = [
    ("trainer.strategy=ddp", "trainer.devices=2"),
    pytest.param(layout(2, 3), marks=pytest.mark.interfaces),
    ("trainer.zero_stage=0", "trainer.precision=bf16"),
    *(pytest.param(how, marks=pytest.mark.long) for how in [("trainer.strategy=single",), layout(2, 0), layout(2, 1)]),
    *(
        pytest.param((f"trainer.zero_stage={stage}", "trainer.precision=bf16"), marks=pytest.mark.long)
        for stage in (1, 2, 3)
    ),
]


@pytest.mark.parametrize("how", SAME, ids=lambda how: "-".join(part.split("=")[1] for part in how))
def test_the_same_world_goes_on_to_the_last_bit(unbroken, resumed, how):
    assert_goes_on_as(unbroken(how), resumed(how, ()), tolerance=0)


def test_a_world_that_does_not_divide_the_step_is_refused_with_the_arithmetic(folder, unbroken, stopped):
    run = stopped(unbroken(layout(2, 2)), "three-do-not-divide-eight", HALF)
    ended = longseq("resume", run, "trainer.devices=3", folder=folder)
    assert ended.code == 1
    assert all(words in ended.sentence for words in ("512 / 64 = 8 sequences", "3 processes (trainer.devices)"))
    assert checkpoint(run, HALF).exists()
