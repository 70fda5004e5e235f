"""One process's share of a training run, from its configuration to the last step."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map
from longseq.config.schema import Config
from longseq.data import identities
from longseq.devices import check_devices, on_cuda, own_device, sharing
from longseq.errors import ConfigError
from longseq.label_data import batches_of
from longseq.measure.memory import estimate
from longseq.models.compiling import missing_compiler
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.models.weights import load_weights
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run
from longseq.trained_model import find
from longseq.training.callbacks.attention_probe import AttentionProbe
from longseq.training.callbacks.bad_steps import BadSteps
from longseq.training.callbacks.benchmarks import Benchmarks
from longseq.training.callbacks.checkpointing import Checkpointing
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.ema import WeightAverage
from longseq.training.callbacks.first_failure import FirstFailure
from longseq.training.callbacks.gauges import Gauges
from longseq.training.callbacks.gradient_noise import GradientNoise
from longseq.training.callbacks.gradients import GradientNorm
from longseq.training.callbacks.histograms import Histograms
from longseq.training.callbacks.hyperparameters import Hyperparameters
from longseq.training.callbacks.length_warmup import LengthWarmup
from longseq.training.callbacks.patience import Patience
from longseq.training.callbacks.profile import Profile
from longseq.training.callbacks.progress import Progress
from longseq.training.callbacks.prometheus import Prometheus
from longseq.training.callbacks.samples import Samples
from longseq.training.callbacks.stopping import Settled, StopFlag, StopRequested
from longseq.training.callbacks.stragglers import Stragglers
from longseq.training.callbacks.times import Clock, Times
from longseq.training.callbacks.utilisation import Utilisation
from longseq.training.environment import start_facts
from longseq.training.loggers import check_loggers, further_loggers
from longseq.training.strategy import GivenPlaces, build_strategy
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import RunLogger
from longseq.training.vitals import Vitals
from longseq_data.datamodule import SequenceDataModule

_SHARDING = {"deepspeed": "DeepSpeed ZeRO-{}", "ddp": "none (DDP)", "single": "none (one process)"}
_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def fit(
    run: Run,
    config: Config,
    checkpoint: Checkpoint | None,
    stop: StopFlag,
    vitals: Vitals | None = None,
    origin: Path | None = None,
) -> bool:
    """Train until the last step or an agreed stop. Every rank calls it.

    vitals: told where the training is. origin: where the weights lie that a new training begins with, found and checked
    by one process for all.

    Returns:
        True when the last step was reached, False when stopped (and saved) before it.
    """
    check_machine(config)
    start = checkpoint.position.step if checkpoint else 0
    task = task_of(config, origin, checkpoint)
    vitals = vitals or Vitals()
    vitals.device = str(own_device(config))
    if config.trainer.compile:
        vitals.watch_compiler()
    trainer = build_trainer(run, config, stop, checkpoint, vitals)
    if trainer.is_global_zero:
        run.check_data(config, identities(config))  # once more: nothing was read before but its beginning
        if checkpoint:
            task.train_sums.restore(*checkpoint.position.unlogged, device=trainer.strategy.root_device)
        run.record_start(start_facts(config, start))
        _summary(task, config, run, start, trainer.strategy.root_device)
    try:
        run_to_its_end(trainer, task, training_data(config, checkpoint), checkpoint)
    except Settled:
        pass
    except StopRequested:
        return False
    if trainer.is_global_zero:
        run.mark_finished(trainer.global_step)
    return True


def run_to_its_end(
    trainer: pl.Trainer, task: LanguageModelling, data: SequenceDataModule, checkpoint: Checkpoint | None
) -> None:
    """Train. What ended a training is what is raised, and not what failed of taking it down afterwards."""
    first = FirstFailure()
    trainer.callbacks.insert(0, first)  # type: ignore[attr-defined]
    try:
        trainer.fit(task, data, ckpt_path=checkpoint.path if checkpoint else None)
    except BaseException:
        if first.failure is None:
            raise
    if first.failure is not None:
        raise first.failure


def task_of(config: Config, origin: Path | None, checkpoint: Checkpoint | None) -> LanguageModelling:
    """What a run learns, tokens or labels, with the weights that it begins with."""
    if config.finetune.table:
        from longseq.training.tuning import LabelLearning

        labels = LabelLearning(config)
        if checkpoint:  # its training state has no more than what learns
            load_weights(labels.model, checkpoint.weights_path)
        elif origin:
            labels.begin_with(find(origin, sums=False).weights, own_device(config))
        return labels
    task = LanguageModelling(config)
    if origin and not checkpoint:
        begin_with(task.model, origin)
    return task


def begin_with(model: PerformerLM, origin: Path) -> None:
    """Give a new model the weights of a checkpoint or an exported folder, whose checksums are known to be right.

    Raises:
        LongseqError: if there are none, or they are those of another architecture.
    """
    load_weights(model, find(origin, sums=False).weights, may_learn_more=True)


def build_trainer(
    run: Run, config: Config, stop: StopFlag, checkpoint: Checkpoint | None, vitals: Vitals | None = None
) -> pl.Trainer:
    """Lightning's trainer with everything it would do by itself, and we do otherwise, switched off."""
    settings, gradient_norm, vitals = config.trainer, GradientNorm(config), vitals or Vitals()
    clock = Clock(vitals)
    if on_cuda(config):
        torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    curves = Curves(run, config, gradient_norm)
    start = checkpoint.position.step if checkpoint else 0
    checkpointing = Checkpointing(run, config, stop, gradient_norm, clock)
    trainer = pl.Trainer(
        accelerator="cuda" if on_cuda(config) else "cpu",
        devices=sharing(config) if on_cuda(config) else settings.devices,
        num_nodes=settings.nodes,
        strategy=build_strategy(config),
        plugins=[GivenPlaces()],
        precision=_PRECISION[settings.precision],  # type: ignore[arg-type]
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        # DeepSpeed clips by itself.
        gradient_clip_val=None if settings.strategy == "deepspeed" else config.optim.clip or None,
        val_check_interval=settings.valid_every * settings.accumulate or None,
        check_val_every_n_epoch=None if settings.valid_every else 1,
        limit_val_batches=None if settings.valid_every else 0,
        num_sanity_val_steps=0,
        inference_mode=False,  # ZeRO-3 gathers weights during validation
        use_distributed_sampler=False,
        logger=[RunLogger(run, start), *further_loggers(run, config)],
        callbacks=[
            gradient_norm,
            BadSteps(run, config, gradient_norm, checkpointing.finish_writing),
            curves,
            Progress(run, config, curves),
            *watching(config, curves),
            *([Prometheus(run, config, curves)] if settings.prometheus else []),
            *([LengthWarmup(config, start)] if settings.length_warmup_steps else []),
            *([WeightAverage(config, checkpoint)] if settings.ema_decay else []),
            *([Patience(run, config)] if config.finetune.table and config.finetune.patience else []),
            *([Benchmarks(config, stop, curves, clock)] if settings.benchmarks else []),
            checkpointing,
            *([Stragglers(config, curves, clock, vitals)] if settings.slow_factor else []),
            Times(curves, clock),
            *([Profile(run, config, curves)] if settings.profile_steps else []),
        ],
        profiler=clock,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's handler of SIGTERM calls a collective, wherever the other ranks are, and its loop asks all ranks for
    # one before each batch, which waits for the GPU: signals are StopFlag's alone.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def watching(config: Config, curves: Curves) -> list[pl.Callback]:
    """What only looks on and writes to TensorBoard; what is switched off is left out."""
    settings = config.trainer
    callbacks: list[pl.Callback] = [Hyperparameters(config), Gauges(curves), Utilisation(config, curves)]
    callbacks += [AttentionProbe(config, curves), Samples(config, curves)] if settings.probe_every else []
    callbacks += [Histograms(config, curves)] if settings.histogram_every else []
    callbacks += [GradientNoise(config, curves)] if settings.noise_every else []
    return callbacks


def check_machine(config: Config) -> None:
    """Refuse what this machine cannot do.

    Raises:
        ConfigError: naming the key to change.
    """
    check_devices(config)
    check_loggers(config)
    settings = config.trainer
    if settings.compile and (reason := missing_compiler("cuda" if on_cuda(config) else "cpu")):
        raise ConfigError(f"trainer.compile=true, but {reason}: install it, or set trainer.compile=false.")
    if config.optim.implementation == "cpu" and on_cuda(config) and settings.offload_optimizer == "none":
        raise ConfigError(
            "optim.implementation=cpu steps in the CPU's memory, and the weights are on the GPU: set "
            "trainer.offload_optimizer=cpu, or optim.implementation=fused."
        )
    if settings.precision == "fp16" and not on_cuda(config):
        raise ConfigError("trainer.precision=fp16 needs a GPU: set trainer.precision to bf16 or fp32.")


def training_data(config: Config, checkpoint: Checkpoint | None) -> SequenceDataModule:
    """Batches of the training from where a checkpoint left it, and of the validations."""
    return SequenceDataModule(
        batches_of(config, "train"),
        batches_of(config, "valid") if config.trainer.valid_every else None,
        batch_sequences=config.batch_sequences,
        accumulate=config.trainer.accumulate,
        workers=config.data.workers,
        start=checkpoint.position.samples if checkpoint else 0,
        valid_samples=config.data.valid_samples,
        context_parallel=config.trainer.context_parallel,
    )


def _processes(config: Config) -> str:
    kind, parts = "GPU" if on_cuda(config) else "CPU", config.trainer.context_parallel
    if parts == 1:
        return f"{config.processes} {kind} process(es)"
    return f"{config.replicas} group(s) of {parts} {kind} processes that share sequences"


def _attention(spec: PerformerSpec, device: torch.device) -> str:
    if spec.kind == "exact":
        return "exact attention"
    window = f", window {spec.window}" if spec.window else ""
    return f"FAVOR+ {spec.kernel}, {spec.features} features{window}, backend {_backend(spec, device)}"


def _backend(spec: PerformerSpec, device: torch.device) -> str:
    """Who will compute attention."""
    row = torch.empty(1, 1, spec.head_dim, device=device)
    phi = feature_map(spec.kernel, spec.features, spec.head_dim, device=device) if spec.features else None
    return backends.name_of(backends.choose(spec.backend, phi, (row, row, row)))


def _summary(task: LanguageModelling, config: Config, run: Run, start: int, device: torch.device) -> None:
    spec, trainer = task.model.spec, config.trainer
    attention = spec.in_words(lambda layer: _attention(layer, device))
    learns = config.model.objective
    if config.finetune.table:
        learnt = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
        learns = f"{config.finetune.task}, {config.finetune.learn} learns ({learnt:,} parameters)"
    data = config.data
    step = f"{data.batch_tokens:,} tokens = {config.samples_per_step} sequences × {data.length}"
    if data.by_length:
        step = f"up to {data.batch_tokens:,} tokens of sequences of similar length, {data.length} at most"
    lines = [
        f"model    {spec.parameter_count:,} parameters: {spec.depth} blocks, {spec.heads} heads, width {spec.dim}, "
        f"MLP {spec.hidden}; {f'{spec.made_of}; ' if spec.made_of else ''}{attention}; {learns}",
        f"step     {step}, on {_processes(config)} × {trainer.accumulate} batch(es)",
        f"sharding {_SHARDING[trainer.strategy].format(trainer.zero_stage)}, {trainer.precision}",
        f"memory   {estimate(config, spec.vocabulary, on_cuda=on_cuda(config)).line()}",
        f"run      {run.path}, step {start} of {trainer.max_steps}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
