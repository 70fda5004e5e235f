"""What a configuration may say beside a prepared corpus, and how a run knows its data again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.data import corpus_of, identities, resolve_sources, split_spec, vocabulary
from longseq.data_report import check_data
from longseq.errors import ConfigError, RunError
from longseq.runs.changes import FIXED, refuse_changes
from longseq.runs.run import Run
from longseq_data.corpus.corpus import Corpus
from longseq_data.errors import DataError
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.streaming import StreamSpec
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a person would stand: files, a corpus with an ood split, one of training alone, an unfinished one."""
    monkeypatch.chdir(tmp_path)
    write_fasta(SyntheticSpec(families=3, records=120, mean_length=40), tmp_path / "proteins.fasta")
    (tmp_path / "ids.txt").write_text("".join(f"{line.split()[0][1:]}\n" for line in headers(tmp_path)[:9]))
    (tmp_path / "books.txt").write_text("Es war einmal.\n" * 40)
    plain = {"sources": ["proteins.fasta"], "workers": 1}
    prepare(PrepareConfig(**plain, output="corpus", valid_fraction=0.1, ood_ids="ids.txt"))
    prepare(PrepareConfig(**plain, output="train-only", valid_fraction=0, test_fraction=0))
    (tmp_path / "begun.partial").mkdir()
    (tmp_path / "small.yaml").write_text("data: {train: corpus, length: 32, batch_tokens: 256}")
    return tmp_path


def headers(folder: Path) -> list[str]:
    return [line for line in (folder / "proteins.fasta").read_text().splitlines() if line.startswith(">")]


@pytest.fixture
def resolved(folder: Path) -> Callable[..., Config]:
    def resolved(*overrides: str) -> Config:
        config = load_config(folder / "small.yaml", overrides)
        resolve_sources(config)
        return config

    return resolved


def test_the_splits_and_the_vocabulary_are_those_of_the_corpus(resolved, folder, capsys):
    config = resolved("data.reset=true")
    assert vocabulary(config).name == "protein"
    for split in ("train", "valid", "test", "ood"):
        spec = split_spec(config, split)
        assert isinstance(spec, CorpusSpec)
        assert (spec.path, spec.split, spec.reset) == (str(folder / "corpus"), split, True)
        assert corpus_of(config, split) == str(folder / "corpus")
    check_data(config)
    said = capsys.readouterr().err
    assert f"data.ood: {len(split_spec(config, 'ood').corpus)} records" in said


