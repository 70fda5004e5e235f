"""Go on with a run from its newest whole checkpoint, where it was stopped, killed or finished early.

trainer.devices, zero_stage, accumulate and strategy may be others than before: the steps stay those of the same samples
(data.batch_tokens is the step of all processes together). The precision must be that of the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys

from longseq.checkpoint import Checkpoint, go_back_to
from longseq.commands.key_help import help_on_keys
from longseq.commands.training import (
    FIXED,
    TAKE_OVER_HELP,
    check_data,
    check_disk,
    check_origin,
    check_precision,
    note_weights,
    refuse_changes,
    say_schedule,
    train,
)
from longseq.config import Config
from longseq.config_loading import save_config
from longseq.data import begin_reading, identities, resolve_sources
from longseq.errors import LongseqError, RunError
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.launch.slurm.state import check_free
from longseq.run import Run
from longseq.training.deepspeed_settings import check_deepspeed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER_HELP)
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    refuse_several_tasks(os.environ, "resume")
    run = Run.open(args.run_folder)
    before, config = run.config(), run.config(tuple(args.overrides))
    resolve_sources(config)
    refuse_changes(before, config, run, FIXED)
    data = identities(config)
    if not config.data.accept_changes:
        run.check_data(config, data)
    config.data.accept_changes = False  # of these data, and not of the next ones
    with run.locked():
        check_free(run, take_over=args.take_over)
        checkpoint, damaged = run.newest_checkpoint()
        for problem in damaged:
            print(f"longseq: warning: {problem} Going back to the one before it.", file=sys.stderr)
        if checkpoint:
            _compare(checkpoint, config)
            say_schedule(before, config, checkpoint.position.step)
            if checkpoint.position.step >= config.trainer.max_steps:
                raise RunError(
                    f"{run.path}: finished at step {checkpoint.position.step}. To train on, raise the last step: "
                    f"`{run.resume_command} trainer.max_steps={2 * checkpoint.position.step}`."
                )
        note_weights(before, config, checkpoint.position.samples if checkpoint else 0)
        begin_reading(config)
        check_data(config, begun=True)
        origin = None if checkpoint else check_origin(config)
        check_deepspeed(config)
        check_disk(config, run.path)
        save_config(config, run.config_path)
        run.record_data(data)
        run.mark_finished(None)
        try:
            for kept in go_back_to(checkpoint, damaged) if checkpoint else ():
                print(f"longseq: warning: the damaged one is kept as {kept}", file=sys.stderr)
            code = train(run, config, checkpoint, origin)
        except LongseqError:
            if run.last_good() == checkpoint:  # nothing came of the new settings
                save_config(before, run.config_path)
                if checkpoint and checkpoint.position.step >= before.trainer.max_steps:
                    run.mark_finished(checkpoint.position.step)
            raise
        return code


def _compare(checkpoint: Checkpoint, config: Config) -> None:
    """Say what is different from how the checkpoint was trained, and refuse what cannot be.

    Raises:
        RunError: for another precision.
    """
    check_precision(checkpoint, config)
    position, trainer = checkpoint.position, config.trainer
    changed = {
        "processes": (position.world_size, config.processes),
        "strategy": (position.strategy, trainer.strategy),
        "ZeRO stage": (position.zero_stage, trainer.zero_stage),
        "accumulated batches": (position.accumulate, trainer.accumulate),
    }
    words = [f"{what} {old} → {new}" for what, (old, new) in changed.items() if old != new]
    if words:
        print(
            f"elastic  {', '.join(words)}; one step stays {config.samples_per_step} sequences, from step "
            f"{position.step} (sample {position.samples:,}) on",
            file=sys.stderr,
        )
