"""The ``deepspeed`` section: tried by DeepSpeed itself before any process is started."""

from __future__ import annotations

import pytest

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.training.deepspeed_settings import check_deepspeed, deepspeed_settings


def config(*overrides: str) -> Config:
    return load_config("small.yaml", ["data.train=proteins.fasta", *overrides])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "zero_optimization.reduce_buckt_size=3",
            r"deepspeed\.zero_optimization\.reduce_buckt_size.*Did you mean .*reduce_bucket_size",
        ),
        (
            "zero_optimization.offload_optimizer.buffer_cnt=3",
            r"offload_optimizer\.buffer_cnt.*Did you mean deepspeed\..*offload_optimizer\.buffer_count",
        ),
        ("steps_per_prnt=3", r"deepspeed\.steps_per_prnt: .* no such key.*deepspeed\.steps_per_print\?"),
        ("aio.block_sze=3", r"deepspeed\.aio\.block_sze: .*deepspeed\.aio\.block_size"),
        ("zero_optimization.reduce_bucket_size=abc", r"reduce_bucket_size=abc: .*integer"),
        ("activation_checkpointing.cpu_chekpointing=true", r"Did you mean .*cpu_checkpointing"),
    ],
)
def test_what_deepspeed_does_not_know_is_named_with_what_it_does(folder, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_deepspeed(config(f"deepspeed.{override}"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("deepspeed.zero_optimization.reduce_bucket_size=1000", "deepspeed.zero_optimization.overlap_comm=true"),
        ("deepspeed.wall_clock_breakdown=false", "deepspeed.steps_per_print=10", "deepspeed.aio.block_size=1024"),
        ("deepspeed.communication_data_type=fp32", "deepspeed.prescale_gradients=false"),
        ("trainer.offload_optimizer=cpu", "deepspeed.zero_optimization.offload_optimizer.buffer_count=5"),
        ("trainer.precision=fp16", "deepspeed.fp16.initial_scale_power=8", "deepspeed.fp16.hysteresis=4"),
        ("deepspeed.activation_checkpointing.cpu_checkpointing=true", "deepspeed.data_types.grad_accum_dtype=fp32"),
    ],
)
def test_what_deepspeed_knows_passes(folder, overrides):
    check_deepspeed(config(*overrides))


def test_overlapped_sums_are_asked_for_by_a_key_or_by_the_section_not_both(folder):
    def asked(*overrides):
        return deepspeed_settings(config(*overrides), on_cuda=True)["zero_optimization"].get("overlap_comm")

    section = "deepspeed.zero_optimization.overlap_comm=true"
    assert [asked(), asked("trainer.overlap_comm=true"), asked("trainer.overlap_comm=false"), asked(section)] == [
        *(None, True, False, True)
    ]
    check_deepspeed(config("trainer.overlap_comm=true", "deepspeed.steps_per_print=10"))
    with pytest.raises(ConfigError, match="set one of them"):
        config("trainer.overlap_comm=false", section)
    with pytest.raises(ConfigError, match=r"trainer.overlap_comm=true is DeepSpeed's, but trainer.strategy=ddp"):
        config("trainer.overlap_comm=true", "trainer.strategy=ddp")


def test_settings_of_ours_and_of_the_section_come_together(folder):
    settings = deepspeed_settings(
        config(
            *("trainer.zero_stage=3", "trainer.offload_optimizer=nvme", "trainer.offload_path=/fast"),
            *("trainer.offload_params=cpu", "deepspeed.zero_optimization.offload_optimizer.buffer_count=5"),
        ),
        on_cuda=True,
    )
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 403_200,  # the model's size, and not DeepSpeed's 500 million
        "offload_optimizer": {"buffer_count": 5, "device": "nvme", "pin_memory": True, "nvme_path": "/fast"},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    fp16 = deepspeed_settings(config("trainer.precision=fp16", "deepspeed.fp16.hysteresis=4"), on_cuda=True)["fp16"]
    assert fp16 == {"hysteresis": 4, "enabled": True}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("trainer.offload_optimizer=cpu", "trainer.zero_stage=0"), "trainer.zero_stage=1"),
        (("trainer.offload_params=cpu", "trainer.zero_stage=2"), "trainer.zero_stage=3"),
        (("trainer.offload_optimizer=nvme", "trainer.zero_stage=3"), "trainer.offload_path"),
        (("trainer.offload_optimizer=cpu", "trainer.strategy=ddp"), "trainer.strategy=deepspeed"),
        (("trainer.activation_offload=true",), "trainer.activation_checkpointing=true"),
        (("optim.implementation=fused", "trainer.strategy=ddp"), "optim.implementation=torch"),
        (("trainer.strategy=single", "trainer.devices=2"), "trainer.strategy=ddp"),
        (("trainer.strategy=ddp", "deepspeed.prescale_gradients=true"), "deepspeed.prescale_gradients"),
        (("deepspeed.fp16.loss_scale=4",), "trainer.precision=fp16"),
        (("deepspeed.fp16=3",), "it is a section"),
        (("deepspeed.fp16.enabled=true",), "trainer.precision"),
        (("deepspeed.zero_optimization.offload_param.device=cpu",), "trainer.offload_params"),
        (("trainer.keep_best=1", "trainer.checkpoint_every=100"), "trainer.valid_every=250"),
        (("trainer.keep_every=100",), "take 250"),
        (("trainer.memory_checkpoint_every=500",), "each copy would be one of a checkpoint"),
        (("trainer.spike_factor=0.5",), "above 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_with_what_does(folder, overrides, words):
    with pytest.raises(ConfigError) as refused:
        config(*overrides)
    assert words in str(refused.value)