def test_files_and_other_corpora_can_stand_beside_it(resolved, folder):
    config = resolved("data.ood=proteins.fasta", "data.packing=bucket")
    spec = split_spec(config, "ood")
    assert isinstance(spec, StreamSpec)
    assert (spec.split, spec.packing) == (None, "crop")
    config = resolved("data.train=proteins.fasta", "data.valid=corpus")
    assert isinstance(split_spec(config, "train"), StreamSpec)
    assert split_spec(config, "valid").path == str(folder / "corpus")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("data.train=proteins.fasta data.packing=bucket", "only a prepared corpus knows beforehand: make one with"),
        ("data.train=[corpus,proteins.fasta]", "a corpus is not listed with others"),
        ("data.format=jsonl", "data.format=jsonl says how files are read"),
        ("data.strict=true", "data.strict=True says how files are read"),
        ("data.tokenizer=bytes", "was prepared as protein"),
        ("data.valid_fraction=0.2", "was prepared with valid_fraction=0.1"),
        ("data.train=train-only", "has no valid split: name files or a corpus in data.valid"),
        ("data.packing=bucket trainer.accumulate=9", "less than one sequence of data.length=32 for each of"),
        ("data.packing=bucket data.reset=true", "data.reset=true and data.packing=bucket"),
    ],
)
def test_what_makes_no_sense_with_a_corpus_is_refused_with_a_way_out(resolved, overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        resolved(*overrides.split())
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("data.train=begun", "is not finished; start `longseq data prepare` again"),
        ("data.train=begun.partial", "is not finished"),
        ("data.ood=books.txt", "One model cannot read"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_refused(resolved, overrides, sentence):
    with pytest.raises(DataError) as caught:
        resolved(*overrides.split())
    assert sentence in str(caught.value)


def test_a_split_that_the_corpus_lacks_is_named_with_those_it_has(resolved):
    config = resolved("data.train=train-only", "trainer.valid_every=0")
    with pytest.raises(ConfigError, match=r"there is no ood split: .*train-only has train\. Prepare"):
        split_spec(config, "ood")


def test_buckets_need_no_whole_number_of_sequences(resolved):
    config = resolved("data.packing=bucket", "data.batch_tokens=300")
    assert split_spec(config, "train").batch_tokens == 300


def test_a_corpus_prepared_anew_with_other_content_is_not_the_runs(resolved, folder):
    config = resolved()
    run = Run.create(config, "run")
    run.record_data(identities(config))
    run.check_data(config, identities(config))
    prepare(PrepareConfig(["proteins.fasta"], "corpus", workers=1, valid_fraction=0.1, min_length=30), overwrite=True)
    with pytest.raises(RunError) as caught:
        run.check_data(config, identities(config))
    assert str(caught.value).startswith(f"{folder / 'corpus'} (data.train) has changed since the run was started")
    assert "data.accept_changes=true" in str(caught.value)


def test_a_corpus_prepared_anew_with_the_same_content_is_the_runs(resolved, folder):
    config = resolved()
    before = identities(config)
    again = PrepareConfig(["proteins.fasta"], "corpus", workers=1, valid_fraction=0.1, ood_ids="ids.txt")
    prepare(again, overwrite=True)
    assert identities(config) == before


def test_a_file_is_known_by_its_size_and_ends_and_not_by_its_time(resolved, folder):
    config = resolved("data.train=proteins.fasta")
    before = identities(config)
    path = folder / "proteins.fasta"
    content = path.read_bytes()
    path.write_bytes(content)  # a copy
    assert identities(config) == before
    for changed in (content + b"A\n", b">x" + content[2:], content[:-2] + b"W\n"):
        path.write_bytes(changed)
        assert identities(config) != before


def test_a_folder_of_texts_is_known_by_its_files(tmp_path):
    from longseq_data.prepare.identity import identity_of

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    before = identity_of(str(tmp_path))
    (tmp_path / "b.txt").write_text("two")
    assert identity_of(str(tmp_path)) != before
    (tmp_path / "b.txt").unlink()
    assert identity_of(str(tmp_path)) == before
    assert identity_of(str(tmp_path / "gone")) is None
    assert identity_of("hub:a/b#train") is None


def test_one_member_of_each_cluster_is_drawn_where_that_can_be(folder, resolved, tmp_path):
    (folder / "clusters.tsv").write_text("a\tb\n")
    words = ["data.clusters=clusters.tsv", "data.packing=crop", f"data.cache={tmp_path}"]
    config = resolved(*words)
    assert config.data.clusters == str(folder / "clusters.tsv")
    assert split_spec(config, "train").members is not None
    assert split_spec(config, "valid").members is None
    for overrides, sentence in (
        (["data.packing=concat"], "draws whole records, and data.packing=concat cuts them"),
        (["data.cache=none"], "and data.cache=none"),
        (["data.train=proteins.fasta"], "and data.train has files: prepare them"),
        (["data.clusters=nowhere.tsv"], "no such file"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolved(*words, *overrides)
        assert sentence in str(caught.value)


def test_whole_clusters_are_trained_and_validated_on_and_need_a_table(folder, resolved, tmp_path):
    (folder / "clusters.tsv").write_text("a\tb\n")
    words = ["data.packing=family", f"data.cache={tmp_path}", "data.batch_tokens=1024"]
    config = resolved("data.clusters=clusters.tsv", *words)
    train, valid = (split_spec(config, split) for split in ("train", "valid"))
    assert (train.packing, valid.packing) == ("family", "family")
    assert None not in (train.members, valid.members)
    assert train.members != valid.members
    for overrides, sentence in (
        ([], "nothing says which records are one: set data.clusters"),
        (["data.clusters=clusters.tsv", "data.train=proteins.fasta"], "which only a prepared corpus knows beforehand"),
        (["data.clusters=clusters.tsv", "data.reset=true"], "data.reset=true and data.packing=family"),
        (["data.clusters=clusters.tsv", "data.crop=first"], "data.crop=first and data.packing=family"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolved(*words, *overrides)
        assert sentence in str(caught.value)


def test_a_table_of_clusters_is_part_of_the_data_of_a_run(folder, resolved):
    table, words = folder / "clusters.tsv", ["data.clusters=clusters.tsv", "data.packing=crop", "data.cache=cache"]
    table.write_text("a\tb\n")
    config = resolved(*words)
    run = Run.create(config, "run")
    run.record_data(identities(config))
    moved = folder / "moved/clusters.tsv"
    moved.parent.mkdir()
    moved.write_text("a\tb\n")
    after = run.config((f"data.clusters={moved}",))
    refuse_changes(run.config(), after, run, FIXED)
    moved.write_text("a\tc\n")
    with pytest.raises(RunError, match=r"data.clusters=.*moved/clusters.tsv: .*, whose content is another"):
        refuse_changes(run.config(), after, run, FIXED)
    run.check_data(config, identities(config))
    table.write_text("a\tc\n")
    with pytest.raises(RunError, match=rf"{table} \(data.clusters\) has changed since the run was started"):
        run.check_data(config, identities(config))
    run.record_data({key: of for key, of in identities(config).items() if key != "clusters"})  # of a version before
    run.check_data(config, identities(config))


def test_how_many_clusters_there_are_is_said_and_a_table_of_other_records_is_suspect(folder, resolved, capsys):
    names = [name for some in Corpus.open("train-only", "train").identifiers() for name in some]
    words = ["data.train=train-only", "trainer.valid_every=0", "data.clusters=clusters.tsv", "data.packing=crop"]
    for rows, clusters in (
        ("nobody\tno one\n", len(names)),
        (f"{names[0]}\t{names[1]}\n{names[0]}\t{names[2]}\n", len(names) - 2),
    ):
        (folder / "clusters.tsv").write_text(rows)
        check_data(resolved(*words, "data.cache=cache"))
        said = capsys.readouterr().err
        assert f"data.train: an epoch is one record of each of {clusters} clusters" in said
        assert ("Is it the table of this corpus" in said) == (clusters == len(names))
