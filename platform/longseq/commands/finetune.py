"""Teach a trained model the labels of a table: a class or a number for each sequence, or for each residue.

TABLE is CSV or TSV with a header, gzipped too. Labels per residue are a string with a letter for each, or a list of
numbers. The result is a run like any other: `longseq predict`, `evaluate` and `resume` take it. The checkpoint of the
lowest validation loss is the one that counts; training ends when that has not fallen for finetune.patience validations.
"""

from __future__ import annotations

import argparse

from longseq.commands.key_help import help_on_keys
from longseq.commands.numbers import natural, positive
from longseq.commands.options import add_overrides, given
from longseq.config.finetune import LEARN
from longseq.printed import as_json
from longseq.trained_model import TARGET_HELP
from longseq_data.readers.label_table import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|CHECKPOINT|FOLDER", help=TARGET_HELP)
    parser.add_argument("table", metavar="TABLE", help="CSV or TSV")
    add_overrides(parser, "e.g. run.name=mine trainer.devices=2")
    parser.add_argument("--sequence", metavar="COLUMN", help="the sequences; default: by its name")
    parser.add_argument("--label", metavar="COLUMN", help="the labels; default: by its name")
    parser.add_argument("--task", choices=("auto", *TASKS), default="auto", help="default: auto, by the labels")
    parser.add_argument(
        "--learn", choices=LEARN, default="head", help="a linear head alone (default), LoRA and the head, or everything"
    )
    parser.add_argument(
        "--split-column", metavar="COLUMN", help="says train, valid or test; default: a hash of the sequence"
    )
    parser.add_argument(
        "--cluster-column", metavar="COLUMN", help="hashed in place of the sequence: clusters stay whole"
    )
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="sequences of a step; default 32")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs with N seeds; default 1")
    parser.add_argument(
        "--bootstrap", type=natural, default=1000, metavar="N", help="resamplings of intervals; default 1000, 0: none"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.epilog = help_on_keys()


def run(args: argparse.Namespace) -> int:
    from longseq.evaluation.finetune import finetune
    from longseq.evaluation.label_measures import table

    names = "sequence label task learn split_column cluster_column batch seeds bootstrap"
    found = finetune(args.target, args.table, args.overrides, **given(args, names))
    reports = [evaluation.as_dict() for evaluation in found.evaluations]
    if args.json:
        print(as_json(reports, indent=2))
        return found.code
    print("\n".join(line for training in found.trainings for line in training.report))
    if reports:
        print(f"\n{table(reports)}")
    for split in ("valid", "test") if len(reports) > 1 else ():
        for name, (mean, deviation) in found.spread(split).items():
            print(f"{split} {name}: {mean:.4f} ± {deviation:.4f} over {len(reports)} seeds")
    return found.code
