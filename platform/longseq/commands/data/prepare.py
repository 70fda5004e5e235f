"""Prepare a corpus: filter, drop duplicates, split, shuffle, and write a Hugging Face Arrow dataset with a manifest.

Interrupted at any moment, the same command goes on where it stopped. The corpus gets its name when it is whole.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.key_help import help_on_flat_keys
from longseq_data.files import user_path
from longseq_data.prepare.config import PrepareConfig

if TYPE_CHECKING:
    from longseq_data.prepare.workers import Nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file with the keys below, or a name of `longseq configs`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. sources='[a.fasta.gz]'")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that exists")
    parser.add_argument(
        "--restart", action="store_true", help="forget what an interrupted preparation has done, and start over"
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="as each task of a srun step with one task per node: the first one schedules, the others work for it",
    )
    parser.epilog = f"configuration keys (type, default, meaning):\n\n{help_on_flat_keys(PrepareConfig)}"
    parser.set_defaults(flat_keys={item.name: item.metadata["meaning"] for item in fields(PrepareConfig)})


def run(args: argparse.Namespace) -> int:
    from longseq.commands.data.progress import Bar
    from longseq.preparation import preparing, read
    from longseq.runs.run import as_typed
    from longseq_data.prepare.inspection import report_lines
    from longseq_data.prepare.workers import help_out, send_home

    config = read(args.config, args.overrides)
    nodes, first = _nodes(config) if args.step else (None, True)
    if nodes is not None and not first:
        help_out(nodes, config.processes)
        return 0
    try:
        with Bar(
            {"bytes": ("reading", "B"), "clusters": ("clustering", " steps"), "shards": ("writing", " shards")}
        ) as bar:
            made = preparing(config, overwrite=args.overwrite, restart=args.restart, progress=bar, nodes=nodes)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise
    finally:
        if nodes is not None:
            send_home(nodes)
    output = as_typed(made.folder)
    for line in report_lines(output, made.manifest):
        print(line)
    print(f"\nCheck it:  longseq data verify {output}" if made.new else "\nIt was there already: nothing has changed.")
    return 0


def _nodes(config: PrepareConfig) -> tuple[Nodes, bool]:
    """The nodes of the step that this process is a task of, and whether it is the one that schedules.

    Raises:
        LongseqError: outside of a step.
    """
    from longseq.errors import LongseqError
    from longseq.launch.slurm.place import Place
    from longseq_data.prepare.workers import Nodes

    if "SLURM_STEP_ID" not in os.environ:
        raise LongseqError("--step: this is no task that srun has started; leave it out on one machine.")
    if "TMPDIR" in os.environ:  # the job's script makes it on the first node
        Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    place = Place.of_slurm(os.environ)
    output = user_path(config.output).absolute()
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    start = ".".join(os.environ.get(name, "0") for name in names)
    return Nodes(place.world, place.address, output.with_name(f".{output.name}.scheduler"), start), place.rank == 0
