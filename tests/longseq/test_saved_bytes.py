"""What the memory estimate says that a block saves for its backward pass, against what autograd is given to save."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from longseq.attention import KERNELS, fused
from longseq.attention.backends.native import build
from longseq.attention.backends.triton import launch as triton_launch
from longseq.attention.backends.triton import scan as triton_backend
from longseq.attention.feature_maps import feature_map
from longseq.attention.operations import scan
from longseq.attention.options import OWN_KERNELS
from longseq.attention.scan import Rows
from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.measure import memory
from longseq.measure.memory import block_bytes, estimate
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

SIZES = ("model.dim=64", "model.heads=2", "model.ffn_dim=96", "attention.features=16", "model.depth=1")
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=f"no native kernels: {build.unavailable()}")
KINDS = {
    "causal": (),
    "masked": ("model.objective=masked",),
    "window": ("attention.window=16",),
    "masked window": ("attention.window=16", "model.objective=masked"),
    "learned share and decay": ("attention.window=16", "attention.learned_share=true", "attention.learned_decay=true"),
    "gate": ("attention.forget_gate=true", "attention.window=16"),
    "masked gate": ("attention.forget_gate=true", "model.objective=masked"),
    "exact gate": ("attention.forget_gate=true", "attention.kind=exact"),
    "qk_norm": ("attention.qk_norm=true",),
    "relu": ("attention.kernel=relu",),
    "aderf": ("attention.kernel=aderf", "attention.window=16"),
    "learned covariance": ("attention.learned_covariance=true",),
    "rmsnorm": ("model.norm_kind=rmsnorm", "model.bias=false"),
    "swiglu": ("model.ffn=swiglu",),
    "relu2": ("model.ffn=relu2",),
    "conv": ("model.conv=4",),
    "value residual": ("model.value_residual=true",),
    "modern": ("model.block=modern",),
    "masked modern": ("model.block=modern", "model.objective=masked"),
    "exact modern": ("model.block=modern", "attention.kind=exact"),
}


def saved(spec: PerformerSpec, tokens: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of all storages that a forward pass saves, but for weights and buffers."""
    torch.manual_seed(0)
    model = PerformerLM(spec).to(dtype).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other gets its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def of_a_block(config: Config, dtype: torch.dtype) -> float:
    """Bytes a token that a second block adds."""
    spec = config.performer_spec(29)
    tokens = torch.randint(25, (config.batch_sequences, config.data.length))
    two, one = (saved(replace(spec, depth=depth), tokens, dtype) for depth in (2, 1))
    return (two - one) / tokens.numel()


