"""The results that ProteinGym publishes: a CSV for each measure, a line for each assay, a column for each model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longseq.errors import LongseqError
from longseq.evaluation.field.assays import KINDS
from longseq.evaluation.field.averages import Assay, Averages, averages
from longseq.evaluation.field.measures import MEASURES
from longseq.evaluation.field.tables import columns, number, rows

BESIDE = ("Site-Independent", "ESM2 (8M)", "ESM2 (150M)", "ESM2 (650M)", "Progen2 S")  # what small models compare with

_NAME = re.compile(rf"DMS_({'|'.join(KINDS)})_({'|'.join(MEASURES)})_DMS_level\.csv")
_ID = "DMS ID"
_FACTS = ("UniProt ID", "Selection Type", "Taxon", "MSA_Neff_L_category")
_NO_MODELS = {_ID, "Number of Mutants", *_FACTS}


@dataclass(frozen=True)
class Official:
    """One published table, DMS_KIND_MEASURE_DMS_level.csv."""

    path: Path
    kind: str
    measure: str
    assays: dict[str, Assay]  # by id; lengths are not in it
    models: dict[str, dict[str, float]]  # name: value by the assay's id

    def averages(self, model: str, assays: Sequence[Assay] | None = None) -> Averages:
        """A model's averages over the assays given, or over all.

        Raises:
            LongseqError: for a model that the table has not, naming those it has.
        """
        if model not in self.models:
            raise LongseqError(f"{self.path}: has no model {model!r}; it has {', '.join(self.models)}.")
        return averages(list(self.assays.values()) if assays is None else assays, self.models[model])


def published(places: Iterable[Path]) -> list[Official]:
    """The tables among files, and in folders and those below.

    A clone of ProteinGym's repository has tables of the same names for models that were trained on the assays
    (benchmarks/DMS_supervised), whose first column is DMS_id: nothing that a score without training compares with.

    Raises:
        LongseqError: for a file named that is no such table.
    """
    found: dict[tuple[str, str], Official] = {}
    for place in places:
        files = sorted(place.rglob("DMS_*_DMS_level.csv")) if place.is_dir() else [place]
        for path in files:
            match = _NAME.fullmatch(path.name)
            if match and not (place.is_dir() and _ID not in columns(path)):
                found.setdefault((match[1], match[2]), _read(path, match[1], match[2]))
            elif match is None and not place.is_dir():
                raise LongseqError(
                    f"{path}: no results by assay of ProteinGym; a file of them is called as "
                    "DMS_substitutions_Spearman_DMS_level.csv."
                )
    return list(found.values())


def _read(path: Path, kind: str, measure: str) -> Official:
    if _ID not in columns(path):
        raise LongseqError(
            f"{path}: no results of ProteinGym without training: it has no column {_ID!r}, as those of "
            "benchmarks/DMS_zero_shot have."
        )
    names = [name for name in columns(path) if name not in _NO_MODELS]
    assays: dict[str, Assay] = {}
    models: dict[str, dict[str, float]] = {name: {} for name in names}
    for place, row in rows(path):
        id_ = row[_ID]
        protein, selection, taxon, depth = (row.get(name, "") for name in _FACTS)
        assays[id_] = Assay(id_, protein, selection, taxon, depth)
        for name in names:
            models[name][id_] = number(row, name, place) if row[name] else math.nan
    return Official(path, kind, measure, assays, models)
