"""How well a model's scores of mutants predict deep mutational scans: ProteinGym (Notin et al. 2023).

FOLDER is as ProteinGym distributes it: a reference file (DMS_substitutions.csv, DMS_indels.csv) and a CSV for each
assay, in the folder or one below. Masked models score substitutions by masked marginals, causal ones by
log-likelihood; indels go by (pseudo-)log-likelihood. Proteins are read whole, however long. Averages are the official
ones: over the assays of a protein, the proteins of a selection type, the selection types. Published results
(DMS_substitutions_Spearman_DMS_level.csv, ...) stand next to them, over the same assays.

An assay that is done is kept in the run's evaluations/proteingym (scores of all mutants, and measures): the same
command goes on where it was stopped or killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.numbers import natural
from longseq.commands.options import add_devices, add_direction, add_models, given, models_and_keys, ready
from longseq.printed import as_json

if TYPE_CHECKING:
    from longseq.evaluation.field.averages import Averages
    from longseq.evaluation.field.proteingym import ProteinGym

_DASH = "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="reference file and assays")
    add_models(parser)
    parser.add_argument("--assay", action="append", default=[], metavar="ID", help="this one alone; may be repeated")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="the reference file, if it is not in FOLDER")
    parser.add_argument(
        "--official",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="published results by assay, or a folder of them, if they are not in FOLDER",
    )
    parser.add_argument(
        "--beside", action="append", metavar="MODEL", help="a published model to stand next to; may be repeated"
    )
    parser.add_argument(
        "--passes",
        type=natural,
        default=0,
        metavar="N",
        help="masked models on indels; default 0: one per position, exact",
    )
    add_direction(parser)
    add_devices(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where assays are kept; default: in the run")
    parser.add_argument("--details", action="store_true", help="also a table of all assays")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    from longseq.evaluation.field.proteingym import benchmark_proteingym

    targets, overrides = models_and_keys(args)
    ready()

    def progress(model: str, assay: str, kind: str, before: bool) -> None:
        print(f"longseq: {model}: {assay}, {kind}{': done before' if before else ''}", file=sys.stderr, flush=True)

    how = given(args, "reference official beside ema passes direction out devices")
    found = benchmark_proteingym(args.folder, targets, overrides, assays=args.assay, progress=progress, **how)
    if found.absent:
        named = ", ".join(found.absent[:3]) + (", ..." if len(found.absent) > 3 else "")
        print(f"longseq: note: {len(found.absent)} assays of the reference are not here: {named}", file=sys.stderr)
    for path in found.passed_over:
        print(f"longseq: note: {path} lists labels from the clinic, which are not scored here", file=sys.stderr)
    if args.official and not any(
        name.endswith(", published") for kind in found.kinds() for name in found.compared(kind)
    ):
        print("longseq: note: the published results have none of these assays", file=sys.stderr)
    print(as_json(found.as_dict(), indent=2) if args.json else "\n".join(_tables(found, args.details)))
    return 0


def _tables(found: ProteinGym, details: bool) -> Iterator[str]:
    from longseq.evaluation.field.measures import MEASURES

    for kind in found.kinds():
        rows = found.compared(kind)
        of_all = next(iter(rows.values()))["Spearman"]
        yield f"{kind}: {of_all.assays} assays of {of_all.proteins} proteins"
        yield ""
        width = max(len("model"), *map(len, rows))
        yield f"{'model':<{width}}" + "".join(f"{name.replace('_', ' '):>12}" for name in MEASURES) + f"{'assays':>8}"
        for name, by_measure in rows.items():
            values = (by_measure[measure].average if measure in by_measure else None for measure in MEASURES)
            assays = max(each.assays for each in by_measure.values())
            yield f"{name:<{width}}" + "".join(map(_cell, values)) + f"{assays:>8}"
        spearman = {name: row["Spearman"] for name, row in rows.items() if "Spearman" in row}  # published: not each
        for group, title in _groups(spearman):
            yield ""
            yield from _group(spearman, group, title, width)
        if details:
            yield ""
            yield from _assays(found, kind)
        yield ""


def _groups(rows: dict[str, Averages]) -> Iterator[tuple[str, str]]:
    for group in ("selection type", "taxon", "MSA depth", "mutations", "length"):
        if any(group in row.groups for row in rows.values()):
            yield group, f"Spearman by {group}" + (" (mean over assays)" if group == "length" else "")


def _group(rows: dict[str, Averages], group: str, title: str, width: int) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows.values() for name in row.groups.get(group, {})))
    sizes = [max(12, len(name) + 2) for name in names]
    yield title
    yield " " * width + "".join(f"{name:>{size}}" for name, size in zip(names, sizes, strict=True))
    for model, row in rows.items():
        values = row.groups.get(group, {})
        if not values:
            continue
        yield f"{model:<{width}}" + "".join(
            _cell(values.get(name), size) for name, size in zip(names, sizes, strict=True)
        )


def _assays(found: ProteinGym, kind: str) -> Iterator[str]:
    ids = [assay.id for assay in found.assays(kind)]
    width = max(len("assay"), *map(len, ids))
    names = [model.name for model in found.models]
    sizes = [max(12, len(name) + 2) for name in names]
    yield f"{'assay':<{width}}{'residues':>10}{'mutants':>10}" + "".join(
        f"{name:>{size}}" for name, size in zip(names, sizes, strict=True)
    )
    for lines in zip(*([a for a in model.assays if a.kind == kind] for model in found.models), strict=True):
        first = lines[0]
        yield f"{first.assay.id:<{width}}{first.assay.length:>10,}{first.mutants:>10,}" + "".join(
            _cell(line.measures["Spearman"], size) for line, size in zip(lines, sizes, strict=True)
        )


def _cell(value: float | None, width: int = 12) -> str:
    shown = _DASH if value is None or value != value else f"{value:.3f}"
    return f"{shown:>{width}}"
