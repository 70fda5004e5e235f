"""Families with planted contacts: the sampler against the exact distribution, and the contacts found again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longseq_data.errors import DataError
from longseq_data.randomness import generator
from longseq_data.synth import potts
from longseq_data.synth.potts import Potts, PottsSpec, family

A = 20


def small(length: int) -> Potts:
    rng = np.random.default_rng(1)
    upper = 0.8 * rng.normal(size=(length, length, A, A))
    upper[np.tril_indices(length)] = 0
    return Potts(rng.normal(size=(length, A)), upper + upper.transpose(1, 0, 3, 2), np.array([[0, 1]]))


def test_samples_have_the_probabilities_of_the_model():
    """Three residues: all 8,000 sequences, whose pairs' frequencies are known exactly."""
    model = small(3)
    h, j = model.fields, model.couplings
    energy = h[0][:, None, None] + h[1][None, :, None] + h[2][None, None, :]
    energy = energy + j[0, 1][:, :, None] + j[0, 2][:, None, :] + j[1, 2][None, :, :]
    exact = np.exp(energy - energy.max())
    exact /= exact.sum()
    number = 20_000
    drawn = model.draw(number, generator(5, "test"), sweeps=20)
    for (a, b), others in (((0, 1), 2), ((0, 2), 1), ((1, 2), 0)):
        expected = exact.sum(others)
        counts = np.zeros((A, A))
        np.add.at(counts, (drawn[:, a], drawn[:, b]), 1)
        chi = ((counts - number * expected) ** 2 / (number * expected)).sum()
        assert abs(chi - 399) < 5 * np.sqrt(2 * 399)  # χ² of 400 cells: mean 399, variance 798
        independent = np.outer(expected.sum(1), expected.sum(0))
        assert ((counts - number * independent) ** 2 / (number * independent)).sum() > 1000  # it could fail


def test_planted_pairs_are_apart_and_no_residue_has_more_than_three():
    model = family(PottsSpec(1, 1, length=32), 0)
    assert len(model.contacts) == 32
    assert (model.contacts[:, 1] - model.contacts[:, 0]).min() >= 6
    assert np.bincount(model.contacts.ravel()).max() <= 3
    assert np.array_equal(model.couplings, model.couplings.transpose(1, 0, 3, 2))
    assert not model.couplings[np.arange(32), np.arange(32)].any()


def test_the_true_parameters_find_contacts_the_better_the_stronger_they_are():
    def reached(coupling):
        return np.mean([potts.precision(PottsSpec(1, 1, 32, coupling, seed)) for seed in range(5)])

    assert reached(0.0) < 0.3
    assert 0.55 < reached(0.25) < 0.8
    assert 0.9 <= reached(0.5) < 1
    assert reached(1.0) > 0.97


def test_contacts_are_found_again_in_the_sequences_alone():
    """By the mean-field approximation (Morcos et al. 2011), which never sees the parameters; L = 24, coupling 0.5."""
    spec = PottsSpec(families=1, records=3000, length=24)
    model = family(spec, 0)
    drawn = model.draw(3000, generator(0, "test"), sweeps=20)
    assert model.precision() >= 0.9
    assert found_by_mean_field(drawn, model.contacts) >= 0.8
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in drawn.T], 1)  # each column by itself
    assert found_by_mean_field(shuffled, model.contacts) < 0.4


def found_by_mean_field(drawn, contacts):
    number, length = drawn.shape
    one_hot = np.eye(A)[drawn].reshape(number, -1)
    single = 0.7 * one_hot.mean(0) + 0.3 / A
    pairs = 0.7 * (one_hot.T @ one_hot) / number + 0.3 / A**2
    for i in range(length):
        own = slice(i * A, (i + 1) * A)
        pairs[own, own] = np.diag(single[own])
    covariance = (pairs - np.outer(single, single)).reshape(length, A, length, A)[:, : A - 1, :, : A - 1]
    size = length * (A - 1)
    couplings = np.zeros((length, A, length, A))
    couplings[:, : A - 1, :, : A - 1] = -np.linalg.inv(covariance.reshape(size, size)).reshape(
        length, A - 1, length, A - 1
    )
    couplings = couplings - couplings.mean(1, keepdims=True)
    couplings = couplings - couplings.mean(3, keepdims=True)
    norms = np.sqrt((couplings**2).sum((1, 3)))
    np.fill_diagonal(norms, 0)
    norms -= np.outer(norms.sum(0), norms.sum(1)) / norms.sum()
    first, second = np.triu_indices(length, 6)
    best = np.argsort(-norms[first, second])[: len(contacts)]
    planted = set(map(tuple, contacts.tolist()))
    return np.mean([pair in planted for pair in zip(first[best].tolist(), second[best].tolist(), strict=True)])


def test_a_corpus_is_a_function_of_its_spec(tmp_path):
    spec = PottsSpec(families=3, records=10, length=20, seed=4)
    for name in ("a.fasta", "b.fasta"):
        assert potts.write(spec, tmp_path / name) == (10, 200, tmp_path / f"{name[0]}.contacts.jsonl")
    text = (tmp_path / "a.fasta").read_text()
    assert text == (tmp_path / "b.fasta").read_text()
    heads = text.splitlines()[::2]
    assert sum("family 0 " in head for head in heads) == 4
    assert len(set(heads)) == 10
    assert text != "".join(
        f">{head}\n{sequence}\n" for head, sequence in potts.synthesize(PottsSpec(3, 10, 20, seed=5))
    )


def test_the_truth_is_of_sequences_that_are_no_records(tmp_path):
    spec = PottsSpec(families=2, records=6, length=20)
    _, _, truth = potts.write(spec, tmp_path / "a.fasta.gz")
    rows = [json.loads(line) for line in truth.read_text().splitlines()]
    assert len(rows) == 26  # 13 of each family: 25 at least
    assert len({row["id"] for row in rows}) == 26
    assert rows[0]["contacts"] == family(spec, 0).contacts.tolist()
    assert rows[13]["contacts"] == family(spec, 1).contacts.tolist()
    assert not {row["sequence"] for row in rows} & {sequence for _, sequence in potts.synthesize(spec)}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"families": 0}, "families is 0"),
        ({"records": 1, "families": 2}, "records is 1 for 2 families"),
        ({"length": 13}, "length is 13"),
        ({"length": 201}, "length is 201"),
        ({"coupling": float("nan")}, "coupling is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_number_that_makes_no_family_is_refused(changed, sentence):
    with pytest.raises(DataError, match=sentence):
        PottsSpec(**{"families": 1, "records": 9, **changed})


def test_neither_file_is_replaced_unasked(tmp_path):
    spec = PottsSpec(1, 2, 14)
    potts.write(spec, tmp_path / "a.fasta")
    for name in ("a.fasta", "a.contacts.jsonl"):
        (tmp_path / name).unlink()
        other = ({"a.fasta", "a.contacts.jsonl"} - {name}).pop()
        with pytest.raises(DataError, match=f"{other} exists already"):
            potts.write(spec, tmp_path / "a.fasta")
        assert not (tmp_path / name).exists()
        potts.write(spec, tmp_path / "a.fasta", overwrite=True)
