"""Every autograd function of the product: saved tensors are unpacked once, and a second derivative is refused.

The functions are found in the source, so that a new one without an example fails here.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.functional import hessian
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import longseq
from longseq.attention import ContextGroup, FavorAttention, exact_attention, favor_attention, fused, rotary_table
from longseq.attention.call import Call
from longseq.attention.carried import carried_attention
from longseq.attention.context.halo import neighbourhood
from longseq.attention.convolution import ShortConvolution
from longseq.attention.heads import lay_out, split_heads
from longseq.attention.narrow import _Narrowed
from longseq.attention.rotary import rotate
from longseq.attention.scan import Rows
from longseq.attention.tiles import pointwise, recurrence
from longseq.benchmarks import half_precision
from longseq.models.head import Head
from longseq.models.mlp import SquaredReLU, SwiGLU
from longseq.models.norm import Norm, RMSNorm

BATCH, HEADS, LENGTH, DIM = 1, 2, 70, 8
Function = Callable[..., Tensor]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContextGroup]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield ContextGroup(dist.group.WORLD)
    dist.destroy_process_group()


def attention(backend: str, **options: object) -> Function:
    def function(context: ContextGroup, *qkv: Tensor) -> Tensor:
        qkv = short(backend, qkv)
        share = torch.zeros(HEADS) if options.get("window") else None
        return favor_attention(*qkv, features=12, backend=backend, decay=decay(qkv), far_share=share, **options)

    return function


def short(backend: str, qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One chunk for Triton's interpreter, which takes its time for each."""
    return tuple(x[:, :, :20] for x in qkv) if backend == "triton" else qkv


def decay(qkv: tuple[Tensor, ...]) -> Tensor:
    return qkv[0].mean((0, 2, 3)).exp() * 0.01  # so that its gradient is seen, too


def plain(backend: str) -> Function:
    return lambda context, *qkv: favor_attention(*short(backend, qkv), features=12, backend=backend)


def with_triton(way: Function) -> Function:
    def needs_triton(context: ContextGroup, *qkv: Tensor) -> Tensor:
        pytest.importorskip("triton")
        from longseq.attention.backends.triton import launch as triton_launch

        if not torch.cuda.is_available() and not triton_launch.INTERPRETED:
            pytest.skip("no GPU, and triton was imported uninterpreted")
        return way(context, *qkv)

    return needs_triton


def isolated(context: ContextGroup, *qkv: Tensor) -> Tensor:
    where = torch.zeros(BATCH, HEADS, LENGTH, 1, dtype=torch.bool)
    where[:, 1, LENGTH - 3 :] = True
    q, k, v = qkv
    out = favor_attention(q, k, v.masked_fill(where, torch.nan), causal=True, features=12)
    return out[:, :, : LENGTH - 3]


def carried(context: ContextGroup, *qkv: Tensor) -> Tensor:
    state: tuple[Tensor, ...] = ()
    parts = []
    for tile in ((0, 40), (40, LENGTH)):
        inputs = (x[:, :, slice(*tile)] for x in qkv)
        out, state = carried_attention(*inputs, state, Call.of(features=12, window=5, decay=decay(qkv)))
        parts.append(out)
    return torch.cat(parts, dim=2)


def halo(context: ContextGroup, *qkv: Tensor) -> Tensor:
    k, v, q = (x.flatten(0, 1) for x in qkv)
    rows = neighbourhood(context, Rows(q, k, v), None, 3, 2).rows
    return rows.k.square() * rows.v


def pointwise_(context: ContextGroup, *qkv: Tensor) -> Tensor:
    layer = FavorAttention(DIM, HEADS, causal=True, features=12)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.qkv.weight)
    torch.nn.init.normal_(layer.out.weight)
    learned = pointwise(lambda x, y: (x * x.exp() * y,), 16, qkv[:2], [])[0]
    return layer(learned.flatten(0, 1), tile=16)


