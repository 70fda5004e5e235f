"""Helix, strand or neither, residue by residue: accuracy of a linear probe on a model's frozen vectors.

FILE has a JSON object on each line: id, sequence, secondary_structure (a letter of H, E, - for each residue, by DSSP).
The probe is learned from 20 chains, and every chain is tested by one that has not seen it. Next to it: the same probe
on the letters alone, and the commonest state.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.numbers import natural, positive
from longseq.commands.options import add_devices, add_models, given, models_and_keys, ready, told
from longseq.printed import as_json

if TYPE_CHECKING:
    from longseq.evaluation.field.structure import Probe, StructureBenchmark

_LETTERS, _COMMONEST = "letters alone", "commonest state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="chains, a JSON object on each line")
    add_models(parser)
    parser.add_argument(
        "--layer", type=natural, metavar="K", help="0: the embedding, K: after block K; default: what the head reads"
    )
    parser.add_argument("--train", type=positive, default=20, metavar="N", help="chains to learn from; default 20")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of who learns from whom; default 0")
    add_devices(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from longseq.evaluation.field.structure import benchmark_structure

    targets, overrides = models_and_keys(args)
    ready()
    how = given(args, "layer train seed ema devices")
    found = benchmark_structure(args.file, targets, overrides, progress=told, **how)
    print(as_json(found.as_dict(), indent=2) if args.json else "\n".join(_table(found)))
    return 0


def _table(found: StructureBenchmark) -> Iterator[str]:
    width = max(len(_COMMONEST), *(len(model.name) for model in found.models))
    yield f"{found.chains} chains, {found.residues:,} residues"
    head = f"{'model':<{width}}{'accuracy':>10}{'helix':>9}{'strand':>9}{'neither':>9}"
    for objective in sorted({model.objective for model in found.models}, reverse=True):
        yield ""
        yield f"{objective} models"
        yield head
        for model in found.models:
            if model.objective == objective:
                yield _line(model.name, model.probe, width)
    yield ""
    yield _line(_LETTERS, found.letters, width)
    yield f"{_COMMONEST:<{width}}{found.most_frequent:>10.1%}"


def _line(name: str, probe: Probe, width: int) -> str:
    shares = "".join(f"{'–' if share != share else f'{share:.1%}':>9}" for share in probe.recall.values())
    return f"{name:<{width}}{probe.accuracy:>10.1%}{shares}"
