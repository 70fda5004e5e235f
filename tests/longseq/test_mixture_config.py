"""data.train as several sources by weight: how they are written, what is refused and where, and what a run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.config.loading import load_config, save_config
from longseq.config.sources import reweighted
from longseq.data import resolve_sources, split_spec
from longseq.errors import ConfigError, RunError
from longseq.runs.changes import FIXED, note_weights, refuse_changes
from longseq.runs.run import Run
from longseq_data.corpus.corpus import Corpus
from longseq_data.errors import DataError
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare

TWO = "data:\n  train:\n    - path: a.fasta\n      weight: 0.7\n    - {path: [b.fasta, c.fasta], weight: 3, name: bc}\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fasta").write_text("".join(f">{name}{i}\n{'MKV' * (i + 1)}\n" for i in range(9)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(text: str, *overrides: str):
    Path("a.yaml").write_text(text)
    return load_config("a.yaml", overrides)


def test_sources_keep_their_weights_and_names_through_a_runs_configuration(here):
    config = config_of(TWO + "  valid: {one: a.fasta, two: [b.fasta]}\n")
    resolve_sources(config)
    assert config.data.sources("train") == [
        {"name": "a", "path": [str(here / "a.fasta")], "weight": 0.7},
        {"name": "bc", "path": [str(here / "b.fasta"), str(here / "c.fasta")], "weight": 3.0},
    ]
    assert config.data.files("train") == [str(here / f"{name}.fasta") for name in "abc"]
    save_config(config, here / "config.yaml")
    assert load_config(here / "config.yaml", resolved=True).data == config.data
    assert split_spec(config, "train").names == ("a", "bc")
    assert split_spec(config, "valid").names == ("one", "two")
    assert split_spec(config, "test").names == ("a", "bc")  # held out of each


def test_an_argument_names_sources_as_a_file_does(here):
    config = config_of("", "data.train=[{path: a.fasta, weight: 2}, {path: 'b.fasta'}]")
    assert [(each["name"], each["weight"]) for each in config.data.sources("train")] == [("a", 2.0), ("b", 1.0)]
    alone = config_of("", "data.train={path: NO, name: 012}")
    assert alone.data.train == [{"name": "012", "path": ["NO"], "weight": 1.0}]


def test_an_argument_changes_one_source(here):
    for which in ("1", "bc"):
        config = config_of(TWO, f"data.train.{which}.weight=5", "data.train.0.name=first")
        assert [(each["name"], each["weight"]) for each in config.data.train] == [("first", 0.7), ("bc", 5.0)]
    assert config_of(TWO, "data.train.a.path=[c.fasta]").data.train[0]["path"] == ["c.fasta"]
    assert config_of(TWO.replace("bc}", "b.c}"), "data.train.b.c.weight=5").data.train[1]["weight"] == 5
    for text, argument, words in (
        (TWO, "data.train.2.weight=5", "data.train has no source '2'; it has 0 (a), 1 (bc)."),
        (TWO, "data.train.x.weight=5", "data.train has no source 'x'; it has 0 (a), 1 (bc)."),
        (TWO, "data.train.0.weight=0", "data.train[0].weight=0 must be a number above 0"),
        (TWO, "data.train.0.wieght=5", "unknown key 'data.train[0].wieght'. Did you mean weight?"),
        (TWO, "data.train.0.name=bc", "2 sources are called bc"),
        ("data: {train: a.fasta}", "data.train.0.weight=5", "write data.train=[{path: FILE, weight: NUMBER}, ...]."),
    ):
        with pytest.raises(ConfigError) as error:
            config_of(text, argument)
        assert str(error.value).startswith(f"a.yaml and its overrides: argument {argument!r}: ") or str(
            error.value
        ).startswith(f"argument {argument!r}: ")
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["- {path: a.fasta}", "- path: b.fasta", "  weight: 0"], 5, "data.train[1].weight=0 must be a number above 0"),
        (["- {path: a.fasta, weight: -1}"], 3, "weight=-1 must be a number above 0"),
        (["- {path: a.fasta, weight: much}"], 3, "weight=much must be a number"),
        (["- {path: a.fasta, weight: yes}"], 3, "must be a number"),
        (["- {path: a.fasta, weight: .inf}"], 3, "must be a number"),
        (["- {path: a.fasta, wieght: 1}"], 3, "unknown key 'data.train[0].wieght'. Did you mean weight?"),
        (["- {path: a.fasta}", "- b.fasta"], 4, "data.train[1]=b.fasta: other sources here have weights"),
        (["- {weight: 1}"], 3, "data.train[0].path=None: name a file"),
        (["- {path: a.fasta}", "- {path: x/a.fasta}"], 2, "2 sources are called a: give each a name"),
        (["- {path: a.fasta, name: a b}"], 3, "data.train[0].name=a b: letters, digits"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_with_its_line(here, lines, line, words):
    with pytest.raises(ConfigError) as error:
        config_of("data:\n  train:\n" + "".join(f"    {each}\n" for each in lines))
    assert str(error.value).startswith(f"a.yaml:{line}: ")
    assert words in str(error.value)


def test_sources_that_no_model_reads_together_are_refused_in_one_sentence(here):
    Path("t.txt").write_text("the sea\n")
    with pytest.raises(DataError, match=r"One model cannot read .*t\.txt as bytes, .*a\.fasta as protein"):
        resolve_sources(config_of("", "data.train=[{path: a.fasta}, {path: t.txt}]"))


def test_several_sources_do_not_go_into_buckets(here):
    with pytest.raises(ConfigError, match=r"data\.packing=bucket .* several sources are mixed"):
        resolve_sources(config_of(TWO, "data.packing=bucket"))


def test_weights_of_before_are_kept_with_the_sample_up_to_which_they_held():
    def sources(*weights: float):
        return [{"name": str(i), "path": [str(i)], "weight": weight} for i, weight in enumerate(weights)]

    notes = reweighted(sources(1.0, 1.0), sources(1.0, 1.0), [], 40)
    assert notes == []
    notes = reweighted(sources(1.0, 1.0), sources(5.0, 1.0), notes, 40)
    assert notes == ["40: 1.0 1.0"]
    assert reweighted(sources(5.0, 1.0), sources(5.0, 1.0), notes, 20) == notes  # drawn again as it was
    assert reweighted(sources(5.0, 1.0), sources(1.0, 9.0), notes, 80) == ["40: 1.0 1.0", "80: 5.0 1.0"]
    assert reweighted(sources(5.0, 1.0), sources(1.0, 9.0), notes, 20) == ["20: 1.0 1.0"]  # from an earlier checkpoint
    assert reweighted(sources(5.0, 1.0), sources(1.0, 9.0), notes, 40) == ["40: 1.0 1.0"]
    assert reweighted(sources(5.0, 1.0), sources(1.0, 9.0), notes, 0) == []


@pytest.mark.parametrize("notes", ['["10: nan 1"]', '["10: 0 0"]', '["-4: 1 1"]', '["10: 1"]', '["10: 1 1", "5: 1 1"]'])
def test_notes_of_weights_that_no_resume_wrote_are_refused(here, notes):
    config = config_of(TWO, f"data.reweighted={notes}")
    resolve_sources(config)
    with pytest.raises(ConfigError, match=r"^data\.reweighted: .* leave it out\.$"):
        split_spec(config, "train")


def test_weights_do_not_change_for_a_job_that_waits_for_another(here):
    before = config_of(TWO)
    same, other = config_of(TWO), config_of(TWO.replace("weight: 3", "weight: 4"))
    note_weights(before, same, 40, waits=True)
    assert same.data.reweighted == []
    with pytest.raises(RunError, match=r"weights were \[0\.7, 3\.0\] and are \[0\.7, 4\.0\]: .*\(--dependency\)"):
        note_weights(before, other, 40, waits=True)
    note_weights(before, other, 40)
    assert other.data.reweighted == ["40: 0.7 3.0"]


def test_a_run_with_its_sources_in_another_order_is_not_told_of_another_content(here):
    config = config_of(TWO)
    resolve_sources(config)
    run = Run.create(config, "run")
    after = run.config()
    after.data.train.reverse()
    with pytest.raises(RunError, match="was started with") as caught:
        refuse_changes(run.config(), after, run, FIXED)
    assert "content" not in str(caught.value)
    after = run.config()
    after.data.train[0]["weight"] = 9.0
    refuse_changes(run.config(), after, run, FIXED)


def test_corpora_of_different_fractions_keep_their_own_splits(here):
    for name, valid in (("one", 0.3), ("other", 0.5)):
        config = PrepareConfig(
            ["a.fasta", "b.fasta", "c.fasta"], name, valid_fraction=valid, test_fraction=0, workers=1
        )
        prepare(config)
    two = "data: {length: 16, batch_tokens: 64, train: [{path: one}, {path: other}]}"
    config = config_of(two)
    resolve_sources(config)
    held_out = [len(part.corpus) for part in split_spec(config, "valid").parts]
    assert held_out == [len(Corpus.open(name, "valid")) for name in ("one", "other")]
    assert held_out[0] < held_out[1]
    with pytest.raises(
        ConfigError, match=r"valid_fraction=0.2, but .*one was prepared .*: leave data.valid_fraction out"
    ):
        resolve_sources(config_of(two, "data.valid_fraction=0.2"))
    config = config_of(two, "data.train=[{path: one}, {path: a.fasta}]", "data.valid_fraction=0.2")  # of the files
    resolve_sources(config)
    corpus, files = split_spec(config, "valid").parts
    assert (len(corpus.corpus), files.valid_fraction) == (held_out[0], 0.2)
