"""Train a model here: 1 process, or N of them with trainer.devices=N.

Ctrl-C saves at the next step and leaves with exit code 75; `longseq resume` goes on from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from longseq.commands.key_help import help_on_keys
from longseq.commands.training import check_data, check_disk, check_origin, train
from longseq.config_loading import load_config
from longseq.data import begin_reading, fix_order, identities, resolve_sources
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.run import Run
from longseq.text_parts import fit_parts
from longseq.training.deepspeed_settings import check_deepspeed
from longseq_data.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, e.g. configs/protein/base.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. data.train='[a.fasta.gz]'")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    refuse_several_tasks(os.environ, "fit")
    config = load_config(args.config, args.overrides)
    resolve_sources(config)
    fit_parts(config)
    fix_order(config)
    Run.new(config, default_name=args.config.stem)  # a taken name is said before the data are read
    begin_reading(config)
    check_data(config, begun=True)
    origin = check_origin(config)
    check_deepspeed(config)
    check_disk(config, user_path(config.run.dir).resolve())
    new = Run.create(config, default_name=args.config.stem)
    with new.locked():
        try:
            new.record_data(identities(config))
            return train(new, config, checkpoint=None, origin=origin)
        finally:
            new.discard_if_untrained()
