"""Labels of sequences, by a run of `longseq finetune`: CSV with a row for each sequence, in the order of the input.

Columns are id and prediction, and the probability of each class where sequences have one. Labels of residues are one
string where classes are letters, else a JSON list. FILE is CSV or TSV (ids of a column called id, or numbers from 1),
or FASTA. Letters that the model does not know are refused.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from longseq.commands.numbers import positive
from longseq.commands.options import add_overrides, ready
from longseq.evaluation.predict import predict
from longseq.output_files import output
from longseq.trained_model import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|CHECKPOINT", type=Path, help="of `longseq finetune`")
    parser.add_argument("file", metavar="FILE", help="a table, or FASTA")
    add_overrides(parser)
    parser.add_argument("--sequence", metavar="COLUMN", help="the sequences; default: the one that was learned from")
    parser.add_argument("--id", metavar="COLUMN", help="the ids; default: id, or numbers from 1")
    parser.add_argument(
        "--batch-tokens", type=positive, default=4096, metavar="N", help="tokens read at once; default 4096"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")


def run(args: argparse.Namespace) -> int:
    source = find(args.target, args.overrides)
    found = predict(source, args.file, sequence=args.sequence, id=args.id, batch_tokens=args.batch_tokens)
    ready()
    classes = source.config.finetune.classes if source.config.finetune.task == "classification" else []
    with output(args.out, args.file) as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["id", "prediction", *(f"probability of {name}" for name in classes)])
        for each in found:
            value = each.value if isinstance(each.value, str) else json.dumps(each.value)
            rows.writerow([each.identifier, value, *(f"{share:.6f}" for share in each.probabilities.values())])
    return 0