def recurrence_(context: ContextGroup, *qkv: Tensor) -> Tensor:
    def piece(start: int, stop: int, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        q, k, v = (x[:, :, start:stop] for x in qkv)
        out, state = carried_attention(q, k, v, state, Call.of(features=12))
        return (out.square().sum(),), state

    return recurrence(piece, LENGTH, 16, list(qkv), device=qkv[0].device)[0]


def loss(context: ContextGroup, *qkv: Tensor) -> Tensor:
    head = Head(DIM, 11, bias=True)
    for number, x in enumerate(head.parameters()):
        torch.nn.init.normal_(x, generator=torch.Generator().manual_seed(number))
    return head(qkv[0] * qkv[1], torch.arange(BATCH * HEADS * LENGTH).view(BATCH, HEADS, LENGTH) % 11)[0]


def rounded(context: ContextGroup, *qkv: Tensor) -> Tensor:
    layer = FavorAttention(DIM * HEADS, HEADS, causal=True, window=5, features=12, learned_decay=True)
    return half_precision.mix(layer, *qkv)


def fused_(way: Function) -> Function:
    """On a CPU too."""

    def function(context: ContextGroup, *qkv: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as here:
            here.setattr(fused, "ELSEWHERE", True)
            return way(context, *qkv)

    return with_triton(function)


def heads(context: ContextGroup, *qkv: Tensor) -> Tensor:
    q, k, v = split_heads(torch.cat(qkv, -1).flatten(0, 1), 1, rotary_table(torch.arange(LENGTH), DIM))
    return q.square() * k + v


def convolved(context: ContextGroup, *qkv: Tensor) -> Tensor:
    convolution = ShortConvolution(DIM, 3, causal=True)
    torch.nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(0))
    documents = torch.arange(LENGTH)[None].expand(BATCH * HEADS, -1) // 30
    return convolution(qkv[0].flatten(0, 1), segments=documents).square().view_as(qkv[1]) * qkv[1]


def narrowed(context: ContextGroup, *qkv: Tensor) -> Tensor:
    return _Narrowed.apply(torch.bfloat16, *qkv)[0].float().square() * qkv[1]


def sliced(**options: object) -> Function:
    def function(context: ContextGroup, *qkv: Tensor) -> Tensor:
        return favor_attention(*qkv, features=12, context=context, causal=True, decay=decay(qkv), **options)

    return function


# Of each function those ways to call it that run through it, with the names it is told by in refusals. Linear ones are
# followed by a square: their own second derivative is the zero that autograd gives.
EXAMPLES: dict[str, list[Function]] = {
    "attention/operations.py:_Differentiated": [
        attention("torch", causal=True),
        attention("native", causal=True),
        carried,
        attention("torch", causal=True, window=5),
        attention("torch", window=5),
        attention("native", causal=True, window=5),
        attention("native", window=5),
        with_triton(attention("triton", causal=True, window=5)),
        plain("torch"),
        plain("native"),
        with_triton(plain("triton")),
    ],
    "attention/near_and_far.py:_NearAndFar": [fused_(attention("triton", causal=True, window=5))],
    "attention/near_and_far.py:_Rates": [fused_(attention("triton", causal=True))],
    "attention/context/whole.py:_Whole": [lambda context, *qkv: favor_attention(*qkv, features=12, context=context)],
    "attention/isolation.py:_Entry": [isolated],
    "attention/isolation.py:_Exit": [isolated],
    "attention/context/parallel.py:_Relay": [sliced(), sliced(window=5)],
    "attention/context/halo.py:_Halo": [halo],
    "attention/context/ring.py:_Ring": [
        lambda context, *qkv: exact_attention(*qkv, causal=True, decay=decay(qkv), context=context)
    ],
    "attention/rotary.py:_Rotation": [
        lambda context, *qkv: rotate(qkv[0], rotary_table(torch.arange(LENGTH), DIM)).square() * qkv[1]
    ],
    "attention/heads.py:_Heads": [fused_(heads)],
    "attention/heads.py:_Rounded": [
        lambda context, *qkv: lay_out(qkv[0].flatten(0, 1), BATCH, HEADS, torch.bfloat16).float().square() * qkv[1]
    ],
    "models/norm.py:_Norm": [fused_(lambda context, *qkv: math.prod(Norm(DIM, 1e-5)(qkv[0], qkv[1])))],
    "models/norm.py:_RMSNorm": [lambda context, *qkv: RMSNorm(DIM, 1e-5)(qkv[0] * qkv[1])],
    "models/mlp.py:_Gated": [lambda context, *qkv: SwiGLU()(torch.cat(qkv[:2], -1))],
    "models/mlp.py:_Squared": [lambda context, *qkv: SquaredReLU()(qkv[0] * qkv[1])],
    "attention/convolution.py:_Convolution": [convolved],
    "attention/narrow.py:_Narrowed": [narrowed],
    "attention/tiles.py:_Pointwise": [pointwise_],
    "attention/tiles.py:_Recurrence": [recurrence_],
    "models/head.py:_Loss": [loss],
    "benchmarks/half_precision.py:_Operand": [rounded],
}
LINEAR = ("_Halo", "_Rotation", "_Heads", "_Rounded", "_Narrowed", "_Convolution")
REFUSAL = "_Final"  # the node that refuses
WAYS = [pytest.param(name, way, id=f"{name}-{n}") for name, ways in EXAMPLES.items() for n, way in enumerate(ways)]
every_way = pytest.mark.parametrize(("name", "way"), WAYS)


def test_every_autograd_function_has_an_example() -> None:
    root = Path(longseq.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                found.add(f"{file.relative_to(root).as_posix()}:{node.name}")
    assert found - {f"attention/first_order.py:{REFUSAL}"} == set(EXAMPLES)


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, DIM, generator=rng).requires_grad_() for _ in "qkv"]


