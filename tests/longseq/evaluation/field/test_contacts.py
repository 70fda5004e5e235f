"""Contacts and secondary structure: the parts against formulas, and the verbs on a file of a few chains."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import longseq as api
from longseq.attention import projection_matrix
from longseq.attention.reference import quadratic_attention
from longseq.errors import LongseqError
from longseq.evaluation.field import jacobian, precision, regression
from longseq.evaluation.field.attention import attention_maps, pair_features
from longseq.evaluation.field.chains import folds, read_chains
from longseq.evaluation.records import record_of
from longseq.models.performer import PerformerLM
from longseq.trained_model import find
from longseq_data.vocabulary import BOS, EOS, LETTERS

WILD = "MKVLAACDEFGHIKLMNPQ"


@pytest.fixture
def chains(folder):
    """Six chains whose residues touch where the letters are alike, and that are helical where they are hydrophobic."""
    rng = np.random.default_rng(2)
    lines = []
    for number in range(6):
        sequence = "".join(rng.choice(list(LETTERS[:20]), 30 + 3 * number))
        pairs = [
            (i, j) for i in range(len(sequence)) for j in range(i + 6, len(sequence)) if sequence[i] == sequence[j]
        ]
        states = "".join("H" if letter in "AILMFVW" else "E" if letter in "GPST" else "-" for letter in sequence)
        lines.append(
            json.dumps({"id": f"c{number}", "sequence": sequence, "contacts": pairs, "secondary_structure": states})
        )
    (folder / "chains.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chains.jsonl"


def test_precision_is_the_share_of_the_surest_pairs_that_touch():
    """Twelve residues: 21 pairs, of which six are 6 apart, and none 12 or more."""
    contacts = np.zeros((12, 12), dtype=bool)
    contacts[[0, 1, 2], [6, 8, 11]] = True
    scores = np.zeros((12, 12))
    for place, (i, j) in enumerate([(0, 6), (0, 7), (1, 8), (0, 8), (0, 9), (3, 9), (2, 11)]):
        scores[i, j] = scores[j, i] = 9 - place
    scores[0, 1] = scores[5, 3] = 100  # too near to count
    found = precision.precisions(scores, contacts)
    assert found["short"] == {"L": pytest.approx(3 / 12), "L/2": pytest.approx(2 / 6), "L/5": pytest.approx(1 / 2)}
    assert found["all"] == found["short"]
    assert all(math.isnan(value) for name in ("medium", "long") for value in found[name].values())
    assert precision.chance(contacts)["short"]["L/5"] == pytest.approx(3 / 21)
    both = precision.mean_precision([found, precision.precisions(np.zeros((30, 30)), np.ones((30, 30), dtype=bool))])
    assert both["short"]["L/2"] == pytest.approx((2 / 6 + 1) / 2)
    assert both["long"] == {"L": 1, "L/2": 1, "L/5": 1}


def test_apc_takes_away_what_rows_and_columns_have_anyway():
    rng = np.random.default_rng(0)
    popular = rng.random(7)
    assert np.abs(precision.apc(np.outer(popular, popular))).max() < 1e-15
    scores = rng.random((7, 7))
    scores += scores.T
    expected = scores - scores.sum(0)[None] * scores.sum(1)[:, None] / scores.sum()
    assert np.allclose(precision.apc(np.stack([scores, 0 * scores])), [expected, 0 * scores])


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("kind", ["exact", "favor"])
def test_attention_maps_are_the_weights_of_every_head(trained, objective, kind):
    """Softmax, or that of features, by the quadratic formula; a query is where its residue is predicted."""
    run = trained("one", f"model.objective={objective}", f"attention.kind={kind}", "attention.kernel=relu")
    source = find(run)
    model, causal = source.load(), objective == "causal"
    maps = attention_maps(model, record_of(source, "w", WILD, "w"), causal)
    assert maps.shape == (4, 19, 19)
    attention = model.blocks[0].attention
    tokens = torch.tensor([[BOS, *(LETTERS.index(letter) for letter in WILD), EOS]])
    with torch.no_grad():
        x = model.blocks[0].attention_norm(model.embedding(tokens))
        q, k, _ = attention.project(x, model._rotary(torch.arange(21)))
        eye = torch.eye(21).expand(1, 2, 21, 21)
        if kind == "exact":
            own = quadratic_attention(q, k, eye, None, window=100, kernel="relu_direct", causal=causal)
        else:
            omega = projection_matrix(32, q.shape[-1], seed=attention.seed, layer=0, draw=attention.draw)
            own = quadratic_attention(q, k, eye, omega, kernel="relu", causal=causal)
    expected = own[0, :, :-2, 1:-1] if causal else own[0, :, 1:-1, 1:-1]
    np.testing.assert_allclose(maps[:2], expected.numpy(), atol=2e-5)
    assert maps[:2].max() > 0.1
    pairs = pair_features(maps)
    np.testing.assert_allclose(pairs[3], precision.apc(maps[3] + maps[3].T), atol=1e-6)


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_the_jacobian_is_the_change_of_each_logit_with_each_substitution(trained, objective):
    source = find(trained("one", f"model.objective={objective}"))
    model, causal = source.load(), objective == "causal"
    found = jacobian.categorical_jacobian(model, record_of(source, "w", WILD, "w"), causal)
    assert found.shape == (19, 20, 19, 20)

    def logits(sequence):
        tokens = torch.tensor([[BOS, *(LETTERS.index(letter) for letter in sequence), EOS]])
        with torch.no_grad():
            return model(tokens)[0, : 19 if causal else None][slice(0, 19) if causal else slice(1, 20), :20].numpy()

    for i, a in ((0, 3), (7, 0), (18, 19)):
        expected = logits(WILD[:i] + LETTERS[a] + WILD[i + 1 :]) - logits(WILD)
        np.testing.assert_allclose(found[i, a], expected, atol=2e-4)
        if causal:
            assert not found[i, :, : i + 1].any()


def test_couplings_are_norms_of_the_centred_and_symmetric_jacobian():
    """As Zhang et al. write it, with the whole array at once."""
    rng = np.random.default_rng(1)
    j = rng.normal(size=(9, 20, 9, 20)).astype(np.float32)
    whole = j.astype(np.float64)
    for axis in range(4):
        whole -= whole.mean(axis, keepdims=True)
    whole = (whole + whole.transpose(2, 3, 0, 1)) / 2
    norms = np.sqrt((whole**2).sum((1, 3)))
    np.fill_diagonal(norms, 0)
    expected = norms - norms.sum(0) * norms.sum(1)[:, None] / norms.sum()
    np.testing.assert_allclose(jacobian.coupling_scores(j), expected, atol=1e-5)


def test_a_model_of_a_planted_family_shows_its_contacts(trained, monkeypatch):
    """A stand-in whose logits are the Potts model's: its Jacobian finds the contacts, as the parameters do."""
    from longseq_data.randomness import generator
    from longseq_data.synth.potts import PottsSpec, family

    spec = PottsSpec(families=1, records=1, length=32)
    planted = family(spec, 0)
    source = find(trained("one", "model.objective=masked"))
    model = source.load()
    couplings = torch.from_numpy(planted.couplings).float()

    def hidden(self, tokens, *_):
        one_hot = torch.nn.functional.one_hot(tokens[:, 1:-1].long(), 29)[..., :20].float()
        field = torch.einsum("nia,ijab->njb", one_hot, couplings)
        return torch.nn.functional.pad(field, (0, 9, 1, 1))

    monkeypatch.setattr(PerformerLM, "hidden", hidden)
    model.head = torch.nn.Identity()
    letters = "".join(LETTERS[a] for a in planted.draw(1, generator(0, "test"), sweeps=5)[0])
    scores = jacobian.coupling_scores(jacobian.categorical_jacobian(model, record_of(source, "w", letters, "w"), False))
    contacts = np.zeros((32, 32), dtype=bool)
    contacts[planted.contacts[:, 0], planted.contacts[:, 1]] = True
    assert planted.precision() >= 0.9
    assert precision.precisions(scores, contacts)["all"]["L"] >= 0.9


