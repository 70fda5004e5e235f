"""The learning rate over the steps. No torch here."""

from __future__ import annotations

import math

from longseq.config.schema import Config
from longseq.config.training import OptimConfig


def schedule_change(before: Config, after: Config, step: int) -> str | None:
    """What another last step, or another schedule, makes of the learning rate of a run that goes on at ``step``.

    Returns:
        a sentence with both rates; None where the next step's is the one that was planned.
    """
    planned, now = (
        config.optim.lr * learning_rate_share(step, config.optim, config.trainer.max_steps)
        for config in (before, after)
    )
    if not step or math.isclose(planned, now, rel_tol=1e-6):
        return None
    last = before.optim.lr * learning_rate_share(step - 1, before.optim, before.trainer.max_steps)
    whole = f"the {after.optim.schedule} rate"
    if after.optim.schedule in ("cosine", "wsd"):
        whole = f"the {after.optim.schedule} is now that of {after.trainer.max_steps:,} steps"
    return (
        f"schedule {whole} (before: {before.trainer.max_steps:,}): the learning rate goes from {last:.3g} at step "
        f"{step:,} to {now:.3g} at step {step + 1:,}"
    )


def learning_rate_share(step: int, config: OptimConfig, max_steps: int) -> float:
    """Learning rate of step ``step`` (0-based) as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inverse_sqrt":  # Vaswani et al. 2017
        return math.sqrt(max(1, config.warmup_steps) / (step + 1))
    if config.schedule == "wsd":  # warm-up, stable, decay: 1 − √, as Hägele et al. 2024, arXiv 2405.18392, found best
        start = max(config.warmup_steps, (1 - config.decay_fraction) * max_steps)
        fallen = math.sqrt(min(1.0, (step + 1 - start) / max(1e-9, max_steps - start))) if step + 1 > start else 0.0
        return config.final_lr + (1 - config.final_lr) * (1 - fallen)
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
