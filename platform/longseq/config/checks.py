"""The arithmetic across configuration keys: what each allows by itself and not with the others. No torch here."""

from __future__ import annotations

import difflib
from typing import Any

from longseq.config.sections import Sections
from longseq.errors import ConfigError
from longseq_data.readers.images import values_of
from longseq_data.readers.reading import TABLES, TOKENS, disagreement

_WHENCE = ("trainer.devices", "trainer.nodes × trainer.devices")  # on one machine, on several

LOGGERS = ("tensorboard", "wandb", "mlflow")

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


def check(config: Sections) -> None:
    """The arithmetic across keys, and DeepSpeed settings that would contradict them.

    Raises:
        ConfigError: with the numbers, and numbers that would do.
    """
    data, trainer = config.data, config.trainer
    if config.finetune.table:
        _check_finetune(config)
    elif not data.train:
        raise ConfigError("data.train is empty: name files, e.g. data.train='[proteins.fasta.gz]'.")
    if data.valid_fraction + data.test_fraction >= 1:
        raise ConfigError(
            f"data.valid_fraction + data.test_fraction = {data.valid_fraction} + {data.test_fraction} leaves "
            "nothing to train on: make them smaller."
        )
    if trainer.valid_every and not (data.valid or data.valid_fraction or config.finetune.split):
        raise ConfigError(
            f"trainer.valid_every={trainer.valid_every}, but nothing is held out to validate on: name files in "
            "data.valid, set data.valid_fraction above 0, or trainer.valid_every=0."
        )
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas={list(config.optim.betas)}: two numbers from [0, 1), e.g. [0.9, 0.98].")
    if config.processes % trainer.context_parallel:
        raise ConfigError(
            f"trainer.context_parallel={trainer.context_parallel} does not divide the number of processes, "
            f"{config.processes} ({_WHENCE[trainer.nodes > 1]}): take a divisor of it, or a multiple as processes."
        )
    ranks = config.replicas * trainer.accumulate
    sharing = f"{config.processes} processes ({_WHENCE[trainer.nodes > 1]})"
    if trainer.context_parallel > 1:
        sharing = f"{config.replicas} groups of trainer.context_parallel={trainer.context_parallel} processes"
    if data.by_length:
        if config.samples_per_step < ranks:
            raise ConfigError(
                f"data.batch_tokens={data.batch_tokens} with data.packing={data.packing} is less than one sequence of "
                f"data.length={data.length} for each of {sharing} × {trainer.accumulate} accumulated batches "
                "(trainer.accumulate): "
                f"take {ranks * data.length}, or change one of them."
            )
    elif data.batch_tokens % data.length:
        raise ConfigError(
            f"data.batch_tokens={data.batch_tokens} is not a multiple of data.length={data.length}: "
            f"take {-(-data.batch_tokens // data.length) * data.length}."
        )
    elif config.samples_per_step % ranks:
        whole = -(-config.samples_per_step // ranks) * ranks
        raise ConfigError(
            f"one step is data.batch_tokens / data.length = {data.batch_tokens} / {data.length} = "
            f"{config.samples_per_step} sequences, which {sharing} × "
            f"{trainer.accumulate} accumulated batches (trainer.accumulate) do not share evenly: change one of "
            f"them, or take data.batch_tokens={whole * data.length}."
        )
    config.performer_spec(vocabulary=2)  # its size decides nothing that could be refused
    if config.model.max_positions and data.length > config.model.max_positions:
        raise ConfigError(
            f"data.length={data.length} is more than the model has positions for (model.max_positions="
            f"{config.model.max_positions}): take a shorter length."
        )
    if config.model.mask_scaling and trainer.context_parallel > 1:
        raise ConfigError(
            f"model.mask_scaling=true and trainer.context_parallel={trainer.context_parallel}: a slice does not know "
            "how much of its sequence is masked; set trainer.context_parallel=1."
        )
    if data.fim_rate is not None and config.model.objective != "fim":
        raise ConfigError(
            f"data.fim_rate={data.fim_rate:g} is about model.objective=fim, and model.objective="
            f"{config.model.objective} lays nothing out: take fim, or leave data.fim_rate out."
        )
    _check_documents(config)
    _check_tokens(config)
    _check_trainer(config)
    _check_watching(config)
    _check_deepspeed(config)


def _check_finetune(config: Sections) -> None:
    trainer, learn = config.trainer, config.finetune.learn
    if config.data.train:
        raise ConfigError(
            f"finetune.table={config.finetune.table} and data.train: a run learns labels or tokens; leave one out."
        )
    if trainer.context_parallel > 1:
        raise ConfigError(
            f"trainer.context_parallel={trainer.context_parallel}: a label is that of a whole sequence, and a slice "
            "does not have it; set trainer.context_parallel=1."
        )
    if config.optim.name == "muon" and learn != "all":
        raise ConfigError(f"optim.name=muon steps whole matrices, which finetune.learn={learn} freezes: take adamw.")
    if config.optim.base_dim:
        raise ConfigError(f"optim.base_dim={config.optim.base_dim} is about new language models: leave it out.")
    for name in ("probe_every", "noise_every", "length_warmup_steps", "ema_decay"):
        if getattr(trainer, name):
            raise ConfigError(f"trainer.{name}={getattr(trainer, name)} is about tokens, not labels; set it to 0.")
    if trainer.benchmarks:
        raise ConfigError("trainer.benchmarks are those of a model of tokens, not of labels; set them to [].")


def _check_documents(config: Sections) -> None:
    data = config.data
    if data.reset and data.packing != "concat":
        raise ConfigError(
            f"data.reset=true and data.packing={data.packing}: no document there is to begin anew; "
            "take data.packing=concat, or data.reset=false."
        )
    if data.reverse and config.model.objective != "causal":
        masked = config.model.objective == "masked"
        why = "a masked model reads both sides in any case" if masked else "what is filled in has one direction"
        raise ConfigError(
            f"data.reverse={data.reverse} and model.objective={config.model.objective}: {why}; leave it out."
        )
    if data.crop != "random" and data.packing in ("concat", "family"):
        raise ConfigError(
            f"data.crop={data.crop} and data.packing={data.packing}: joined records are cut, not cropped; take "
            "data.packing=crop, or leave data.crop out."
        )
    try:
        documents = "data.reset=true" if data.reset else ""
        for at, options in config.performer_spec(vocabulary=2).entries():
            options.check(causal=config.causal, documents=documents, at=at)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def _check_tokens(config: Sections) -> None:
    """What format and tokens say of themselves; longseq.data asks again when it knows the files."""
    data = config.data
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
        check_pixels(config)


def check_pixels(config: Sections) -> None:
    """What a model of images asks of the data section.

    Raises:
        ConfigError: naming the key.
    """
    data = config.data
    values = values_of(data.image_size)
    if config.model.objective == "fim":
        raise ConfigError(
            "model.objective=fim with pixels: an image has no end that a middle could be written to; take causal."
        )
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


def _check_trainer(config: Sections) -> None:
    trainer = config.trainer
    _ = config.time_limit_seconds
    if 0 < trainer.spike_factor <= 1:
        raise ConfigError(
            f"trainer.spike_factor={trainer.spike_factor:g} would call every loss above the mean a spike: take a "
            "factor above 1, e.g. 2."
        )
    if trainer.strategy == "single" and config.processes > 1:
        several = f"trainer.devices={trainer.devices}" if trainer.devices > 1 else f"trainer.nodes={trainer.nodes}"
        raise ConfigError(
            f"trainer.strategy=single is one process, but {several}: take trainer.strategy=ddp or deepspeed, or "
            f"{several.partition('=')[0]}=1."
        )
    if trainer.strategy != "deepspeed" and config.deepspeed:
        raise ConfigError(
            f"deepspeed.{next(iter(config.deepspeed))} is set, but trainer.strategy={trainer.strategy} does without "
            "DeepSpeed: remove the deepspeed section, or take trainer.strategy=deepspeed."
        )
    tile = config.sequence_tile(on_cuda=False)  # whether there are tiles does not depend on the device
    if trainer.compile and (tile or trainer.context_parallel > 1):
        culprit = f"model.sequence_tile={tile}" if tile else f"trainer.context_parallel={trainer.context_parallel}"
        raise ConfigError(
            f"trainer.compile=true and {culprit}: only whole blocks of whole sequences are compiled; set "
            "trainer.compile=false."
        )
    every, valid = trainer.checkpoint_every, trainer.valid_every
    if trainer.keep_best and (not every or not valid or every % valid):
        raise ConfigError(
            f"trainer.keep_best={trainer.keep_best} needs a validation at every checkpoint, but trainer."
            f"checkpoint_every={every} is not a multiple of trainer.valid_every={valid}: take "
            f"trainer.checkpoint_every={valid or 'n'}{'' if valid else ' and trainer.valid_every=n'}."
        )
    in_memory = trainer.memory_checkpoint_every
    if in_memory and every and in_memory % every == 0:
        raise ConfigError(
            f"trainer.memory_checkpoint_every={in_memory} is a multiple of trainer.checkpoint_every={every}, so each "
            "copy would be one of a checkpoint: take fewer steps, or 0."
        )
    if trainer.keep_every and every and trainer.keep_every % every:
        raise ConfigError(
            f"trainer.keep_every={trainer.keep_every} is not a multiple of trainer.checkpoint_every={every}, so "
            f"only some of its steps have a checkpoint: take {-(-trainer.keep_every // every) * every}."
        )


def _check_watching(config: Sections) -> None:
    trainer, data = config.trainer, config.data
    for name in trainer.loggers:
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"trainer.loggers={trainer.loggers}: choose from {', '.join(LOGGERS)}.{hint}")
    steps, ranks = trainer.profile_steps, trainer.profile_ranks
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(f"trainer.profile_steps={steps}: the first and the last step, e.g. [10, 13].")
    if steps and steps[0] > trainer.max_steps:
        raise ConfigError(
            f"trainer.profile_steps={steps}: the training ends before, at trainer.max_steps={trainer.max_steps}."
        )
    if steps and not (ranks and min(ranks) >= 0):  # those beyond may come back with more nodes
        raise ConfigError(f"trainer.profile_ranks={ranks}: numbers of processes, from 0 on.")
    if trainer.length_warmup_steps and trainer.length_warmup_start > data.length:
        raise ConfigError(
            f"trainer.length_warmup_start={trainer.length_warmup_start} is more than data.length={data.length}: "
            "begin shorter."
        )
    if trainer.noise_every and config.batch_sequences < 2:
        raise ConfigError(
            f"trainer.noise_every={trainer.noise_every} compares the halves of a process's batch, which has "
            f"{config.batch_sequences} sequence (data.batch_tokens / data.length / trainer.devices / "
            "trainer.accumulate): give it two or more, or set trainer.noise_every=0."
        )
    if trainer.noise_every and trainer.context_parallel > 1:
        raise ConfigError(
            f"trainer.noise_every={trainer.noise_every} and trainer.context_parallel={trainer.context_parallel}: its "
            "gradients are those of whole sequences in one process; set trainer.noise_every=0."
        )
    sharded = trainer.strategy == "deepspeed" and trainer.zero_stage == 3
    tile = config.sequence_tile(on_cuda=trainer.accelerator == "cuda")
    if trainer.noise_every and (sharded or trainer.activation_checkpointing or tile):
        culprit = f"model.sequence_tile={tile}"
        if sharded or trainer.activation_checkpointing:
            culprit = "trainer.zero_stage=3" if sharded else "trainer.activation_checkpointing=true"
        raise ConfigError(
            f"trainer.noise_every={trainer.noise_every} and {culprit}: its gradients are taken during the "
            "training step's, which needs whole weights and kept activations; set trainer.noise_every=0."
        )