def gradients(out: Tensor, wanted: list[Tensor], **options: bool) -> list[Tensor | None]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True, **options))


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert any(x is not None and x.any() for x in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None or torch.equal(one, torch.zeros_like(one))) if other is None else torch.equal(one, other)


def runs_through(out: Tensor, name: str) -> bool:
    kind, seen, open_ = name.split(":")[1] + "Backward", set(), [out.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            if type(node).__name__ == kind:
                return True
            seen.add(node)
            open_ += [following for following, _ in node.next_functions]
    return False


@every_way
def test_each_saved_tensor_is_unpacked_once(name: str, way: Function, context: ContextGroup) -> None:
    x = inputs()
    out = way(context, *x)
    assert runs_through(out, name)
    expected = gradients(out, x)
    packed: list[Tensor | None] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(number: int) -> Tensor:
        tensor, packed[number] = packed[number], None
        assert tensor is not None, "unpacked twice"
        return tensor

    with saved_tensors_hooks(pack, unpack):
        out = way(context, *x)
    assert_equal(gradients(out, x), expected)


@every_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it_gives_the_same_gradients(
    name: str, way: Function, reentrant: bool, context: ContextGroup
) -> None:
    if reentrant and name.endswith("_Recurrence"):
        pytest.skip("its inputs are its closure's, which a reentrant checkpoint does not differentiate")
    x = inputs()
    expected = gradients(way(context, *x), x)
    out = checkpoint(lambda *x: way(context, *x), *x, use_reentrant=reentrant)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    assert_equal([one.grad for one in x], expected)


@every_way
def test_second_derivatives_are_refused_and_first_ones_are_right(
    name: str, way: Function, context: ContextGroup
) -> None:
    x = inputs()
    weights = [torch.ones((), requires_grad=True) for _ in x]
    expected = gradients(way(context, *x), x)
    # A gradient penalty: the incoming gradient is a constant, but the function has seen ``weights``.
    found = gradients(way(context, *(a * w for a, w in zip(x, weights, strict=True))), x, create_graph=True)
    assert_equal([None if a is None else a.detach() for a in found], expected)
    sentence = "first derivatives only: a gradient taken with create_graph=True cannot be differentiated again"
    if name.endswith(LINEAR):
        found = found[:1]
    for penalty in (a.square().sum() for a in found if a is not None and a.any()):
        with pytest.raises(RuntimeError, match=sentence):
            torch.autograd.grad(penalty, weights, retain_graph=True, allow_unused=True)
    # The incoming gradient depends on the inputs.
    first = torch.autograd.grad(way(context, *x).square().sum(), x[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=sentence):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match=sentence):
        hessian(lambda q: way(context, q, *(a.detach() for a in x[1:])).square().sum(), x[0].detach())
    if not name.endswith(LINEAR):
        with pytest.raises(RuntimeError, match=sentence):
            hessian(lambda q: way(context, q, *(a.detach() for a in x[1:])).sum(), x[0].detach())


@every_way
def test_a_graph_that_is_retained_gives_the_same_gradients_twice(
    name: str, way: Function, context: ContextGroup
) -> None:
    x = inputs()
    out = way(context, *x)
    assert_equal(gradients(out, x, retain_graph=True), gradients(out, x))
