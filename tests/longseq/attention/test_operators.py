"""Attention's operators under opcheck, torch.compile, fake tensors, torch.export, vmap and autocast."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from longseq.attention import FavorAttention, favor_attention, projection_matrix, rotary_table
from longseq.attention.call import Call
from longseq.attention.carried import carried_attention
from longseq.attention.feature_maps import feature_map
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

ROWS, LENGTH, DIM, VALUES, FEATURES = 2, 70, 8, 5, 12
SHORT = 20  # one chunk for Triton's interpreter, which takes its time for each
BACKENDS = ("torch", "native", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS: list[dict[str, object]] = [
    {},
    {"causal": True},
    {"causal": True, "window": 5},
    {"window": 5, "kernel": "relu"},
    {"causal": True, "kernel": "cos"},
]


@pytest.fixture(autouse=True)
def no_poison() -> None:
    """A compiler takes it for a setting of the program, and opcheck compares memory that nobody has written."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def inputs(batch: int = 1, heads: int = 2, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = DIM, DIM, VALUES
    return [torch.randn(batch, heads, length, n, generator=rng, dtype=dtype).requires_grad_() for n in sizes]


def rows(dtype: torch.dtype = torch.float32, backend: str = "torch") -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """q, k, v; decay, hidden and runs."""
    rng, length = torch.Generator().manual_seed(1), SHORT if backend == "triton" else LENGTH
    hidden = torch.rand(ROWS, length, generator=rng) < 0.2
    runs = (torch.rand(ROWS, length, generator=rng) > 0.95).cumsum(1)
    decay = torch.tensor([0.02, 0.3]).view(ROWS, 1, 1).requires_grad_()
    return [x[0].detach().to(dtype).requires_grad_() for x in inputs(length=length)], decay, hidden, runs


def needs(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_passes_for_the_scan_from_nothing_and_from_a_state(backend, dtype):
    needs(backend)
    qkv, decay, hidden, runs = rows(dtype, backend)
    phi = feature_map("oprf", FEATURES, DIM, oprf_a=-0.1, operands=dtype).parts()
    torch.library.opcheck(
        torch.ops.longseq.scan, (*qkv, decay, hidden, runs, *phi, backend, 3, False, True, None, None)
    )
    sums = torch.rand(ROWS, FEATURES, VALUES + 1).requires_grad_()
    state = sums, torch.zeros(ROWS, 1, 1)
    torch.library.opcheck(torch.ops.longseq.scan, (*qkv, decay, None, None, *phi, backend, 3, True, True, *state))


@backends
def test_opcheck_passes_for_the_window_and_for_keys_on_both_sides(backend):
    needs(backend)
    qkv, decay, hidden, runs = rows(backend=backend)
    phi = feature_map("relu", FEATURES, DIM).parts()
    torch.library.opcheck(torch.ops.longseq.window, (*qkv, decay, hidden, runs, *phi, backend, 7, True))
    torch.library.opcheck(torch.ops.longseq.bidirectional, (*qkv, None, hidden, None, *phi, backend))


def with_gradients(function: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    out = function(*qkv)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad((out * direction).sum(), qkv)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_attention_compiles_to_one_graph_and_gives_the_same(options, backend):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = None if options == {} or "kernel" in options else torch.tensor([0.1, 0.2])
        return favor_attention(q, k, v, features=FEATURES, backend=backend, decay=decay, **options)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, inputs()), with_gradients(attention, inputs()))


def test_interpreted_triton_compiles_to_one_graph():
    needs("triton")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return favor_attention(q, k, v, features=FEATURES, backend="triton", causal=True, window=5)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected = with_gradients(attention, inputs(length=SHORT))
    torch.testing.assert_close(with_gradients(compiled, inputs(length=SHORT)), expected)


def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = Call.of(features=FEATURES, window=5)
    out, state = carried_attention(*(x[:, :, :40] for x in (q, k, v)), (), call)
    return torch.cat((out, carried_attention(*(x[:, :, 40:] for x in (q, k, v)), state, call)[0]), 2)


def test_carried_tiles_compile_to_one_graph_and_give_the_same():
    compiled = torch.compile(tiles, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, inputs()), with_gradients(tiles, inputs()))


def test_lengths_change_without_a_compilation_each():
    counter = torch._dynamo.testing.CompileCounter()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return favor_attention(q, k, v, features=FEATURES, causal=True, window=5)

    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for length in (70, 71, 130, 200, 257):
        qkv = inputs(length=length)
        torch.testing.assert_close(compiled(*qkv), attention(*qkv))
    assert counter.frame_count == 2  # the second length makes it a variable


def model(**options: object) -> PerformerLM:
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "heads": 2, "ffn_dim": 24, "features": FEATURES}
    return mix(PerformerLM(PerformerSpec(vocabulary=11, **sizes, **options)))