@pytest.fixture
def loaded(folder):
    return lambda *overrides: load_config("small.yaml", ["data.train=proteins.fasta", *SIZES, *overrides])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_saves_what_the_estimate_says(loaded, kind, rows, backend, dtype):
    length = f"data.length={256 // rows}"
    config = loaded(*KINDS[kind], length, "data.batch_tokens=256", f"attention.backend={backend}")
    expected = block_bytes(config.performer_spec(29), config, dtype.itemsize)
    assert of_a_block(config, dtype) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["causal", "masked", "window", "qk_norm", "gate"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_with_triton_saves_what_the_estimate_says(monkeypatch, loaded, kind, rows, dtype):
    monkeypatch.setattr(fused, "ELSEWHERE", True)
    length = f"data.length={64 // rows}"
    config = loaded(*KINDS[kind], length, "data.batch_tokens=64", "attention.backend=triton")
    spec = config.performer_spec(29)
    assert memory.runs_triton(spec)
    expected = block_bytes(spec, config, dtype.itemsize, triton=True)
    assert of_a_block(config, dtype) == pytest.approx(expected, rel=0.1)


def test_triton_keeps_no_states_of_the_scan(loaded):
    config = loaded("model.preset=regular", "model.dim=512", "model.heads=8", "attention.features=256")
    spec = config.performer_spec(29)
    states = 4 * 8 * 256 * 65 / 128
    assert config.batch_sequences > 1
    fewer = block_bytes(spec, config, 4) - block_bytes(spec, config, 4, triton=True)
    assert fewer == pytest.approx(states * 128 / 16 - 4 * 4 * 8)  # rows of 16: a state each, against four numbers


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="triton was imported uninterpreted")
@pytest.mark.parametrize("given", [(), ("hidden", "runs", "decay")])
def test_the_states_of_one_slice_are_gone_before_the_next(monkeypatch, given):
    """Forward and backward: of three rows one fits at a time, and no more than its two states are ever in memory."""
    monkeypatch.setattr(triton_backend, "STATE_BYTES", 1)
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    empty = triton_backend._Launch.empty_sums

    def noted(self: triton_backend._Launch, like: torch.Tensor, rows: int) -> torch.Tensor:
        nonlocal most
        sums = empty(self, like, rows)
        made.append(weakref.ref(sums))
        most = max(most, sum(x() is not None for x in made))
        return sums

    monkeypatch.setattr(triton_backend._Launch, "empty_sums", noted)
    q, k, v = (torch.randn(3, 70, 8, requires_grad=True) for _ in range(3))
    options = {
        "hidden": torch.zeros(3, 70, dtype=torch.bool),
        "runs": torch.arange(70).expand(3, 70) // 40,
        "decay": torch.full((3, 1, 1), 0.1),
    }
    options = {name: options[name] for name in given}
    out, lse = scan(Rows(q, k, v, phi=feature_map("softmax", 16, 8), **options), "triton")
    assert (len(made), most) == (3, 1)
    (out.sum() + lse.sum()).backward()
    assert (len(made), most) == (3 + 6, 2)
    assert all(x() is None for x in made)


def test_the_states_that_triton_makes_are_counted_once_and_up_to_its_limit(loaded):
    def states(*overrides):
        step = ("data.length=16384", "data.batch_tokens=16384", *overrides)
        auto, torchs = (estimate(loaded(*step, f"attention.backend={b}"), 29) for b in ("auto", "torch"))
        spec = loaded(*step).performer_spec(29)
        less = (block_bytes(spec, loaded(*step), 4) - block_bytes(spec, loaded(*step), 4, triton=True)) * 16384
        return auto.peak - torchs.peak + spec.depth * less

    backward = 16384 * 4 * 2 * 64  # of the MLP, which is not at the same time
    many = ("attention.features=4096",)
    assert states(*many) == pytest.approx(memory.STATE_BYTES - backward, rel=0.05)


@pytest.mark.parametrize("depth", [2, 5])
def test_offloaded_inputs_of_blocks_are_in_the_memory_of_the_host(loaded, depth):
    step = ("data.length=1024", "data.batch_tokens=4096", f"model.depth={depth}", "trainer.strategy=single")
    plain = loaded(*step, "trainer.activation_checkpointing=true")
    offloaded = loaded(*step, "trainer.activation_checkpointing=true", "trainer.activation_offload=true")
    stream = 4096 * 64 * 4
    assert estimate(offloaded, 29).host - estimate(plain, 29).host == depth * stream
    # Of the inputs, one is in use and one on its way.
    assert estimate(plain, 29).activations - estimate(offloaded, 29).activations == (depth - 2) * stream
    on_cpu = estimate(offloaded, 29, on_cuda=False)
    assert (on_cpu.host, on_cpu.activations) == (0, estimate(plain, 29, on_cuda=False).activations)


def test_the_estimate_knows_what_triton_computes():
    assert memory.STATE_BYTES == triton_backend.STATE_BYTES
    assert memory.CHUNK == triton_backend.CHUNK
    assert memory.TRITON_WIDEST == triton_launch.WIDEST
    rows = [torch.zeros(1, 3, 8)] * 3
    for kernel in KERNELS:
        phi = feature_map(kernel, 8, 8)
        assert (triton_launch.unsupported(phi, rows) is None) == (kernel in OWN_KERNELS)