def _check_deepspeed(config: Sections) -> None:
    given = config.deepspeed
    for section in ("zero_optimization", "fp16"):
        if not isinstance(given.get(section, {}), dict):
            raise ConfigError(f"deepspeed.{section}={given[section]}: it is a section, with keys below it.")
    for name, ours in _OURS.items():
        if _holds(given, name):
            raise ConfigError(f"deepspeed.{name} is set from {ours}: set that instead.")
    if "fp16" in given and config.trainer.precision != "fp16":
        raise ConfigError(
            "deepspeed.fp16 scales the loss of trainer.precision=fp16, but trainer.precision="
            f"{config.trainer.precision}: set that, or remove the section."
        )
    if config.trainer.overlap_comm is not None and config.trainer.strategy != "deepspeed":
        raise ConfigError(
            f"trainer.overlap_comm={str(config.trainer.overlap_comm).lower()} is DeepSpeed's, but trainer.strategy="
            f"{config.trainer.strategy}: leave it out, or take trainer.strategy=deepspeed."
        )
    if config.trainer.overlap_comm is not None and _holds(given, "zero_optimization.overlap_comm"):
        raise ConfigError("trainer.overlap_comm and deepspeed.zero_optimization.overlap_comm: set one of them.")
    _check_offload(config)


def _check_offload(config: Sections) -> None:
    trainer = config.trainer
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
    if trainer.activation_offload and not (trainer.activation_checkpointing or config.sequence_tile(on_cuda=False)):
        raise ConfigError(
            "trainer.activation_offload keeps what a recomputation starts from: set trainer."
            "activation_checkpointing=true too."
        )
    if config.optim.name == "muon" and config.optim.implementation != "torch":
        raise ConfigError(
            f"optim.name=muon and optim.implementation={config.optim.implementation}: that is one of DeepSpeed's "
            "AdamWs; leave it out."
        )
    if config.optim.name == "muon" and trainer.offload_optimizer != "none":
        raise ConfigError(
            f"optim.name=muon and trainer.offload_optimizer={trainer.offload_optimizer}: matrices are put together "
            "where their gradients are, and offloaded ones cannot be; set trainer.offload_optimizer=none, or take "
            "optim.name=adamw."
        )
    if config.optim.implementation != "torch" and trainer.strategy != "deepspeed":
        raise ConfigError(
            f"optim.implementation={config.optim.implementation} is DeepSpeed's, but trainer.strategy="
            f"{trainer.strategy}: take optim.implementation=torch or trainer.strategy=deepspeed."
        )


def _holds(section: Any, name: str) -> bool:
    """Whether a dotted name stands in nested sections."""
    first, _, rest = name.partition(".")
    return isinstance(section, dict) and first in section and (not rest or _holds(section[first], rest))
