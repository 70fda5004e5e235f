"""The configuration: every key with its type, default and meaning, in the order in which it is shown.

No torch here. ``config_loading`` reads YAML files and overrides into these classes and refuses what does not fit;
``Config.check`` does the arithmetic across keys.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from longseq.durations import duration_seconds
from longseq.errors import ConfigError
from longseq.models.presets import PRESETS
from longseq.models.spec import KERNELS, SIGNED_KERNELS, PerformerSpec
from longseq_data.formats import FORMATS
from longseq_data.images import values_of
from longseq_data.reading import TABLES, TOKENS, disagreement


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
    train: list[str] = key(
        [],
        "files, plain or gzipped: paths, globs, URLs; folders of text, tables or images; "
        "hub:OWNER/NAME[:CONFIG]#SPLIT; or one corpus of `longseq data prepare`, with its own splits",
    )
    valid: list[str] = key([], "files for validation while training; empty: data.valid_fraction of train")
    test: list[str] = key([], "files for `longseq evaluate --split test`; empty: data.test_fraction of train")
    ood: list[str] = key([], "out-of-distribution files for `longseq evaluate --split ood`")
    valid_fraction: float = key(0.05, "share of train held out by a hash of the record's id", at_least=0, below=1)
    test_fraction: float = key(0.05, "another such share, never looked at while training", at_least=0, below=1)
    format: str = key(
        "auto",
        "of all files; auto: by their names, FASTA where they say nothing; lines: a document a line; jsonl, parquet "
        "and hub have columns",
        choices=("auto", *FORMATS),
    )
    tokenizer: str = key(
        "auto",
        "what the tokens are: protein (residues), bytes (of text), pixels, or a Hugging Face tokenizers FILE.json; "
        "auto: protein for FASTA, pixels for images, else bytes",
    )
    column: str | None = key(None, "field of a table with the text or image; default: text, or image with pixels")
    part_bytes: int = key(
        1_048_576, "a longer text is read as several documents, cut at the end of a line", at_least=64
    )
    image_size: int = key(64, "pixels on each side of an image, cropped and scaled down to it", at_least=1)
    length: int = key(512, "tokens a sequence", at_least=2)
    packing: str = key(
        "concat",
        "concat: records joined by EOS and cut at length; crop: one record a sequence, padded or cropped at random; "
        "bucket: the same, in steps of similar lengths and up to data.batch_tokens tokens, of a prepared corpus",
        choices=("concat", "crop", "bucket"),
    )
    reset: bool = key(
        False, "with packing concat: attention and positions begin anew at each document, which gets BOS and EOS"
    )
    crop: str = key(
        "random",
        "with packing crop or bucket: which part of a longer record is taken, also for scores",
        choices=("random", "first"),
    )
    batch_tokens: int = key(
        16384, "tokens of one optimiser step, over all processes and accumulated batches, padding included", at_least=1
    )
    shuffle_buffer: int = key(
        10_000,
        "records held to shuffle the stream, 64 MiB of them at most; a prepared corpus is shuffled as a whole",
        at_least=1,
    )
    strict: bool = key(
        False, "refuse letters outside the alphabet instead of reading them as X, and bytes that are not UTF-8"
    )
    workers: int = key(0, "extra processes that prepare batches, for each training process", at_least=0)
    valid_samples: int = key(256, "sequences of one validation while training", at_least=1)
    accept_changes: bool = key(
        False, "`longseq resume`: go on although the data are not those the run was started with; once"
    )


@dataclass
class OptimConfig:
    lr: float = key(1e-3, "peak learning rate of AdamW", at_least=0)
    warmup_steps: int = key(100, "steps of linear warm-up", at_least=0)
    schedule: str = key("cosine", "after the warm-up", choices=("cosine", "constant"))
    final_lr: float = key(0.1, "where the cosine ends, as a share of lr", at_least=0)
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
    strategy: str = key(
        "deepspeed",
        "deepspeed, PyTorch's ddp (every process holds everything), or single (one process, without either)",
        choices=("single", "ddp", "deepspeed"),
    )
    zero_stage: int = key(
        2, "what DeepSpeed shards: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights", at_least=0, below=4
    )
    accumulate: int = key(1, "batches a process adds up for one optimiser step", at_least=1)
    activation_checkpointing: bool = key(False, "recompute each block in the backward pass to save memory")
    activation_offload: bool = key(False, "keep what the recomputation starts from in the CPU's memory")
    offload_optimizer: str = key(
        "none",
        "where DeepSpeed keeps the optimiser: cpu from ZeRO-1 on, nvme with ZeRO-3",
        choices=("none", "cpu", "nvme"),
    )
    offload_params: str = key("none", "where ZeRO-3 keeps the weights", choices=("none", "cpu", "nvme"))
    offload_path: str | None = key(None, "a folder on a fast local disk, for nvme")
    valid_every: int = key(250, "steps between validations; 0: never", at_least=0)
    checkpoint_every: int = key(250, "steps between checkpoints; 0: only at the end or when stopped", at_least=0)
    keep_checkpoints: int = key(3, "newest checkpoints kept", at_least=1)
    keep_best: int = key(0, "checkpoints of lowest validation loss kept besides", at_least=0)
    keep_every: int = key(0, "checkpoints at multiples of this many steps kept besides; 0: none", at_least=0)
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
    time_limit: str | None = key(
        None, "save and stop at the first step after this much time, e.g. 2h30m, 1d, 2:30:00 or seconds; exit code 75"
    )
    on_bad_step: str = key(
        "stop",
        "a loss or gradient that is not finite, or a spike: stop the run, or skip the step",
        choices=("stop", "skip"),
    )
    spike_factor: float = key(
        0.0, "a loss above this many times the mean of about 50 batches before is a spike; 0: none is", at_least=0
    )


_WHENCE = ("trainer.devices", "trainer.nodes × trainer.devices")  # on one machine, on several

# DeepSpeed settings that follow from keys of ours; given twice, they would disagree.
_OURS = {
    "zero_optimization.stage": "trainer.zero_stage",
    "gradient_clipping": "optim.clip",
    "gradient_accumulation_steps": "trainer.accumulate",
    "train_batch_size": "data.batch_tokens",
    "train_micro_batch_size_per_gpu": "data.batch_tokens",
    "optimizer": "the optim section",
    "scheduler": "optim.schedule",
    "fp16.enabled": "trainer.precision",
    "bf16": "trainer.precision",
    "zero_optimization.offload_optimizer.device": "trainer.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "trainer.offload_path",
    "zero_optimization.offload_param.device": "trainer.offload_params",
    "zero_optimization.offload_param.nvme_path": "trainer.offload_path",
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
        """Sequences of one process in one micro-batch; with data.packing=bucket about the fewest."""
        trainer, data = self.trainer, self.data
        return data.batch_tokens // data.length // (self.processes * trainer.accumulate)

    @property
    def processes(self) -> int:
        """Training processes on all machines together."""
        return self.trainer.nodes * self.trainer.devices

    @property
    def samples_per_step(self) -> int:
        """Sequences of one optimiser step, over all processes and accumulated batches; with bucket the fewest."""
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
                activation_offload=self.trainer.activation_offload,
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
            raise ConfigError("data.train is empty: name files, e.g. data.train='[proteins.fasta.gz]'.")
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
        ranks = self.processes * trainer.accumulate
        if data.packing == "bucket":
            if self.samples_per_step < ranks:
                raise ConfigError(
                    f"data.batch_tokens={data.batch_tokens} with data.packing=bucket is less than one sequence of "
                    f"data.length={data.length} for each of {self.processes} processes "
                    f"({_WHENCE[trainer.nodes > 1]}) × {trainer.accumulate} accumulated batches (trainer.accumulate): "
                    f"take {ranks * data.length}, or change one of them."
                )
        elif data.batch_tokens % data.length:
            raise ConfigError(
                f"data.batch_tokens={data.batch_tokens} is not a multiple of data.length={data.length}: "
                f"take {-(-data.batch_tokens // data.length) * data.length}."
            )
        elif self.samples_per_step % ranks:
            whole = -(-self.samples_per_step // ranks) * ranks
            raise ConfigError(
                f"one step is data.batch_tokens / data.length = {data.batch_tokens} / {data.length} = "
                f"{self.samples_per_step} sequences, which {self.processes} processes ({_WHENCE[trainer.nodes > 1]}) × "
                f"{trainer.accumulate} accumulated batches (trainer.accumulate) do not share evenly: change one of "
                f"them, or take data.batch_tokens={whole * data.length}."
            )
        self.performer_spec(vocabulary=2)  # its size decides nothing that could be refused
        self._check_documents()
        self._check_tokens()
        self._check_trainer()
        self._check_watching()
        self._check_deepspeed()

    def _check_documents(self) -> None:
        data, attention = self.data, self.attention
        if data.reset and data.packing != "concat":
            raise ConfigError(
                f"data.reset=true and data.packing={data.packing}: a sequence of one record has nothing to begin anew; "
                "take data.packing=concat, or data.reset=false."
            )
        if data.crop != "random" and data.packing == "concat":
            raise ConfigError(
                f"data.crop={data.crop} and data.packing={data.packing}: joined records are cut, not cropped; take "
                "data.packing=crop, or leave data.crop out."
            )
        signed = attention.kind == "favor" and attention.kernel in SIGNED_KERNELS
        if data.reset and signed and self.model.objective == "masked":
            raise ConfigError(
                f"data.reset=true and attention.kernel={attention.kernel} with a masked objective: features of both "
                "signs cannot share two denominators; take kernel softmax or relu."
            )

    def _check_tokens(self) -> None:
        """What format and tokens say of themselves; longseq.data asks again when it knows the files."""
        data = self.data
        if data.tokenizer not in ("auto", *TOKENS) and not data.tokenizer.endswith(".json"):
            near = difflib.get_close_matches(data.tokenizer, ("auto", *TOKENS), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"data.tokenizer={data.tokenizer}: choose from auto, {', '.join(TOKENS)}, or name a tokenizer's .json "
                f"file.{hint}"
            )
        if data.format == "auto":
            return
        refusal = None if data.tokenizer == "auto" else disagreement(data.format, data.tokenizer)
        if refusal:
            raise ConfigError(refusal)
        if data.column is not None and data.format not in TABLES:
            raise ConfigError(
                f"data.column={data.column} and data.format={data.format}: only {', '.join(TABLES)} have columns; "
                "leave it out."
            )
        if data.format == "images":
            self.check_pixels()

    def check_pixels(self) -> None:
        """What a model of images asks of the data section.

        Raises:
            ConfigError: naming the key.
        """
        data = self.data
        values = values_of(data.image_size)
        if data.packing != "crop":
            raise ConfigError(
                f"data.packing={data.packing} with pixels: images that are joined and cut lose their rows and columns; "
                "take data.packing=crop."
            )
        if data.length > values:
            raise ConfigError(
                f"data.length={data.length} is more than an image has: data.image_size={data.image_size} makes "
                f"{data.image_size} × {data.image_size} × 3 = {values} tokens; take data.length={values}."
            )

    @property
    def time_limit_seconds(self) -> float | None:
        """trainer.time_limit in seconds.

        Raises:
            ConfigError: if it is no time.
        """
        limit = self.trainer.time_limit
        try:
            return None if limit is None else duration_seconds(limit)
        except ValueError as error:
            raise ConfigError(f"trainer.time_limit={limit}: {error}.") from None

    def _check_trainer(self) -> None:
        trainer = self.trainer
        _ = self.time_limit_seconds
        if 0 < trainer.spike_factor <= 1:
            raise ConfigError(
                f"trainer.spike_factor={trainer.spike_factor:g} would call every loss above the mean a spike: take a "
                "factor above 1, e.g. 2."
            )
        if trainer.strategy == "single" and self.processes > 1:
            several = f"trainer.devices={trainer.devices}" if trainer.devices > 1 else f"trainer.nodes={trainer.nodes}"
            raise ConfigError(
                f"trainer.strategy=single is one process, but {several}: take trainer.strategy=ddp or deepspeed, or "
                f"{several.partition('=')[0]}=1."
            )
        if trainer.strategy != "deepspeed" and self.deepspeed:
            raise ConfigError(
                f"deepspeed.{next(iter(self.deepspeed))} is set, but trainer.strategy={trainer.strategy} does without "
                "DeepSpeed: remove the deepspeed section, or take trainer.strategy=deepspeed."
            )
        every, valid = trainer.checkpoint_every, trainer.valid_every
        if trainer.keep_best and (not every or not valid or every % valid):
            raise ConfigError(
                f"trainer.keep_best={trainer.keep_best} needs a validation at every checkpoint, but trainer."
                f"checkpoint_every={every} is not a multiple of trainer.valid_every={valid}: take "
                f"trainer.checkpoint_every={valid or 'n'}{'' if valid else ' and trainer.valid_every=n'}."
            )
        if trainer.keep_every and every and trainer.keep_every % every:
            raise ConfigError(
                f"trainer.keep_every={trainer.keep_every} is not a multiple of trainer.checkpoint_every={every}, so "
                f"only some of its steps have a checkpoint: take {-(-trainer.keep_every // every) * every}."
            )

    def _check_watching(self) -> None:
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
        sharded = trainer.strategy == "deepspeed" and trainer.zero_stage == 3
        if trainer.noise_every and (sharded or trainer.activation_checkpointing):
            culprit = "zero_stage=3" if sharded else "activation_checkpointing=true"
            raise ConfigError(
                f"trainer.noise_every={trainer.noise_every} and trainer.{culprit}: its gradients are taken beside the "
                "training step's, which needs whole weights and kept activations; set trainer.noise_every=0."
            )

    def _check_deepspeed(self) -> None:
        given = self.deepspeed
        for section in ("zero_optimization", "fp16"):
            if not isinstance(given.get(section, {}), dict):
                raise ConfigError(f"deepspeed.{section}={given[section]}: it is a section, with keys below it.")
        for name, ours in _OURS.items():
            if _holds(given, name):
                raise ConfigError(f"deepspeed.{name} is set from {ours}: set that instead.")
        if "fp16" in given and self.trainer.precision != "fp16":
            raise ConfigError(
                "deepspeed.fp16 scales the loss of trainer.precision=fp16, but trainer.precision="
                f"{self.trainer.precision}: set that, or remove the section."
            )
        self._check_offload()

    def _check_offload(self) -> None:
        trainer = self.trainer
        places = {"offload_optimizer": trainer.offload_optimizer, "offload_params": trainer.offload_params}
        for name, device in places.items():
            least = 3 if name == "offload_params" or device == "nvme" else 1
            if device != "none" and (trainer.strategy != "deepspeed" or trainer.zero_stage < least):
                raise ConfigError(
                    f"trainer.{name}={device} is done by DeepSpeed from ZeRO-{least} on, but trainer.strategy="
                    f"{trainer.strategy} and trainer.zero_stage={trainer.zero_stage}: take "
                    f"trainer.strategy=deepspeed trainer.zero_stage={max(least, trainer.zero_stage)}."
                )
        if "nvme" in places.values() and not trainer.offload_path:
            raise ConfigError("trainer.offload_path is empty: name a folder on the disk that is offloaded to.")
        if trainer.activation_offload and not trainer.activation_checkpointing:
            raise ConfigError(
                "trainer.activation_offload keeps what a recomputation starts from: set trainer."
                "activation_checkpointing=true too."
            )
        if self.optim.implementation != "torch" and trainer.strategy != "deepspeed":
            raise ConfigError(
                f"optim.implementation={self.optim.implementation} is DeepSpeed's, but trainer.strategy="
                f"{trainer.strategy}: take optim.implementation=torch or trainer.strategy=deepspeed."
            )


def _holds(section: Any, name: str) -> bool:
    """Whether a dotted name stands in nested sections."""
    first, _, rest = name.partition(".")
    return isinstance(section, dict) and first in section and (not rest or _holds(section[first], rest))
