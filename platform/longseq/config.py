"""The configuration: every key with its type, default and meaning, in the order in which it is shown.

No torch here. ``config_loading`` reads YAML files and overrides into these classes and refuses what does not fit;
``Config.check`` does the arithmetic across keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longseq.errors import ConfigError
from longseq.models.presets import PRESETS
from longseq.models.spec import KERNELS, PerformerSpec
from longseq_data.vocabulary import VOCABULARY_SIZE


def key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
) -> Any:
    """A configuration key: a dataclass field that carries its meaning and its limits."""
    metadata = {"meaning": meaning, "choices": choices, "at_least": at_least, "below": below}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str | None = key(None, "folder of the run under run.dir; default: name of the config file and the time")
    dir: str = key("runs", "where run folders are made")
    seed: int = key(0, "everything random is a function of it: data order, masking, projections, weights", at_least=0)


@dataclass
class ModelConfig:
    preset: str = key("small", "sizes by name, for the four keys below where they are null", choices=tuple(PRESETS))
    dim: int | None = key(None, "width of the residual stream", at_least=2)
    depth: int | None = key(None, "number of blocks", at_least=1)
    heads: int | None = key(None, "attention heads; dim / heads must be even", at_least=1)
    ffn_dim: int | None = key(None, "width of the MLP's hidden layer", at_least=1)
    dropout: float = key(0.0, "probability, on the embedding and on each residual branch", at_least=0, below=1)
    objective: str = key("causal", "predict the next token, or 15 % masked ones", choices=("causal", "masked"))


@dataclass
class AttentionConfig:
    kind: str = key("favor", "FAVOR+, or exact softmax attention over the same weights", choices=("favor", "exact"))
    kernel: str = key("softmax", "feature map of FAVOR+", choices=KERNELS)
    features: int = key(256, "random features a head (m)", at_least=1)
    qk_norm: bool = key(
        False, "unit-length queries and keys with a learned temperature a head (next to no effect with kernel relu)"
    )
    window: int = key(
        0, "exact attention to keys nearer than this many positions, features beyond; 0: none", at_least=0
    )
    learned_share: bool = key(False, "a learned factor a head on all weights beyond the window")
    learned_decay: bool = key(False, "weights decay with the distance, at a rate that each head learns")
    projection: str = key("orthogonal", "rows of the random projections", choices=("orthogonal", "iid"))
    backend: str = key(
        "auto",
        "auto: our own kernels where they can (Triton on CUDA, native C++ on CPU), else PyTorch",
        choices=("auto", "torch", "native", "triton"),
    )
    redraw_every: int = key(1000, "optimiser steps between draws of the projections; 0: never", at_least=0)


@dataclass
class DataConfig:
    train: list[str] = key([], "FASTA files, plain or gzipped: paths, globs or URLs")
    valid: list[str] = key([], "files for validation while training; empty: data.valid_fraction of train")
    test: list[str] = key([], "files for `longseq evaluate --split test`; empty: data.test_fraction of train")
    ood: list[str] = key([], "out-of-distribution files for `longseq evaluate --split ood`")
    valid_fraction: float = key(0.05, "share of train held out by a hash of the record's id", at_least=0, below=1)
    test_fraction: float = key(0.05, "another such share, never looked at while training", at_least=0, below=1)
    length: int = key(512, "tokens a sequence", at_least=2)
    packing: str = key(
        "concat",
        "concat: records joined by EOS and cut at length; crop: one record a sequence, padded or cropped at random",
        choices=("concat", "crop"),
    )
    batch_tokens: int = key(
        16384, "tokens of one optimiser step, over all processes and accumulated batches, padding included", at_least=1
    )
    shuffle_buffer: int = key(10_000, "records held to shuffle the stream, 64 Mi residues at most", at_least=1)
    strict: bool = key(False, "refuse letters outside the alphabet instead of reading them as X")
    workers: int = key(0, "extra processes that prepare batches, for each training process", at_least=0)
    valid_samples: int = key(256, "sequences of one validation while training", at_least=1)


@dataclass
class OptimConfig:
    lr: float = key(1e-3, "peak learning rate of AdamW", at_least=0)
    warmup_steps: int = key(100, "steps of linear warm-up", at_least=0)
    schedule: str = key("cosine", "after the warm-up", choices=("cosine", "constant"))
    final_lr: float = key(0.1, "where the cosine ends, as a share of lr", at_least=0)
    betas: list[float] = key([0.9, 0.98], "AdamW's decay rates")
    eps: float = key(1e-9, "AdamW's epsilon", at_least=0)
    weight_decay: float = key(0.1, "on matrices; not on embeddings, norms and biases", at_least=0)
    clip: float = key(0.5, "largest norm of the whole gradient; 0: no clipping", at_least=0)


@dataclass
class TrainerConfig:
    devices: int = key(1, "processes on this machine, one a device", at_least=1)
    accelerator: str = key("auto", "auto: CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    max_steps: int = key(1000, "optimiser steps of the whole run", at_least=1)
    precision: str = key("fp32", "of weights and activations", choices=("fp32", "bf16", "fp16"))
    zero_stage: int = key(
        2, "what DeepSpeed shards: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights", at_least=0, below=4
    )
    accumulate: int = key(1, "batches a process adds up for one optimiser step", at_least=1)
    activation_checkpointing: bool = key(False, "recompute each block in the backward pass to save memory")
    valid_every: int = key(250, "steps between validations; 0: never", at_least=0)
    checkpoint_every: int = key(250, "steps between checkpoints; 0: only at the end or when stopped", at_least=0)
    keep_checkpoints: int = key(3, "newest checkpoints kept", at_least=1)
    log_every: int = key(10, "steps between points in TensorBoard", at_least=1)
    probe_every: int = key(
        1000,
        "steps between looks at one fixed sequence: each layer's attention beside exact attention, attention maps, and "
        "sequences sampled from a causal model; 0: never",
        at_least=0,
    )
    sample_tokens: int = key(64, "tokens of each sequence sampled at a probe; 0: none", at_least=0)
    histogram_every: int = key(0, "steps between histograms of all weights and gradients; 0: never", at_least=0)
    noise_every: int = key(
        0, "steps between measurements of the gradient noise scale, two half gradients more each; 0: never", at_least=0
    )
    peak_tflops: float | None = key(
        None, "of one device, what MFU is a share of; default: that of a matrix product at the start", at_least=1e-6
    )
    ema_decay: float = key(
        0.0, "keep a running mean of the weights, this much of it a step, e.g. 0.999; 0: none", at_least=0, below=1
    )
    length_warmup_steps: int = key(
        0, "steps over which the sequences grow to data.length tokens; 0: they have it from the start", at_least=0
    )
    length_warmup_start: int = key(64, "tokens a sequence at the first of these steps", at_least=2)


# DeepSpeed settings that follow from keys of ours; given twice, they would disagree.
_OURS = {
    "zero_optimization.stage": "trainer.zero_stage",
    "gradient_clipping": "optim.clip",
    "gradient_accumulation_steps": "trainer.accumulate",
    "train_batch_size": "data.batch_tokens",
    "train_micro_batch_size_per_gpu": "data.batch_tokens",
    "optimizer": "the optim section",
    "scheduler": "optim.schedule",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
}


@dataclass
class Config:
    """The whole configuration of a run; the sections are those of the YAML files."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    deepspeed: dict[str, Any] = key({}, "passed through to DeepSpeed's own configuration")

    @property
    def batch_sequences(self) -> int:
        """Sequences of one process in one micro-batch."""
        trainer, data = self.trainer, self.data
        return data.batch_tokens // data.length // (trainer.devices * trainer.accumulate)

    @property
    def samples_per_step(self) -> int:
        """Sequences of one optimiser step, over all processes and accumulated batches."""
        return self.data.batch_tokens // self.data.length

    def performer_spec(self, vocabulary: int) -> PerformerSpec:
        """The model's architecture, sizes filled in from the preset where they are null.

        Raises:
            ConfigError: for sizes that do not fit together.
        """
        size, model, attention = PRESETS[self.model.preset], self.model, self.attention
        try:
            return PerformerSpec(
                vocabulary=vocabulary,
                dim=model.dim or size.dim,
                depth=model.depth or size.depth,
                heads=model.heads or size.heads,
                ffn_dim=model.ffn_dim or size.ffn_dim,
                causal=model.objective == "causal",
                dropout=model.dropout,
                attention=attention.kind,
                kernel=attention.kernel,
                features=attention.features,
                window=attention.window,
                projection=attention.projection,
                qk_norm=attention.qk_norm,
                learned_share=attention.learned_share,
                learned_decay=attention.learned_decay,
                backend=attention.backend,
                redraw_every=attention.redraw_every,
                seed=self.run.seed,
                activation_checkpointing=self.trainer.activation_checkpointing,
            )
        except ValueError as error:
            raise ConfigError(f"{error}.") from None

    def check(self) -> None:
        """The arithmetic across keys, and DeepSpeed settings that would contradict them.

        Raises:
            ConfigError: with the numbers, and numbers that would do.
        """
        data, trainer = self.data, self.trainer
        if not data.train:
            raise ConfigError("data.train is empty: name FASTA files, e.g. data.train='[proteins.fasta.gz]'.")
        if data.valid_fraction + data.test_fraction >= 1:
            raise ConfigError(
                f"data.valid_fraction + data.test_fraction = {data.valid_fraction} + {data.test_fraction} leaves "
                "nothing to train on: make them smaller."
            )
        if trainer.valid_every and not data.valid and not data.valid_fraction:
            raise ConfigError(
                f"trainer.valid_every={trainer.valid_every}, but nothing is held out to validate on: name files in "
                "data.valid, set data.valid_fraction above 0, or trainer.valid_every=0."
            )
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ConfigError(f"optim.betas={list(self.optim.betas)}: two numbers from [0, 1), e.g. [0.9, 0.98].")
        if data.batch_tokens % data.length:
            raise ConfigError(
                f"data.batch_tokens={data.batch_tokens} is not a multiple of data.length={data.length}: "
                f"take {-(-data.batch_tokens // data.length) * data.length}."
            )
        ranks = trainer.devices * trainer.accumulate
        if self.samples_per_step % ranks:
            whole = -(-self.samples_per_step // ranks) * ranks
            raise ConfigError(
                f"one step is data.batch_tokens / data.length = {data.batch_tokens} / {data.length} = "
                f"{self.samples_per_step} sequences, which {trainer.devices} processes (trainer.devices) × "
                f"{trainer.accumulate} accumulated batches (trainer.accumulate) do not share evenly: change one of "
                f"them, or take data.batch_tokens={whole * data.length}."
            )
        self.performer_spec(VOCABULARY_SIZE)
        self._check_options()
        self._check_deepspeed()

    def _check_options(self) -> None:
        trainer, data = self.trainer, self.data
        if trainer.length_warmup_steps and trainer.length_warmup_start > data.length:
            raise ConfigError(
                f"trainer.length_warmup_start={trainer.length_warmup_start} is more than data.length={data.length}: "
                "begin shorter."
            )
        if trainer.noise_every and self.batch_sequences < 2:
            raise ConfigError(
                f"trainer.noise_every={trainer.noise_every} compares the halves of a process's batch, which has "
                f"{self.batch_sequences} sequence (data.batch_tokens / data.length / trainer.devices / "
                "trainer.accumulate): give it two or more, or set trainer.noise_every=0."
            )
        if trainer.noise_every and (trainer.zero_stage == 3 or trainer.activation_checkpointing):
            culprit = "zero_stage=3" if trainer.zero_stage == 3 else "activation_checkpointing=true"
            raise ConfigError(
                f"trainer.noise_every={trainer.noise_every} and trainer.{culprit}: its gradients are taken beside the "
                "training step's, which needs whole weights and kept activations; set trainer.noise_every=0."
            )

    def _check_deepspeed(self) -> None:
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ConfigError(f"deepspeed.zero_optimization={zero}: it is a section, e.g. reduce_bucket_size below it.")
        given = [*self.deepspeed, *(f"zero_optimization.{name}" for name in zero)]
        for name, ours in _OURS.items():
            if name in given:
                raise ConfigError(f"deepspeed.{name} is set from {ours}: set that instead.")
