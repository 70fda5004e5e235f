"""A protein corpus without a network: families evolved from random ancestors, written as UniRef-style FASTA.

Each family descends from one random ancestor along a random tree. Every site has its own rate, so a family has
conserved columns and variable ones; residues are exchanged as BLOSUM62 says, and indels change the lengths.
Members of one family fall on both sides of a split by identifier, so a model that learns the families beats the
empirical baseline on held-out records. Another seed gives other families and other identifiers: an
out-of-distribution file, on which nothing but the composition carries over.

The corpus is a pure function of its ``SyntheticSpec``. Only uniform draws are taken from the generators, and
every distribution is derived from them here, so the text does not depend on how a NumPy release draws the others.
(A gzipped file also depends on the zlib that wrote it; what it unpacks to does not.)
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from longseq_data.errors import DataError
from longseq_data.files import aside
from longseq_data.os_errors import explained
from longseq_data.randomness import generator

from .substitution import AMINO_ACIDS, Floats, Residues, draw_background, substitute

METHIONINE = AMINO_ACIDS.index("M")
LINE = 60  # letters a line, as UniProt writes FASTA

LENGTH_SPREAD = 0.7  # sigma of the log-normal: mean 330, median 265 (Swiss-Prot's archaea: 315, 271)
SIZE_SKEW = 0.7  # the k-th largest family has about k^-0.7 of the largest one's members
INDELS = 0.03  # insertions, and as many deletions, a substitution: about one indel in 17 events
INDEL_MEAN = 3.0  # residues, geometric
GROUP = 20_000  # records shuffled together: twice the buffer of the streaming reader

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SyntheticSpec:
    """What to synthesise; equal specs give equal corpora.

    families: number of unrelated families, at least 1.
    records: members of all families together, at least one a family.
    seed: not negative; no family or identifier is shared between two seeds.
    mean_length: mean residues of an ancestor, log-normal above ``min_length`` and cut at ``max_length``.
    min_length, max_length: bounds, inclusive, that every record keeps.
    divergence: expected substitutions a site from the ancestor to each member. At 0 the members are copies; at
        0.35 two members agree in about 70 % of the sites, at 1.0 in 52 %; BLOSUM62 describes pairs 1.38 apart.

    Raises DataError, naming the field, when a value is out of range.
    """

    families: int
    records: int
    seed: int = 0
    mean_length: int = 330
    min_length: int = 30
    max_length: int = 2000
    divergence: float = 0.35

    def __post_init__(self) -> None:
        if self.families < 1:
            raise DataError(f"families is {self.families}: ask for at least 1.")
        if self.records < self.families:
            raise DataError(
                f"records is {self.records} for {self.families} families: each family has at least one member, "
                f"so ask for at least {self.families} records or for fewer families."
            )
        if self.seed < 0:
            raise DataError(f"seed is {self.seed}: give 0 or a positive integer.")
        if self.min_length < 1:
            raise DataError(f"min_length is {self.min_length}: give at least 1.")
        if not self.min_length <= self.mean_length <= self.max_length:
            raise DataError(
                f"mean_length is {self.mean_length}: it must lie between min_length ({self.min_length}) "
                f"and max_length ({self.max_length})."
            )
        if not 0 <= self.divergence <= 10:  # NaN is refused too
            raise DataError(
                f"divergence is {self.divergence}: give substitutions a site between 0 (copies) and 10; "
                "0.1 to 1 resembles protein families."
            )


@dataclass(frozen=True)
class SyntheticReport:
    """What ``write_fasta`` wrote."""

    families: int
    records: int
    residues: int


# ---------------------------------------------------------------------------------------------------------------
# Families
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequences:
    """Sequences end to end: N of them with R residues in all."""

    residues: Residues  # (R,)
    rates: Floats  # (R,) of the sites, relative to the mean; 0 at the first site of each sequence, its methionine
    lengths: Integers  # (N,)

    def take(self, chosen: Integers) -> _Sequences:
        """The sequences with these indices, in this order, repeats allowed."""
        lengths = self.lengths[chosen]
        shift = (np.cumsum(self.lengths) - self.lengths)[chosen] - (np.cumsum(lengths) - lengths)
        source = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return _Sequences(self.residues[source], self.rates[source], lengths)

    def strings(self) -> list[str]:
        text = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)[self.residues].tobytes().decode()
        ends = np.cumsum(self.lengths).tolist()
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def family_members(spec: SyntheticSpec, family: int, members: int) -> list[str]:
    """The sequences of one family: a function of the arguments only.

    The tree has its ``members`` leaves at equal distance ``spec.divergence`` from the root. Of m leaves, the first
    child of a split takes 1 to m-1, all equally likely (Yule's topology), and the m-1 splits below a branch point
    at height h are uniform on [0, h], so the highest of them, the next split, is at h u^{1/(m-1)}. One pass of
    the loop is one generation of the tree: evolve all its branches at once, set leaves aside, split the others.
    """
    rng = generator(spec.seed, "synthetic family", family)
    nodes = _ancestor(spec, rng)
    leaves = np.array([members])
    parent_heights = np.array([spec.divergence])
    done: list[str] = []
    while len(leaves):
        heights = np.where(leaves > 1, parent_heights * rng.random(len(leaves)) ** (1 / np.maximum(leaves - 1, 1)), 0)
        nodes = _evolve(nodes, parent_heights - heights, spec, rng)
        done += nodes.take(np.flatnonzero(leaves == 1)).strings()
        split = np.flatnonzero(leaves > 1)
        first = 1 + (rng.random(len(split)) * (leaves[split] - 1)).astype(np.int64)
        nodes = nodes.take(np.repeat(split, 2))
        leaves = np.stack([first, leaves[split] - first], axis=1).ravel()
        parent_heights = np.repeat(heights[split], 2)
    return done


def _ancestor(spec: SyntheticSpec, rng: np.random.Generator) -> _Sequences:
    normal = NormalDist().inv_cdf(max(rng.random(), 1e-16))
    excess = (spec.mean_length - spec.min_length) * math.exp(LENGTH_SPREAD * normal - LENGTH_SPREAD**2 / 2)
    length = min(round(spec.min_length + excess), spec.max_length)
    residues, rates = _new_sites(length, rng)
    residues[0], rates[0] = METHIONINE, 0
    return _Sequences(residues, rates, np.array([length]))


def _new_sites(count: int, rng: np.random.Generator) -> tuple[Residues, Floats]:
    """Residues from the background, and rates from the gamma distribution with shape ½ and mean 1.

    Shape ½ is usual for proteins (many sites nearly frozen, a few very fast), and is the square of a standard
    normal: Box and Muller's -2 ln u cos²(2πv).
    """
    residues = draw_background(count, rng)
    rates = -2 * np.log1p(-rng.random(count)) * np.cos(2 * np.pi * rng.random(count)) ** 2
    return residues, rates


def _evolve(parents: _Sequences, branches: Floats, spec: SyntheticSpec, rng: np.random.Generator) -> _Sequences:
    """Substitutions, then indels, along one branch a sequence. Both strike a site in proportion to its rate."""
    times = np.repeat(branches, parents.lengths) * parents.rates  # (R,)
    residues = substitute(parents.residues, times, rng)
    draws = rng.random(len(times))
    chance = -np.expm1(-2 * INDELS * times)  # of an insertion after the site, or of a deletion from it onwards
    events = np.flatnonzero(draws < chance)
    if not len(events):
        return _Sequences(residues, parents.rates, parents.lengths)

    sizes = 1 + np.floor(np.log1p(-rng.random(len(events))) / math.log1p(-1 / INDEL_MEAN)).astype(np.int64)
    owner = np.repeat(np.arange(len(parents.lengths)), parents.lengths)  # (R,) which sequence a site is in
    ends = np.cumsum(parents.lengths)
    deletes = draws[events] < chance[events] / 2

    start = events[deletes]
    stop = np.minimum(start + sizes[deletes], ends[owner[start]])
    edges = np.bincount(start, minlength=len(times) + 1) - np.bincount(stop, minlength=len(times) + 1)
    kept = np.cumsum(edges)[:-1] == 0  # (R,)
    too_short = np.bincount(owner[kept], minlength=len(ends)) < spec.min_length
    kept |= too_short[owner]

    inserted = np.zeros(len(times), dtype=np.int64)  # (R,) new sites after each site
    inserted[events[~deletes]] = sizes[~deletes]
    too_long = parents.lengths + np.bincount(owner, weights=inserted, minlength=len(ends)) > spec.max_length
    inserted[too_long[owner]] = 0

    copies = kept + inserted
    old = (np.cumsum(copies) - copies)[kept]  # where the surviving sites go
    new = np.ones(copies.sum(), dtype=bool)
    new[old] = False
    grown, rates = np.empty(len(new), dtype=np.uint8), np.empty(len(new))
    grown[old], rates[old] = residues[kept], parents.rates[kept]
    grown[new], rates[new] = _new_sites(int(new.sum()), rng)
    return _Sequences(grown, rates, np.bincount(np.repeat(owner, copies), minlength=len(ends)))


# ---------------------------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------------------------


def family_sizes(spec: SyntheticSpec) -> Integers:
    """Members of each family, (families,): one each, and the rest by a power law whose ranks are dealt at random."""
    shares = np.cumsum(np.arange(1, spec.families + 1) ** -SIZE_SKEW)
    sizes = 1 + np.diff(np.rint(shares / shares[-1] * (spec.records - spec.families)), prepend=0).astype(np.int64)
    ranks = generator(spec.seed, "synthetic sizes").random(spec.families).argsort(kind="stable")
    return sizes[ranks]


def synthesize(spec: SyntheticSpec) -> Iterator[tuple[str, str]]:
    """Yield (header without '>', sequence) of every record.

    Headers are UniRef's. The identifier spells seed, family and member (``UniRef50_A0AS0F12M3``), so it is unique
    across families and seeds; n= is the size of the family in this corpus.

    Consecutive families are generated together until they hold ``GROUP`` records, and leave in shuffled order, so
    the head of a file is a fair sample and memory holds one group (or one family, where that is larger) and the
    sizes, 8 bytes a family.
    """
    sizes = family_sizes(spec)
    group: list[tuple[str, str]] = []
    for family, members in enumerate(sizes.tolist()):
        for member, sequence in enumerate(family_members(spec, family, members)):
            accession = f"A0AS{spec.seed}F{family}M{member}"
            header = (
                f"UniRef50_{accession} Synthetic family {family} member {member} n={members} "
                f"Tax=synthetic construct TaxID=32630 RepID={accession}_SYNTH"
            )
            group.append((header, sequence))
        if len(group) >= GROUP or family == spec.families - 1:
            order = generator(spec.seed, "synthetic order", family).random(len(group)).argsort(kind="stable")
            for index in order.tolist():
                yield group[index]
            group = []


def write_fasta(
    spec: SyntheticSpec, path: Path, *, overwrite: bool = False, progress: Callable[[int], None] | None = None
) -> SyntheticReport:
    """Write the corpus as FASTA, and say how much there is. See :func:`write_records`."""
    records, residues = write_records(synthesize(spec), path, overwrite=overwrite, progress=progress)
    return SyntheticReport(spec.families, records, residues)


def write_records(
    records: Iterable[tuple[str, str]],
    path: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Write (header without '>', sequence) as FASTA, gzipped when the name ends in ``.gz``.

    Returns the numbers of records and residues.

    The text goes to a file next to ``path``, which takes its name once it is whole and on disk: an interrupt or a
    full disk leaves nothing behind. Parent folders are created. ``progress`` is called with the number of records
    written so far, from time to time and at the end.

    Raises DataError if ``path`` exists and ``overwrite`` is not set, if it is no regular file (never replaced), or if
    the system refuses to write.
    """
    path = Path(path)
    try:
        refuse_taken(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as partial, partial.open("wb") as raw:
            if path.suffix == ".gz":  # no time and no name in its header: the same corpus is the same file
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed:
                    return _write(records, packed, progress)
            return _write(records, raw, progress)
    except OSError as error:
        sentence = explained(error, path, "cannot be written")
        raise DataError(f"{sentence}; nothing half-written was left.") from error


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise DataError where no file can be written: at a folder, a device, and, without ``overwrite``, a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the name of a file, for example {path / 'synthetic.fasta.gz'}.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no regular file (a device or a pipe, perhaps): give the name of a file.")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already: choose another name, or overwrite it (--overwrite).")


def _write(
    records: Iterable[tuple[str, str]], out: BinaryIO | gzip.GzipFile, progress: Callable[[int], None] | None
) -> tuple[int, int]:
    written = residues = 0
    for header, sequence in records:
        lines = [sequence[start : start + LINE] for start in range(0, len(sequence), LINE)]
        out.write("\n".join([f">{header}", *lines, ""]).encode("ascii"))
        written += 1
        residues += len(sequence)
        if progress is not None and written % 256 == 0:
            progress(written)
    if progress is not None:
        progress(written)
    return written, residues
