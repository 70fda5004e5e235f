"""Go on with a run from its newest whole checkpoint, where it was stopped, killed or finished early.

The number of processes, the ZeRO stage and the precision must be those of the checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from longseq.checkpoint import Checkpoint
from longseq.commands.training import check_data, check_disk, help_on_keys, train
from longseq.config import Config
from longseq.config_loading import save_config
from longseq.data import resolve_sources
from longseq.errors import RunError
from longseq.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    run = Run.open(args.run_folder)
    before, config = run.config(), run.config(tuple(args.overrides))
    _refuse_another_experiment(before, config, run)
    with run.locked():
        checkpoint, damaged = run.newest_checkpoint()
        for sentence in damaged:
            print(f"longseq: warning: {sentence} Going back to the one before it.", file=sys.stderr)
        if checkpoint:
            _refuse_other_shards(checkpoint, config)
            if checkpoint.position.step >= config.trainer.max_steps:
                raise RunError(
                    f"{run.path}: finished at step {checkpoint.position.step}. To train on, raise the last step: "
                    f"`{run.resume_command} trainer.max_steps={2 * checkpoint.position.step}`."
                )
        resolve_sources(config)
        check_data(config)
        check_disk(config, run.path)
        (run.path / "FINISHED").unlink(missing_ok=True)
        save_config(config, run.config_path)
        return train(run, config, checkpoint)


def _refuse_another_experiment(before: Config, after: Config, run: Run) -> None:
    """What the weights or the order of the samples depend on stays as it was."""
    fixed = {
        "run": ("name", "dir", "seed"),
        "model": ("preset", "dim", "depth", "heads", "ffn_dim", "objective"),
        "attention": ("qk_norm",),
        "data": (
            *("train", "valid", "test", "valid_fraction", "test_fraction"),
            *("length", "packing", "batch_tokens", "shuffle_buffer"),
        ),
    }
    for section, names in fixed.items():
        for name in names:
            old, new = getattr(getattr(before, section), name), getattr(getattr(after, section), name)
            if old != new:
                raise RunError(
                    f"{section}.{name}={new}: the run {run.path} was started with {old}, and a resumed run keeps it. "
                    "Start a new run with `longseq fit` instead."
                )


def _refuse_other_shards(checkpoint: Checkpoint, config: Config) -> None:
    position, trainer = checkpoint.position, config.trainer
    written = {
        "trainer.devices": (position.world_size, trainer.devices),
        "trainer.zero_stage": (position.zero_stage, trainer.zero_stage),
        "trainer.precision": (position.precision, trainer.precision),
    }
    for name, (old, new) in written.items():
        if old != new:
            raise RunError(
                f"{checkpoint.path}: written with {name}={old}, it cannot be read with {new}: resume with {old}."
            )