def losses(net: nn.Module, of: PerformerLM) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(11, (2, 2, LENGTH), generator=rng)
    loss, correct = net(tokens, None, None, targets)
    parameters = [p for p in of.parameters() if p.requires_grad]
    return [loss, correct, *torch.autograd.grad(loss, parameters, materialize_grads=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 5, "learned_share": True, "learned_decay": True},
        {"causal": True, "position": "learned", "max_positions": LENGTH},
        {"causal": True, **MODERN},
        {"causal": False, "qk_norm": True, "conv": 3, "ffn": "relu2", "forget_gate": True},
    ],
    ids=str,
)
def test_a_whole_model_compiles_to_one_graph_forward_and_backward(options):
    net = model(**options)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses(compiled, net), losses(net, net), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_uses_the_projections_of_its_step():
    net = model(causal=True, redraw_every=10)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = []
    for step in (0, 10, 20, 30):
        net.set_step(step)
        torch.testing.assert_close(losses(compiled, net), losses(net, net), rtol=1e-4, atol=1e-5)
        found.append(losses(net, net)[0])
    assert len({x.item() for x in found}) == 4


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_one_program_serves_all_draws(backend):
    layer = FavorAttention(32, 2, causal=True, window=8, backend=backend)
    programs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        programs.append(graph)
        return graph.forward

    compiled, x, found = torch.compile(layer, fullgraph=True, backend=keep), torch.randn(1, 100, 32), []
    for layer.draw in range(12):  # more than a function may be compiled for
        found.append(compiled(x))
        assert torch.equal(found[-1], layer(x))
    assert len(programs) == 1
    assert not any(torch.equal(a, b) for a, b in pairwise(found))


def test_a_traced_projection_is_the_one_that_is_drawn():
    def draw(step: int) -> Tensor:
        return projection_matrix(20, 8, seed=3, layer=1, draw=step).mul_(1)  # may write into what it got

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 5):
        assert torch.equal(compiled(step), projection_matrix(20, 8, seed=3, layer=1, draw=step))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_have_the_shapes_dtypes_and_gradients_of_real_ones(options, backend):
    needs(backend)
    if backend != "torch" and options.get("kernel") == "cos":
        backend = "auto"
    length = SHORT if backend == "triton" else LENGTH
    qkv = [x.detach().bfloat16().requires_grad_() for x in inputs(length=length)]

    def results(*qkv: Tensor) -> list[Tensor]:
        out = favor_attention(*qkv, features=FEATURES, backend=backend, **options)
        return [out, *torch.autograd.grad(out.sum(), qkv)]

    real = results(*qkv)
    with FakeTensorMode() as mode:
        fake = results(*(mode.from_tensor(x) for x in qkv))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_a_layer_exports_and_its_program_gives_the_same():
    layer = FavorAttention(16, 2, causal=True, features=FEATURES, window=5, learned_decay=True, learned_share=True)
    x, rotary = torch.randn(2, LENGTH, 16), rotary_table(torch.arange(LENGTH), 8)
    program = torch.export.export(layer, (x,), {"rotary": rotary})
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    names = {str(node.target) for part in parts for node in part.graph.nodes}
    assert {"longseq.scan.default", "longseq.window.default", "longseq.projection.default"} <= names
    torch.testing.assert_close(program.module()(x, rotary=rotary), layer(x, rotary=rotary))


def test_vmap_is_refused_in_one_sentence():
    qkv = [torch.stack((x, x)) for x in inputs()]
    with pytest.raises(RuntimeError, match=r"not for torch.func.vmap: it takes .batch, heads, length, dim."):
        torch.func.vmap(lambda q, k, v: favor_attention(q, k, v, features=FEATURES, causal=True))(*qkv)


def test_operators_are_the_same_under_autocast():
    qkv, decay, hidden, runs = rows()
    phi = feature_map("softmax", FEATURES, DIM).parts()
    calls = [
        (torch.ops.longseq.scan, (*qkv, decay, hidden, runs, *phi, "torch", 0, False, True, None, None)),
        (torch.ops.longseq.window, (*qkv, decay, hidden, runs, "", None, None, 0.0, "torch", 7, True)),
        (torch.ops.longseq.bidirectional, (*qkv, None, hidden, None, *phi, "torch")),
    ]
    for operator, arguments in calls:
        expected = operator(*arguments)[0]
        with torch.autocast("cpu", torch.bfloat16):
            out = operator(*arguments)[0]
            grads = torch.autograd.grad(out.square().sum(), qkv)
        assert torch.equal(out, expected)
        wanted = torch.autograd.grad(expected.square().sum(), qkv)
        assert all(torch.equal(one, other) for one, other in zip(grads, wanted, strict=True))


def test_a_compiled_second_derivative_is_refused():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return favor_attention(q, k, v, features=FEATURES, causal=True)

    q, k, v = inputs()
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
    first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()
