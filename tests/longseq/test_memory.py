"""The memory estimate against what torch's allocator hands out in two steps of training."""

from __future__ import annotations

import pytest
import torch

from longseq.config.loading import load_config
from longseq.measure import memory
from longseq.measure.memory import estimate, reduce_bucket
from longseq.measure.peaks import PeakMeter
from longseq.models import head
from longseq.models.performer import PerformerLM
from longseq.models.weights import full_state_dict
from longseq.training import shards
from longseq.training.optim import bind, build_optimizer
from longseq.training.optimizer_state import holder_of

SMALL = ("model.preset=small", "data.length=256", "data.batch_tokens=1024")
LONG = ("data.length=1024", "data.batch_tokens=1024", "model.sequence_tile=128")
REGULAR = ("model.preset=regular", "model.depth=2", "data.length=256", "data.batch_tokens=512")


@pytest.fixture
def loaded(folder):
    return lambda *overrides: load_config("small.yaml", ["data.train=proteins.fasta", *overrides])


def measured(config, vocabulary=29):
    """Peak bytes of a model, AdamW and two training steps in one process without a strategy around them."""
    torch.manual_seed(0)
    shape = config.batch_sequences, config.data.length
    tokens = torch.randint(25, shape)
    meter = PeakMeter(torch.device("cpu"))
    model = PerformerLM(config.performer_spec(vocabulary)).train()
    optimizer = build_optimizer(model, config.optim, model.spec.dim)
    for _ in range(2):
        model(tokens, targets=tokens)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return meter.stop()


@pytest.mark.parametrize(
    "overrides",
    [
        SMALL,
        REGULAR,
        (*SMALL, "model.objective=masked"),
        (*SMALL, "attention.kind=exact"),
        (*REGULAR, "attention.kind=exact", "model.objective=masked"),
        (*SMALL, "trainer.activation_checkpointing=true"),
        (*REGULAR, "trainer.activation_checkpointing=true"),
        (*SMALL, "attention.window=32"),
        (*SMALL, "attention.window=32", "model.objective=masked"),
        (*SMALL, "attention.window=32", "attention.learned_share=true", "attention.learned_decay=true"),
        (*SMALL, "attention.qk_norm=true", "attention.features=64"),
        (*SMALL, "attention.kernel=relu", "attention.backend=torch"),
        (*SMALL, "attention.kind=exact", "attention.learned_decay=true"),
        (*SMALL, "attention.layers=[favor, {kind: exact, learned_decay: true}]"),
        (*SMALL, "attention.layers=[favor, exact]", "attention.forget_gate=true"),
        (*SMALL, "model.dropout=0.1"),
        (*SMALL, "model.norm_kind=rmsnorm"),
        (*SMALL, "model.ffn=swiglu"),
        (*SMALL, "model.ffn=relu2"),
        (*SMALL, "model.conv=4"),
        (*SMALL, "model.value_residual=true"),
        (*SMALL, "model.block=modern"),
        (*REGULAR, "model.block=modern"),
        (*SMALL, *LONG, "model.block=modern"),
        (*SMALL, *LONG, "model.block=modern", "model.objective=masked"),
        (*SMALL, "data.batch_tokens=256"),
        (*SMALL, "data.batch_tokens=256", *LONG),
        (*SMALL, *LONG, "attention.window=32"),
        (*SMALL, *LONG, "model.objective=masked"),
        (*SMALL, *LONG, "attention.kind=exact"),
        (*SMALL, *LONG, "attention.layers=[{window: 32}, favor]"),
    ],
    ids=lambda overrides: " ".join(override.partition(".")[2] for override in overrides),
)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(loaded, overrides):
    config = loaded("trainer.strategy=single", *overrides)
    assert estimate(config, 29, on_cuda=False).peak == pytest.approx(measured(config), rel=0.2)


@pytest.mark.parametrize(
    "overrides",
    [
        SMALL,
        (*SMALL, "attention.kind=exact", "model.objective=masked"),
        (*SMALL, "optim.name=muon", "model.ffn=swiglu"),
    ],
)
def test_each_part_is_what_it_says(loaded, overrides):
    config = loaded("trainer.strategy=single", *overrides)
    needed = estimate(config, 29, on_cuda=False)
    model = PerformerLM(config.performer_spec(29)).train()
    optimizer = build_optimizer(model, config.optim, model.spec.dim)
    bind(model, optimizer)
    tokens = torch.randint(25, (config.batch_sequences, config.data.length))
    assert sum(p.nbytes for p in model.parameters()) == needed.weights
    meter = PeakMeter(torch.device("cpu"))
    loss, _ = model(tokens, targets=tokens)
    assert meter.stop() == pytest.approx(needed.activations, rel=0.2)  # at the end of the forward pass
    loss.backward()
    optimizer.step()
    assert sum(p.grad.nbytes for p in model.parameters()) == needed.gradients
    moments = (s for state in optimizer.state.values() for s in state.values() if s.ndim)
    assert sum(s.nbytes for s in moments) == needed.optimizer


