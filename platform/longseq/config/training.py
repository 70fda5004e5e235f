"""The keys of a configuration's sections ``optim`` and ``trainer``: how the model is trained, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longseq.attention.options import option as key

Benchmarks = list[Any]  # each a mapping, a config.benchmarks.Benchmark

SCHEDULES = ("cosine", "wsd", "inverse_sqrt", "constant")


@dataclass
class OptimConfig:
    name: str = key(
        "adamw",
        "adamw, or muon: steps of the blocks' matrices are made orthogonal, and AdamW takes the other weights; one "
        "rate serves both",
        choices=("adamw", "muon"),
    )
    lr: float = key(1e-3, "peak learning rate", at_least=0)
    base_dim: int | None = key(
        None,
        "the width (model.dim) that lr was found at: a model of another one begins, and steps its matrices, so that "
        "lr is right for it, too (µP: `longseq ladder`); null: lr is that of all weights",
        at_least=1,
    )
    warmup_steps: int = key(100, "steps of linear warm-up", at_least=0)
    schedule: str = key(
        "cosine",
        "after the warm-up: cosine down to final_lr; wsd: the peak, and over the last decay_fraction of the steps down "
        "to final_lr; inverse_sqrt: falls with the square root of the step; or constant",
        choices=SCHEDULES,
    )
    final_lr: float = key(0.1, "where cosine and wsd end, as a share of lr", at_least=0)
    decay_fraction: float = key(
        0.2, "with schedule wsd: the share of trainer.max_steps in which the rate falls", at_least=0, below=1
    )
    momentum: float = key(0.95, "Muon's momentum", at_least=0, below=1)
    betas: list[float] = key([0.9, 0.98], "AdamW's decay rates")
    eps: float = key(1e-9, "AdamW's epsilon", at_least=0)
    weight_decay: float = key(0.1, "on matrices; not on embeddings, norms and biases", at_least=0)
    implementation: str = key(
        "torch",
        "torch's AdamW, or DeepSpeed's: fused, or cpu for an offloaded optimiser (compiled when first used)",
        choices=("torch", "fused", "cpu"),
    )
    clip: float = key(0.5, "largest norm of the whole gradient; 0: no clipping", at_least=0)


@dataclass
class TrainerConfig:
    devices: int = key(1, "processes on each machine, one a device", at_least=1)
    nodes: int = key(1, "machines; more than one are started by `longseq submit --nodes N`", at_least=1)
    accelerator: str = key("auto", "auto: CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    max_steps: int = key(1000, "optimiser steps of the whole run", at_least=1)
    precision: str = key("fp32", "of weights and activations", choices=("fp32", "bf16", "fp16"))
    float32_matmul_precision: str = key(
        "high",
        "of fp32 products in linear layers on GPUs, as torch.set_float32_matmul_precision: high is TF32, several times "
        "faster than highest",
        choices=("highest", "high", "medium"),
    )
    strategy: str = key(
        "deepspeed",
        "deepspeed, PyTorch's ddp (every process holds everything), or single (one process, without either)",
        choices=("single", "ddp", "deepspeed"),
    )
    zero_stage: int = key(
        2, "what DeepSpeed shards: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights", at_least=0, below=4
    )
    overlap_comm: bool | None = key(
        None,
        "whether DeepSpeed sums gradients over the processes during the backward pass, into a second buffer; default: "
        "with ZeRO-3",
    )
    context_parallel: int = key(
        1, "neighbouring processes that hold a slice each of the same sequences; divides the processes", at_least=1
    )
    accumulate: int = key(1, "batches that a process adds up for one optimiser step", at_least=1)
    activation_checkpointing: bool = key(False, "recompute each block in the backward pass to save memory")
    compile: bool = key(
        False,
        "torch.compile of each block: faster steps after some minutes at the start; needs a C++ compiler or Triton",
    )
    activation_offload: bool = key(False, "keep what the recomputation of blocks starts from in the CPU's memory")
    offload_optimizer: str = key(
        "none",
        "where DeepSpeed keeps the optimiser: cpu from ZeRO-1 on, nvme with ZeRO-3",
        choices=("none", "cpu", "nvme"),
    )
    offload_params: str = key("none", "where ZeRO-3 keeps the weights", choices=("none", "cpu", "nvme"))
    offload_path: str | None = key(None, "a folder on a fast local disk, for nvme")
    valid_every: int = key(250, "steps between validations; 0: never", at_least=0)
    checkpoint_every: int = key(250, "steps between checkpoints; 0: only at the end or when stopped", at_least=0)
    memory_checkpoint_every: int = key(
        0,
        "steps between copies of the training's state in the memory of its node and of another one, which the next "
        "start in a job goes on from; 0: none",
        at_least=0,
    )
    keep_checkpoints: int = key(3, "newest checkpoints kept", at_least=1)
    keep_best: int = key(0, "checkpoints of lowest validation loss kept besides", at_least=0)
    keep_every: int = key(0, "checkpoints at multiples of this many steps kept besides; 0: none", at_least=0)
    log_every: int = key(10, "steps between points in TensorBoard", at_least=1)
    probe_every: int = key(
        1000,
        "steps between looks at one fixed sequence: each layer's attention next to exact attention, attention maps, "
        "and sequences sampled from a causal model; 0: never",
        at_least=0,
    )
    sample_tokens: int = key(64, "tokens of each sequence sampled at a probe; 0: none", at_least=0)
    benchmarks: Benchmarks = key(
        [],
        "what proteins are measured by at steps of the training, as curves benchmark/NAME/...: "
        "[{kind: proteingym, path: FOLDER, every: 1000}, {kind: variants, path: scan.csv, wild_type: wild.fasta}, "
        "{kind: contacts, path: chains.jsonl, name: contacts}, {kind: structure, path: chains.jsonl, name: structure}]",
    )
    histogram_every: int = key(0, "steps between histograms of all weights and gradients; 0: never", at_least=0)
    noise_every: int = key(
        0, "steps between measurements of the gradient noise scale, two half gradients more each; 0: never", at_least=0
    )
    loggers: list[str] = key(
        ["tensorboard"],
        "where curves go: tensorboard, where they go in any case; wandb and mlflow, in a thread of their own",
    )
    prometheus: str | None = key(
        None,
        "a folder that node_exporter's textfile collector reads, e.g. /var/lib/node_exporter: there one process of "
        "each node keeps a file with step, loss, speed, seconds since the last step and memory",
    )
    profile_steps: list[int] = key(
        [],
        "the first and the last step of which PyTorch's profiler keeps a trace in profiles/, on GPUs with a snapshot "
        "of the memory; empty: none",
    )
    profile_ranks: list[int] = key([0], "the processes that profile_steps is about")
    peak_tflops: float | None = key(
        None, "of one device, what MFU is a share of; default: that of a matrix product at the start", at_least=1e-6
    )
    ema_decay: float = key(
        0.0, "keep a running mean of the weights, this much of it per step, e.g. 0.999; 0: none", at_least=0, below=1
    )
    length_warmup_steps: int = key(
        0, "steps over which the sequences grow to data.length tokens; 0: they have it from the start", at_least=0
    )
    length_warmup_start: int = key(64, "tokens per sequence at the first of these steps", at_least=2)
    time_limit: str | None = key(
        None, "save and stop at the first step after this much time, e.g. 2h30m, 90s, 1d or 2:30:00; exit code 75"
    )
    hang_seconds: float = key(
        60.0,
        "a process that says nothing for so long, or a step of so long and of ten median steps, ends the start and is "
        "named; what is between steps may take ten times as long, first steps and compilers thirty; less than 5 is "
        "taken for 5; 0: nothing ends it",
        at_least=0,
    )
    slow_factor: float = key(
        1.5, "a rank that is this many times as slow as the median one is named; 0: ranks are not compared", at_least=0
    )
    on_bad_step: str = key(
        "stop",
        "a loss or gradient that is not finite, or a spike: stop the run, or skip the step",
        choices=("stop", "skip"),
    )
    spike_factor: float = key(
        0.0, "a loss above this many times the mean of about 50 batches before is a spike; 0: none is", at_least=0
    )
