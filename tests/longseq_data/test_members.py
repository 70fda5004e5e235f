"""One member of each cluster an epoch: a function of seed, epoch and cluster, the same for any ranks and resumes."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from corpora import clustered, tables
from longseq_data.errors import DataError
from longseq_data.prepare.members import member_index
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.rank_share import Share

SIZES = [1, 2, 3, 40, 1, 7]  # of the clusters that are listed
ALONE = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return clustered(tmp_path_factory.mktemp("members"), SIZES, ALONE, longest=60, seed=1)


def spec_of(place: Path, packing: str = "crop", seed: int = 3) -> CorpusSpec:
    index = member_index(str(place / "corpus"), "train", str(place / "table.tsv"), place / "cache")
    return CorpusSpec(str(place / "corpus"), "train", 32, packing, "causal", seed, batch_tokens=128, members=index)


def cluster(name: str) -> str:
    return name.partition("_")[0]


def test_an_epoch_has_one_member_of_each_cluster_and_another_epoch_others(place):
    names = tables(place / "corpus")["train"]["id"].to_pylist()
    spec, count = spec_of(place), len(SIZES) + ALONE
    assert spec.epoch_samples == count
    records = spec.cut.plan(np.arange(400 * count)).records.reshape(400, count)
    for epoch in records.tolist():
        assert Counter(cluster(names[record]) for record in epoch).most_common(1)[0][1] == 1
    drawn = Counter(names[record] for record in records.ravel().tolist())
    assert len(drawn) == sum(SIZES) + ALONE
    for c, size in enumerate(SIZES):  # each about as often as the others of its cluster
        often = [drawn[f"c{c}_{i}"] for i in range(size)]
        assert sum(often) == 400
        assert max(abs(each - 400 / size) for each in often) < 5 * (400 / size) ** 0.5
    assert (records[0] != records[1]).any()


def test_members_are_a_function_of_seed_and_sample_alone(place):
    spec = spec_of(place)
    whole = spec.cut.plan(np.arange(200))
    again = spec_of(place).cut.plan(np.array([150, 3, 77]))
    assert again.records.tolist() == whole.records[[150, 3, 77]].tolist()
    assert spec_of(place, seed=4).cut.plan(np.arange(200)).records.tolist() != whole.records.tolist()
    rows = [
        batch["tokens"][i].tolist()
        for rank in range(2)
        for batch in (make() for make in islice(spec.training(20, Share(4, 1, rank, 2)), 3))
        for i in range(4)
    ]
    one = [
        batch["tokens"][i].tolist()
        for batch in (make() for make in islice(spec.training(20, Share(8, 1, 0, 1)), 3))
        for i in range(8)
    ]

    def bare(rows):
        return sorted([token for token in row if token != spec.vocabulary.pad] for row in rows)

    assert bare(rows) == bare(one)


def test_buckets_take_members_and_an_evaluation_all_records(place):
    spec = spec_of(place, "bucket")
    batches = islice(spec.training(0, Share(4, 1, 0, 1)), 4)
    assert all(make()["tokens"].size <= 128 for make in batches)
    rows = sum(int((make()["targets"][:, 0] >= 0).sum()) for make in spec_of(place).evaluation(Share(4, 1, 0, 1)))
    assert rows >= sum(SIZES) + ALONE


def test_the_index_is_made_once_and_anew_for_another_table(place, tmp_path, monkeypatch):
    corpus, table = str(place / "corpus"), str(place / "table.tsv")
    first = member_index(corpus, "train", table, tmp_path)
    monkeypatch.setattr("longseq_data.prepare.members.read_clusters", None)
    assert member_index(corpus, "train", table, tmp_path) == first
    monkeypatch.undo()
    (tmp_path / "other.tsv").write_text("c0_0\tc1_0\n")
    os.utime(table, (1, 1))  # as after a change that leaves its size and its ends
    assert member_index(corpus, "train", table, tmp_path) != first
    assert member_index(corpus, "train", str(tmp_path / "other.tsv"), tmp_path) != first
    (tmp_path / "bad.tsv").write_text("c0_0\n")
    with pytest.raises(DataError, match=r"bad\.tsv, line 1: a row needs a representative and a member"):
        member_index(corpus, "train", str(tmp_path / "bad.tsv"), tmp_path)


def test_joined_records_have_no_members(place):
    with pytest.raises(ValueError, match="members are whole records"):
        spec_of(place, "concat")
