"""ProteinGym's averages: assays of one protein count once. No torch here.

Within each selection type the mean over proteins of the mean over a protein's assays; then the mean over the selection
types (proteingym/performance_DMS_benchmarks.py, Notin et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from longseq.evaluation.field.measures import DEPTHS

LONGEST_WINDOW = 1022  # residues that ESM-2 and most others see of a protein at once
_UP_TO, _LONGER = f"up to {LONGEST_WINDOW:,} residues", f"longer than {LONGEST_WINDOW:,}"


@dataclass(frozen=True)
class Assay:
    """What ProteinGym's reference file says of one assay, as far as averages need it; empty: not known."""

    id: str
    protein: str  # UniProt_ID
    selection: str  # coarse_selection_type
    taxon: str = ""
    msa_depth: str = ""  # MSA_Neff_L_category
    length: int = 0  # residues of the target


@dataclass(frozen=True)
class Averages:
    """One measure over assays. A group that no assay is in is left out."""

    average: float
    assays: int
    proteins: int
    groups: dict[str, dict[str, float]] = field(default_factory=dict)  # selection type, taxon, ...: group: value

    def as_dict(self) -> dict[str, object]:
        return {"average": self.average, "assays": self.assays, "proteins": self.proteins, **self.groups}


def averages(
    assays: Sequence[Assay], values: Mapping[str, float], by_depth: Mapping[str, Mapping[str, float]] | None = None
) -> Averages:
    """One measure of one model, aggregated as ProteinGym does.

    Args:
        assays: which are looked at; those without a value are left out.
        values: the measure by the assay's id; NaN counts as missing.
        by_depth: by the assay's id, the measure of its mutants with so many changes.

    Returns:
        The official average; by selection type, taxon and MSA depth (means over proteins); by mutation depth (mean over
        proteins and selection types); and by length of the protein: plain means over assays, as the group of long ones
        is small.
    """
    there = [assay for assay in assays if not math.isnan(values.get(assay.id, math.nan))]
    by_selection = _by(there, values, lambda assay: assay.selection)
    groups = {
        "selection type": by_selection,
        "taxon": _by(there, values, lambda assay: assay.taxon),
        "MSA depth": _by(there, values, lambda assay: assay.msa_depth),
    }
    if by_depth is not None:
        groups["mutations"] = {
            depth: mean(_of_proteins(there, {id_: found[depth] for id_, found in by_depth.items() if depth in found}))
            for depth in DEPTHS
        }
    groups["length"] = {
        name: mean(values[assay.id] for assay in there if (assay.length > LONGEST_WINDOW) == longer)
        for name, longer in ((_UP_TO, False), (_LONGER, True))
    }
    kept = {
        name: {key: value for key, value in group.items() if key and not math.isnan(value)}
        for name, group in groups.items()
    }
    proteins = len({assay.protein for assay in there})
    return Averages(
        mean(by_selection.values()), len(there), proteins, {name: group for name, group in kept.items() if group}
    )


def mean(values: Iterable[float]) -> float:
    """Without those that are NaN; NaN of none."""
    there = [value for value in values if not math.isnan(value)]
    return math.fsum(there) / len(there) if there else math.nan


def _by(assays: Sequence[Assay], values: Mapping[str, float], group: Callable[[Assay], str]) -> dict[str, float]:
    """The mean over proteins in each group, groups sorted by name."""
    names = sorted({group(assay) for assay in assays})
    return {
        name: mean(_means([a for a in assays if group(a) == name], values, lambda assay: assay.protein))
        for name in names
    }


def _of_proteins(assays: Sequence[Assay], values: Mapping[str, float]) -> list[float]:
    """A value for each protein and selection type."""
    return _means(assays, values, lambda assay: (assay.protein, assay.selection))


def _means(assays: Sequence[Assay], values: Mapping[str, float], key: Callable[[Assay], object]) -> list[float]:
    alike: dict[object, list[float]] = {}
    for assay in assays:
        alike.setdefault(key(assay), []).append(values.get(assay.id, math.nan))
    return [mean(group) for group in alike.values()]