def test_a_large_vocabulary_counts_its_logits(loaded):
    config = loaded("trainer.strategy=single", "model.preset=tiny", "data.length=256", "data.batch_tokens=1024")
    assert estimate(config, 8192, on_cuda=False).peak == pytest.approx(measured(config, 8192), rel=0.2)


def test_shares_of_the_ranks_are_those_of_the_zero_stage(loaded):
    def parts(stage, devices):
        config = loaded(*SMALL, "data.batch_tokens=4096", f"trainer.zero_stage={stage}", f"trainer.devices={devices}")
        return estimate(config, 29, on_cuda=False)

    weights = 4 * loaded(*SMALL).performer_spec(29).parameter_count
    assert parts(0, 4).optimizer == 2 * weights
    for stage in (1, 2, 3):
        assert parts(stage, 4).optimizer == pytest.approx(3 * weights / 4, rel=1e-6)  # and DeepSpeed's own fp32 copy
    assert parts(2, 4).weights == weights
    assert parts(3, 4).weights == pytest.approx(weights / 4 + weights, rel=1e-6)  # its shard, and what is gathered
    assert parts(2, 4).activations == parts(2, 2).activations / 2


def test_a_slice_needs_its_share_of_the_activations(loaded):
    def activations(parts):
        step = ("data.length=2048", "data.batch_tokens=16384", "trainer.devices=4")
        config = loaded(*SMALL, *step, f"trainer.context_parallel={parts}")
        return estimate(config, 29, on_cuda=False).activations

    assert activations(4) == pytest.approx(activations(1), rel=1e-6)  # as many tokens, of four times the sequences


def test_what_is_offloaded_is_counted_elsewhere(loaded):
    plain = loaded(*SMALL, "trainer.zero_stage=2")
    offloaded = loaded(*SMALL, "trainer.zero_stage=2", "trainer.offload_optimizer=cpu")
    assert estimate(offloaded, 29).optimizer == 0
    assert estimate(offloaded, 29).host - estimate(plain, 29).host >= estimate(plain, 29).optimizer
    assert estimate(offloaded, 29).peak < estimate(plain, 29).peak


def test_copies_for_a_checkpoint_are_counted_in_the_hosts_memory(loaded):
    config = loaded("trainer.strategy=single", *SMALL)
    model = PerformerLM(config.performer_spec(29))
    optimizer = build_optimizer(model, config.optim, model.spec.dim)
    model(torch.zeros(1, 9, dtype=torch.int64)).sum().backward()
    optimizer.step()
    copies = {**shards.snapshot(holder_of(model, optimizer), rank=0), **full_state_dict(model, False, keep=True)}
    assert sum(x.nbytes for x in copies.values()) == estimate(config, 29).host
    assert estimate(config, 29, on_cuda=False).host == 0

    def sharded(*overrides):
        return estimate(loaded(*SMALL, "trainer.devices=4", "trainer.zero_stage=2", *overrides), 29).host

    weights = 4 * model.spec.parameter_count
    assert sharded() == 3 * weights / 4 + weights
    assert sharded("trainer.precision=bf16") == 3 * weights / 4 + weights / 2


def test_copies_in_the_memory_of_two_nodes_are_counted_five_times(loaded):
    """Two own, two of another node's rank, and what they are made from: on CPUs, too."""
    config = loaded(*SMALL, "trainer.memory_checkpoint_every=7")
    plain = loaded(*SMALL)
    once = estimate(plain, 29).host
    assert estimate(config, 29).host == 6 * once  # with the disk's snapshot
    assert estimate(config, 29, on_cuda=False).host == 5 * once


def test_sums_beside_the_backward_pass_need_a_second_buffer(loaded):
    for stage, buffers in ((1, 2), (2, 2), (3, 1)):
        config = (*SMALL, f"trainer.zero_stage={stage}")
        more = (
            estimate(loaded(*config, "trainer.overlap_comm=true"), 29).gradients
            - estimate(loaded(*config), 29).gradients
        )
        assert more == (buffers - 1) * 4 * reduce_bucket(
            loaded(*config), loaded(*config).performer_spec(29).parameter_count
        )


def test_the_gradient_buffer_is_no_larger_than_the_model_unless_it_is_told(loaded):
    assert reduce_bucket(loaded(), 1000) == 1000
    assert reduce_bucket(loaded(), 2_000_000_000) == 500_000_000
    assert reduce_bucket(loaded("deepspeed.zero_optimization.reduce_bucket_size=5e7"), 1000) == 50_000_000


def test_the_estimate_knows_how_many_logits_exist_at_a_time():
    assert (memory.LOGITS, memory.MOST_ROWS) == (head.LOGITS, head.MOST_ROWS)
