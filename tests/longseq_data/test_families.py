"""Whole clusters in one context: which members, in which order, cut where; nothing lost in an evaluation."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from corpora import clustered, tables
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.members import member_index
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.fasta import read_records
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.rank_share import Share
from longseq_data.vocabulary import BOS, EOS, IGNORE, LETTERS, MASK, PAD

SIZES = [1, 2, 3, 25, 1, 7]  # of the clusters that are listed
ALONE = 4
LENGTH = 96


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return clustered(tmp_path_factory.mktemp("families"), SIZES, ALONE, longest=25, seed=2)


def spec_of(place: Path, objective: str = "causal", seed: int = 3, length: int = LENGTH) -> CorpusSpec:
    index = member_index(str(place / "corpus"), "train", str(place / "table.tsv"), place / "cache")
    budget = 3 * length
    return CorpusSpec(
        str(place / "corpus"), "train", length, "family", objective, seed, batch_tokens=budget, members=index
    )


@pytest.fixture(scope="module")
def clusters(place: Path) -> dict[str, Counter[str]]:
    """The sequences of each cluster."""
    found: dict[str, Counter[str]] = {}
    for record in read_records(str(place / "a.fasta")):
        found.setdefault(record.identifier.partition("_")[0], Counter())[record.sequence] += 1
    return found


def cluster_of(clusters: dict[str, Counter[str]], sequence: str) -> str:
    (name,) = (name for name, held in clusters.items() if sequence in held)
    return name


def members(row: np.ndarray) -> list[str]:
    """The members of BOS member EOS member EOS ...; the last one may be cut."""
    assert row[0] == BOS
    text = "".join(LETTERS[token] if token < len(LETTERS) else "|" for token in row[1:].tolist())
    return text.split("|")


def test_a_sample_is_a_whole_family_in_an_order_of_its_own_and_an_epoch_has_each_once(place, clusters):
    spec = spec_of(place)
    count = len(SIZES) + ALONE
    assert spec.epoch_samples == count
    plan = spec.cut.plan(np.arange(3 * count))
    rows, segments = plan.rows()
    assert segments is None
    orders: dict[str, list[list[str]]] = {}
    for row, size, scored in zip(rows, plan.sizes.tolist(), plan.scored.tolist(), strict=True):
        assert (row[size:] == IGNORE).all()
        assert scored == size - 1
        *whole, rest = members(row[:size])
        name = cluster_of(clusters, whole[0])
        cut = sum(len(each) + 1 for each in clusters[name].elements()) + 1 > LENGTH + 1
        if cut:
            assert size == LENGTH + 1
            assert not Counter(whole) - clusters[name]
            assert not rest or any(each.startswith(rest) for each in clusters[name] - Counter(whole))
        else:
            assert rest == ""
            assert Counter(whole) == clusters[name]
        orders.setdefault(name, []).append(whole)
    assert {len(each) for each in orders.values()} == {3}
    assert any(first != second for first, second, _ in orders.values())
    drawn = {each for whole in orders["c3"] for each in whole}  # of the one that does not fit, others in each epoch
    assert len(drawn) > max(len(whole) for whole in orders["c3"])


def test_the_first_members_of_many_epochs_are_each_about_as_often(place, clusters):
    spec = spec_of(place)
    count, epochs = len(SIZES) + ALONE, 350
    plan = spec.cut.plan(np.arange(epochs * count))
    rows, _ = plan.rows()
    firsts = Counter(members(row[: int(size)])[0] for row, size in zip(rows, plan.sizes, strict=True))
    for sequence in clusters["c5"]:
        assert abs(firsts[sequence] - epochs / 7) < 5 * (epochs / 7) ** 0.5


def test_samples_are_the_same_for_any_ranks_and_resumes_and_steps_keep_the_budget(place):
    spec = spec_of(place)

    def steps(world: int, start: int = 0, number: int = 5) -> list[list[list[int]]]:
        runs = [list(islice(spec.training(start, Share(4, 1, rank, world)), number)) for rank in range(world)]
        found = []
        for makes in zip(*runs, strict=True):
            batches = [make() for make in makes]
            assert sum(batch["tokens"].size for batch in batches) <= 3 * LENGTH + LENGTH * (world - 1)
            rows = [row for batch in batches for row in batch["tokens"]]
            found.append(sorted([token for token in row.tolist() if token != PAD] for row in rows))
            found[-1] = [row for row in found[-1] if row]
        return found

    one = steps(1)
    assert steps(2) == one
    consumed = sum(len(step) for step in one[:2])
    assert steps(1, start=consumed, number=3) == one[2:]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_an_evaluation_has_every_token_of_every_member_once(place, clusters, objective):
    text, drawn = "", Counter()
    spec = spec_of(place, objective, length=32)
    for make in spec.evaluation(Share(2, 1, 0, 1)):
        batch = make()
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            real, wanted = tokens != PAD, targets != IGNORE
            if objective == "causal":
                assert wanted.tolist() == real.tolist()
                row = targets[real]
            else:
                row = np.where(wanted, targets, tokens)[real]
                assert wanted.sum() == max(1, round(0.15 * np.count_nonzero(row < len(LETTERS))))
                drawn.update(tokens[wanted].tolist())
            text += "".join(LETTERS[token] if token < len(LETTERS) else "|" * (token == EOS) for token in row.tolist())
    assert Counter(text.removesuffix("|").split("|")) == sum(clusters.values(), Counter())
    assert objective == "causal" or drawn[MASK] > 0.6 * drawn.total()
    share = next(iter(spec.evaluation(Share(2, 1, 0, 1), 4)))()
    assert len(share["tokens"]) == 2


def test_windows_of_text_know_the_bytes_of_their_own_members(tmp_path):
    draw = random.Random(5)
    texts = ["".join(draw.choices("abcde fgh\n", k=draw.randint(20, 90))).strip() + "x" for _ in range(24)]
    for number, text in enumerate(texts):
        (tmp_path / f"t{number}.txt").write_text(text)
    settings = {"valid_fraction": 0.0, "test_fraction": 0.0, "workers": 1}
    prepare(PrepareConfig([str(tmp_path / "*.txt")], str(tmp_path / "corpus"), **settings))
    names = tables(tmp_path / "corpus")["train"]["id"].to_pylist()
    (tmp_path / "table.tsv").write_text("".join(f"{names[i % 2]}\t{name}\n" for i, name in enumerate(names)))
    index = member_index(str(tmp_path / "corpus"), "train", str(tmp_path / "table.tsv"), tmp_path / "cache")
    for length in (16, 100, 4000):
        spec = CorpusSpec(
            str(tmp_path / "corpus"), "train", length, "family", "causal", 7, batch_tokens=length, members=index
        )
        batches = [make() for make in spec.measuring().evaluation(Share(2, 1, 0, 1))]
        assert sum(int(batch["bytes"]) for batch in batches) == sum(len(text.encode()) for text in texts)
        assert sum(int(batch["words"]) for batch in batches) == sum(len(text.split()) for text in texts)


def test_a_sample_of_an_evaluation_is_of_windows_and_not_of_whole_families(place):
    spec = spec_of(place, length=16)
    every = [row.tolist() for make in spec.evaluation(Share(1, 1, 0, 1)) for row in make()["targets"]]
    few = [row.tolist() for make in spec.evaluation(Share(1, 1, 0, 1), 6) for row in make()["targets"]]
    places = [every.index(row) for row in few]
    assert len(set(places)) == 6
    assert max(places) - min(places) > 6


def test_families_need_members_and_refuse_what_they_have_no_place_for(place):
    with pytest.raises(ValueError, match="families need members"):
        CorpusSpec(str(place / "corpus"), "train", 32, "family", "causal", 0, batch_tokens=64)
    with pytest.raises(ValueError, match="reset is about concatenated documents"):
        CorpusSpec(str(place / "corpus"), "train", 32, "family", "causal", 0, reset=True, batch_tokens=64, members="x")
    with pytest.raises(ValueError, match="crop must be 'random'"):
        CorpusSpec(
            str(place / "corpus"), "train", 32, "family", "causal", 0, crop="first", batch_tokens=64, members="x"
        )