def test_the_sparse_regression_is_at_its_optimum():
    """The gradient of C Σ log-loss is below 1 for weights of 0, and ∓1 for others; of the intercept it is 0."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 12))
    labels = rng.random(400) < 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1] - 1)))
    weights, intercept = regression.sparse_logistic(x, labels, 0.15)
    residual = 1 / (1 + np.exp(-(x @ weights + intercept))) - labels
    gradient = 0.15 * x.T @ residual
    assert 2 <= (weights != 0).sum() < 12
    np.testing.assert_allclose(gradient[weights != 0], -np.sign(weights[weights != 0]), atol=1e-3)
    assert (np.abs(gradient[weights == 0]) <= 1 + 1e-3).all()
    assert abs(residual.sum()) < 0.05
    assert weights[0] > 0 > weights[1]


def test_the_softmax_regression_is_at_its_optimum():
    rng = np.random.default_rng(5)
    x, labels = rng.normal(size=(200, 6)), rng.integers(0, 3, 200)
    weights = regression.softmax_regression(x, labels, 3).requires_grad_()
    logits = torch.from_numpy(x) @ weights[:-1] + weights[-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    (loss + weights[:-1].square().sum() / 2).backward()
    assert float(weights.grad.abs().max()) < 1e-3
    scaled = regression.Scaled.of(np.array([[1.0, 5], [3, 5]]))
    assert scaled(np.array([[3.0, 9]])).tolist() == [[1, 0]]


@pytest.mark.parametrize(("number", "train"), [(25, 20), (6, 2), (41, 20), (3, 2)])
def test_every_chain_is_tested_by_what_others_teach(number, train):
    found = folds(number, train, seed=1)
    assert sorted(index for _, tested in found for index in tested) == list(range(number))
    for learned, tested in found:
        assert len(set(learned)) == train
        assert not set(learned) & set(tested)
    assert found != folds(number, train, seed=2)


def test_contacts_of_a_model_that_sees_equal_letters_are_found(trained, chains, longseq):
    """In the file, residues touch where letters are alike: a head that attends to its own letter knows them all."""
    run = trained("one", "model.objective=masked", "attention.kind=exact")
    found = api.benchmark_contacts(chains, run, methods=["attention"], train=3)
    assert found.chains == 6
    assert found.chance["all"]["L"] == pytest.approx(0.05, abs=0.03)
    printed = json.loads(
        longseq("benchmark", "contacts", chains, run, "--method", "attention", "--train", 3, "--json"),
        parse_constant=pytest.fail,
    )
    assert printed == found.as_dict()
    (model,) = found.models
    assert set(model.chains["attention"]) == {f"c{number}" for number in range(6)}
    for name, by_share in model.precision["attention"].items():
        values = [each[name]["L/5"] for each in model.chains["attention"].values()]
        values = [value for value in values if not math.isnan(value)]
        assert by_share["L/5"] == pytest.approx(np.mean(values))


def test_masked_and_causal_models_have_tables_of_their_own(trained, chains, longseq):
    one, two = trained("one"), trained("two", "model.objective=masked")
    shown = longseq("benchmark", "contacts", chains, one, two, "--train", 3)
    lines = [line.split()[:2] for line in shown.splitlines() if line]
    assert lines[1:] == [
        *(["masked", "models"], ["model", "method"], ["two", "attention"], ["two", "jacobian"]),
        *(["causal", "models"], ["model", "method"], ["one", "attention"], ["one", "jacobian"]),
        lines[-1],
    ]
    assert lines[-1][0] == "chance"
    shown = longseq("benchmark", "structure", chains, one, two, "--train", 3)
    assert [line.split()[0] for line in shown.splitlines() if line][1:] == [
        *("masked", "model", "two", "causal", "model", "one", "letters", "commonest"),
    ]


def test_a_probe_tells_states_that_follow_from_the_letters(trained, chains):
    """Here they do, so letters say nearly all, and so do the embeddings of layer 0."""
    found = api.benchmark_structure(chains, trained(), layer=0, train=5)
    counts = np.zeros(3)
    for chain in read_chains(chains, "secondary_structure"):
        counts += [chain.states.count(state) for state in "HE-"]
    assert found.residues == counts.sum()
    assert found.most_frequent == pytest.approx(counts.max() / counts.sum())
    assert found.letters.accuracy > 0.95
    assert found.models[0].probe.accuracy > 0.95
    share = counts / counts.sum()
    for probe in (found.letters, found.models[0].probe):
        recall = np.array(list(probe.recall.values()))
        assert probe.accuracy == pytest.approx(float(share @ recall))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[1, 2]", "line 7: no JSON object with id, sequence and contacts"),
        ('{"id": "x", "sequence": "MKV"}', "line 7: no JSON object with id, sequence and contacts"),
        ('{"id": "x", "sequence": "MKV", "contacts": [[0, 3]]}', "[0, 3] is no pair of residues from 0 to 2"),
        ('{"id": "x", "sequence": "MKV", "contacts": [[1, 1]]}', "line 7: the contact [1, 1] is no pair"),
        ('{"id": "x", "sequence": "MKV", "contacts": [], "secondary_structure": "HH"}', "for each of its 3 residues"),
        ('{"id": "x", "sequence": "MKV", "contacts": null}', "line 7: no JSON object with id, sequence and contacts"),
        ('{"id": "x", "sequence": "", "contacts": []}', "line 7: no JSON object with id, sequence and contacts"),
        ('{"id": "x", "sequence": "MKV", "contacts": [], "secondary_structure": 3}', "for each of its 3 residues"),
        ('{"id": "\u2028", "sequence": "MKV", "contacts": [[0, 3]]}', "line 7: the contact [0, 3] is no pair"),
        ('{"id": "c2", "sequence": "MKV", "contacts": []}', "two chains are called c2"),
        ('{"id": "x", "sequence": "MJV", "contacts": []}', "chain x: 'J' at position 2 is not one of"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_chain_is_refused_by_its_number(trained, chains, refused, line, sentence):
    chains.write_text(chains.read_text() + line + "\n")
    assert sentence in refused("benchmark", "contacts", chains, trained(), "--train", "3")


def test_what_cannot_be_measured_is_refused(trained, chains, refused, folder):
    run = trained()
    assert "6 chains, and 20 to learn from (--train)" in refused("benchmark", "contacts", chains, run)
    assert "6 chains, and 6 to learn from" in refused("benchmark", "structure", chains, run, "--train", "6")
    assert "layer=3: one has 2 blocks; take 0 to 2" in refused("benchmark", "structure", chains, run, "--layer", "3")
    assert "nothing.jsonl" in refused("benchmark", "structure", "nothing.jsonl", run)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "short.jsonl").write_text("".join(f'{{"id": "{i}", "sequence": "MKVL", "contacts": []}}\n' for i in "ab"))
    said = refused("benchmark", "contacts", "short.jsonl", run, "--train", "1")
    assert "nothing can be learned where no two residues are 6 apart" in said
    assert "no chain in it" in refused("benchmark", "contacts", "empty.jsonl", run)
    with pytest.raises(LongseqError, match="methods=guess: take attention or jacobian"):
        api.benchmark_contacts(chains, run, methods=["guess"])
