"""Protein families with contacts that are known: sequences drawn from Potts models with planted couplings.

A family of L residues has the probability P(x) ∝ exp(Σ_i h_i(x_i) + Σ_{i<j} J_ij(x_i, x_j)), as direct coupling
analysis supposes (Morcos et al. 2011, PNAS 108:E1293). L pairs of residues, at least 6 apart and at most 3 for each
residue, are contacts: J_ij = s_ij M, with one matrix M for the whole corpus, as residues attract each other by their
kind, and s_ij uniform on [½, 3/2] · coupling. All pairs have couplings besides that mean nothing, most of them weak,
a few not: these come before the weakest contacts for anybody who knows the parameters, too (:func:`Potts.precision`).

The corpus is a pure function of its ``PottsSpec``; only uniform draws are taken from the generators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longseq_data.errors import DataError
from longseq_data.files import write_text
from longseq_data.os_errors import explained
from longseq_data.randomness import generator

from .substitution import AMINO_ACIDS, Floats, Residues, blosum62_process, draw_background
from .synthetic import refuse_taken, write_records

NEAREST = 6  # residues between which a contact is planted, at least
DEGREE = 3  # contacts of a residue, at most
BACKGROUND = 0.12  # the strength of a pair that is no contact is this times the absolute value of a normal number
FIELDS = 0.5  # deviation of h around the logarithms of the background frequencies
CHAINS = 25  # whose contacts are written, at least: 20 to learn from, and 5
SWEEPS = 50  # of Gibbs sampling, from independent residues
LONGEST = 200
_AT_ONCE = 1024  # sequences
_A = len(AMINO_ACIDS)


@dataclass(frozen=True)
class PottsSpec:
    """What to draw; equal specs give equal corpora.

    families: unrelated families, each with contacts of its own.
    records: members of all families together.
    length: residues of every member, 14 to 200.
    coupling: mean strength of the planted couplings; M has mean 0 and deviation 1.
    seed: not negative.

    Raises DataError, naming the field, when a value is out of range.
    """

    families: int
    records: int
    length: int = 40
    coupling: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.families < 1:
            raise DataError(f"families is {self.families}: ask for at least 1.")
        if self.records < self.families:
            raise DataError(f"records is {self.records} for {self.families} families: ask for at least one for each.")
        if not 14 <= self.length <= LONGEST:
            raise DataError(f"length is {self.length}: with planted contacts give 14 to {LONGEST} residues.")
        if not 0 <= self.coupling <= 10:  # NaN is refused too
            raise DataError(f"coupling is {self.coupling}: give a number from 0 (no contacts) to 10; 0.5 is plain.")
        if self.seed < 0:
            raise DataError(f"seed is {self.seed}: give 0 or a positive integer.")


@dataclass(frozen=True)
class Potts:
    """One family.

    fields: (L, 20) h. couplings: (L, L, 20, 20), J_ij(a, b) = J_ji(b, a), J_ii = 0. contacts: (L, 2), i < j, sorted.
    """

    fields: Floats
    couplings: Floats
    contacts: NDArray[np.int64]

    def draw(self, number: int, rng: np.random.Generator, sweeps: int = SWEEPS) -> Residues:
        """(number, L), by Gibbs sampling: each residue anew given all others, so many times over."""
        length = len(self.fields)
        found = []
        for start in range(0, number, _AT_ONCE):
            size = min(_AT_ONCE, number - start)
            drawn = draw_background(size * length, rng).reshape(size, length)
            rows = np.arange(size)
            one_hot = np.zeros((size, length, _A))
            one_hot[rows[:, None], np.arange(length), drawn] = 1
            for _ in range(sweeps):
                for i in range(length):
                    # (size, L · 20) @ (L · 20, 20)
                    logits = self.fields[i] + one_hot.reshape(size, -1) @ self.couplings[:, i].reshape(-1, _A)
                    shares = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
                    new = (shares < rng.random(size)[:, None] * shares[:, -1:]).sum(1)
                    one_hot[rows, i, drawn[:, i]] = 0
                    one_hot[rows, i, new] = 1
                    drawn[:, i] = new
            found.append(drawn)
        return np.concatenate(found)

    def precision(self) -> float:
        """Of the L pairs with the strongest couplings, the share that are planted: what knowing J reaches.

        Strength as for a model's categorical Jacobian, which is J for the true model: the Frobenius norm of J_ij in the
        zero-sum gauge, less the average product (APC).
        """
        j = self.couplings - self.couplings.mean(2, keepdims=True)
        j = j - j.mean(3, keepdims=True)
        norms = np.sqrt(np.square(j).sum((2, 3)))
        norms -= norms.sum(0) * norms.sum(1)[:, None] / norms.sum()
        first, second = np.triu_indices(len(norms), NEAREST)
        best = np.argsort(-norms[first, second], kind="stable")[: len(self.contacts)]
        planted = np.zeros(norms.shape, dtype=bool)
        planted[self.contacts[:, 0], self.contacts[:, 1]] = True
        return float(planted[first[best], second[best]].mean())


def family(spec: PottsSpec, number: int) -> Potts:
    """The model of one family: a function of the arguments only."""
    rng = generator(spec.seed, "potts family", number)
    length = spec.length
    contacts = _plant(length, rng)
    fields = np.log(blosum62_process().background) + FIELDS * _normal((length, _A), rng)
    noise = BACKGROUND * np.abs(_normal((length, length, 1, 1), rng))
    upper = noise * _normal((length, length, _A, _A), rng)
    strengths = spec.coupling * (0.5 + rng.random(len(contacts)))
    upper[contacts[:, 0], contacts[:, 1]] += strengths[:, None, None] * _matrix(spec.seed)
    upper[np.tril_indices(length)] = 0
    return Potts(fields, upper + upper.transpose(1, 0, 3, 2), contacts)


def synthesize(spec: PottsSpec) -> Iterator[tuple[str, str]]:
    """Yield (header without '>', sequence) of every record, the families mixed; headers are UniRef's."""
    records = []
    for number in range(spec.families):
        members = spec.records // spec.families + (number < spec.records % spec.families)
        for member, sequence in enumerate(_draw(spec, number, members, "members")):
            accession = f"A0AP{spec.seed}F{number}M{member}"
            header = (
                f"UniRef50_{accession} Potts family {number} member {member} n={members} "
                f"Tax=synthetic construct TaxID=32630 RepID={accession}_SYNTH"
            )
            records.append((header, sequence))
    for index in generator(spec.seed, "potts order").random(len(records)).argsort(kind="stable").tolist():
        yield records[index]


