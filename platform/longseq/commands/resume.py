"""Go on with a run from its newest whole checkpoint, where it was stopped, killed or finished early.

The number of processes, the ZeRO stage, the precision and the accumulation must be those of the checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from longseq.checkpoint import Checkpoint
from longseq.commands.training import FIXED, check_data, check_disk, help_on_keys, refuse_changes, train
from longseq.config import Config
from longseq.config_loading import save_config
from longseq.data import identities, resolve_sources
from longseq.errors import LongseqError, RunError
from longseq.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    run = Run.open(args.run_folder)
    before, config = run.config(), run.config(tuple(args.overrides))
    resolve_sources(config)
    refuse_changes(before, config, run, FIXED)
    data = identities(config)
    if not config.data.accept_changes:
        run.check_data(config, data)
    config.data.accept_changes = False  # of these data, and not of the next ones
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
        check_data(config)
        check_disk(config, run.path)
        save_config(config, run.config_path)
        run.record_data(data)
        run.mark_finished(None)
        try:
            code = train(run, config, checkpoint)
        except LongseqError:
            if run.newest_checkpoint()[0] == checkpoint:  # nothing came of the new settings
                save_config(before, run.config_path)
                if checkpoint and checkpoint.position.step >= before.trainer.max_steps:
                    run.mark_finished(checkpoint.position.step)
            raise
        return code


def _refuse_other_shards(checkpoint: Checkpoint, config: Config) -> None:
    position, trainer = checkpoint.position, config.trainer
    written = {
        "trainer.devices": (position.world_size, trainer.devices),
        "trainer.zero_stage": (position.zero_stage, trainer.zero_stage),
        "trainer.precision": (position.precision, trainer.precision),
        "trainer.accumulate": (position.accumulate, trainer.accumulate),
    }
    for name, (old, new) in written.items():
        if old != new:
            raise RunError(
                f"{checkpoint.path}: written with {name}={old}, it cannot be read with {new}: resume with {old}."
            )