def truth(spec: PottsSpec) -> Iterator[str]:
    """A JSON object for each of at least 25 sequences that are no records: id, sequence, contacts counted from 0.

    Each family has as many: what `longseq benchmark contacts` reads.
    """
    for number in range(spec.families):
        contacts = family(spec, number).contacts.tolist()
        for member, sequence in enumerate(_draw(spec, number, -(-CHAINS // spec.families), "chains")):
            yield json.dumps({"id": f"P{spec.seed}F{number}C{member}", "sequence": sequence, "contacts": contacts})


def precision(spec: PottsSpec) -> float:
    """Of each family's strongest pairs by its true parameters, the share that are contacts: the mean over families."""
    return sum(family(spec, number).precision() for number in range(spec.families)) / spec.families


def write(
    spec: PottsSpec, path: Path, *, overwrite: bool = False, progress: Callable[[int], None] | None = None
) -> tuple[int, int, Path]:
    """Write the corpus as FASTA, and its contacts next to it, in NAME.contacts.jsonl.

    Returns records, residues, and where the contacts are. Raises DataError as ``write_records`` does, for either file.
    """
    path = Path(path)
    beside = path.with_name(path.name.split(".")[0] + ".contacts.jsonl")
    refuse_taken(beside, overwrite)
    records, residues = write_records(synthesize(spec), path, overwrite=overwrite, progress=progress)
    try:
        write_text(beside, "".join(f"{line}\n" for line in truth(spec)))
    except OSError as error:
        raise DataError(f"{explained(error, beside, 'cannot be written')}; {path} is whole.") from error
    return records, residues, beside


def _draw(spec: PottsSpec, number: int, count: int, what: str) -> list[str]:
    drawn = family(spec, number).draw(count, generator(spec.seed, f"potts {what}", number))
    letters = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)[drawn]
    return [row.tobytes().decode() for row in letters]


def _plant(length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``length`` pairs in random order, as long as their residues are free."""
    first, second = np.triu_indices(length, NEAREST)
    order = rng.random(len(first)).argsort(kind="stable")
    degree = np.zeros(length, dtype=np.int64)
    chosen: list[tuple[int, int]] = []
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if degree[i] < DEGREE and degree[j] < DEGREE and len(chosen) < length:
            degree[[i, j]] += 1
            chosen.append((i, j))
    return np.array(sorted(chosen), dtype=np.int64)


def _matrix(seed: int) -> Floats:
    """M (20, 20): symmetric, mean 0, deviation 1."""
    square = _normal((_A, _A), generator(seed, "potts matrix"))
    matrix = square + square.T
    matrix -= matrix.mean(0) + matrix.mean(0)[:, None] - matrix.mean()  # zero-sum: it says nothing of single residues
    return matrix / matrix.std()


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Standard normal numbers from uniform ones, by Box and Muller."""
    return np.sqrt(-2 * np.log1p(-rng.random(shape))) * np.cos(2 * np.pi * rng.random(shape))
