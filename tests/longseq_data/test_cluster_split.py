"""Whole clusters are held out: by a table, by RepIDs, by MMseqs2; and what a search finds in train afterwards."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from corpora import LETTERS, config, contents, data_files, found
from longseq.cli import main
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.prepare.cluster_table import ClusterTable, read_clusters
from longseq_data.prepare.held_out import hashes
from longseq_data.prepare.mmseqs import MMseqs
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.verify import verify

needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="needs MMseqs2 (apt-get install mmseqs2)")
HALVES = {"valid_fraction": 0.25, "test_fraction": 0.25}


def mutated(rng: random.Random, protein: str, sites: float) -> str:
    return "".join(rng.choice(LETTERS) if rng.random() < sites else letter for letter in protein)


def write_families(path: Path, families: int, members: int, sites: float, seed: int = 3) -> str:
    """Members of a family are mutated copies of one ancestor, so two of them agree in about (1 - sites)^2 of theirs."""
    rng = random.Random(seed)
    rows = []
    for family in range(families):
        ancestor = "".join(rng.choices(LETTERS, k=rng.randrange(110, 180)))
        rows += [(f"f{family}_{member}", mutated(rng, ancestor, sites)) for member in range(members)]
    rng.shuffle(rows)
    path.write_text("".join(f">{name} RepID={name.partition('_')[0]}\n{protein}\n" for name, protein in rows))
    return str(path)


def split_by_family(corpus: Path) -> dict[str, set[str]]:
    """family: the splits that its members are in."""
    splits = defaultdict(set)
    for split, rows in found(corpus).items():
        for identifier in rows:
            splits[identifier.partition("_")[0]].add(split)
    return splits


def related(corpus: Path, folder: Path, queries: str = "test") -> set[str]:
    """Held-out records with at least 30 % identity over at least 80 % of them in train, by a search of its own."""
    splits = found(corpus)
    for split in ("train", queries):
        text = "".join(f">{name}\n{letters}\n" for name, (letters, _) in splits[split].items())
        (folder / f"{split}.fasta").write_text(text)
    command = ["mmseqs", "easy-search", f"{queries}.fasta", "train.fasta", "hits.tsv", "scratch", "-v", "1", "-s", "7"]
    command += ["--alignment-mode", "3", "--threads", "1", "--format-output", "query,fident,qcov"]
    subprocess.run(command, cwd=folder, check=True)
    rows = [line.split("\t") for line in (folder / "hits.tsv").read_text().splitlines()]
    return {name for name, identity, coverage in rows if float(identity) >= 0.3 and float(coverage) >= 0.8}


@pytest.mark.parametrize("zipped", [False, True])
def test_members_of_a_cluster_of_a_table_are_in_one_split(tmp_path, zipped):
    source = write_families(tmp_path / "a.fasta", 60, 4, 0.9)
    names = [(f"f{i}_0", f"f{i}_{k}") for i in range(60) for k in range(4)]
    random.Random(1).shuffle(names)
    table = tmp_path / "clusters.tsv"
    text = "".join(f"{first}\t{member}\n" for first, member in names).encode()
    table.write_bytes(gzip.compress(text) if zipped else text)
    manifest, _ = prepare(config([source], tmp_path / "c", split_by="cluster", clusters=str(table), **HALVES))
    families = split_by_family(tmp_path / "c")
    assert all(len(splits) == 1 for splits in families.values())
    for family, (split,) in families.items():
        at = (int(hashes([f"{family}_0"])[0]) >> 11) / 2**53  # of the representative's name
        assert split == ("valid" if at < 0.25 else "test" if at < 0.5 else "train")
    assert manifest.report["clusters"] == {"rows": 240}
    assert [source.name for source in manifest.inputs] == [str(table)]
    assert verify(tmp_path / "c", full=True).records == 240


def test_a_table_of_other_records_is_no_split_by_clusters(tmp_path):
    """Each record would be a cluster of its own, and relatives on both sides, without a word."""
    source, table = tmp_path / "a.fasta", tmp_path / "t.tsv"
    source.write_text("".join(f">r{i}\n{'ACDEFGHIKL'[i:]}\n" for i in range(8)))
    table.write_text("".join(f"x\tother{i}\n" for i in range(8)))
    how = {"split_by": "cluster", "clusters": str(table), "valid_fraction": 0.0}
    with pytest.raises(DataError, match=r"t\.tsv: lists none of the 8 records, so each would be a cluster of its own"):
        prepare(config([str(source)], tmp_path / "c", **how))
    table.write_text("r1\tr1\nr1\tr2\n")
    manifest, _ = prepare(config([str(source)], tmp_path / "d", **how))
    assert manifest.report["clusters"] == {"rows": 2, "alone": 6}


def test_a_table_of_accessions_finds_uniprot_and_uniref_names(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("UniRef50_P11111\tP11111\nUniRef50_P11111\tUniRef90_Q22222\n\nA\tb\n")
    assert read_clusters(str(table), tmp_path / "t.npy") == 3
    clusters = ClusterTable(tmp_path / "t.npy").of(["sp|P11111|X", "UniRef100_Q22222", "UniRef50_P11111", "b", "other"])
    first, other, last = hashes(["P11111", "A", "other"]).tolist()
    assert clusters.tolist() == [first, first, first, other, last]


def test_tables_that_say_nothing_or_two_things_are_refused(tmp_path):
    for text, words in (
        ("", "clusters has no rows"),
        ("a\tb\nc\n", "line 2: a row needs a representative and a member"),
        ("a\tb\nc\tb\n", "1 members or more belong to two clusters"),
    ):
        (tmp_path / "t.tsv").write_text(text)
        with pytest.raises(DataError, match=words):
            read_clusters(str(tmp_path / "t.tsv"), tmp_path / "t.npy")
    source = write_families(tmp_path / "a.fasta", 2, 2, 0.5)
    with pytest.raises(DataError, match=r"nothing\.tsv: no such file; correct clusters"):
        prepare(config([source], tmp_path / "c", split_by="cluster", clusters=str(tmp_path / "nothing.tsv")))


def test_a_table_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch):
    text = "".join(f"c{i % 97}\tm{i}\n" for i in range(5000))
    (tmp_path / "t.tsv").write_text(text)
    read_clusters(str(tmp_path / "t.tsv"), tmp_path / "one.npy")
    monkeypatch.setattr("longseq_data.prepare.cluster_table.ROWS", 37)
    read_clusters(str(tmp_path / "t.tsv"), tmp_path / "two.npy")
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    names = [f"m{i}" for i in range(5000)]
    assert ClusterTable(tmp_path / "two.npy").of(names).tolist() == hashes(f"c{i % 97}" for i in range(5000)).tolist()


def test_records_of_one_repid_are_in_one_split(tmp_path):
    source = write_families(tmp_path / "a.fasta", 60, 4, 0.9)
    prepare(config([source], tmp_path / "c", split_by="cluster", clusters="repid", **HALVES))
    families = split_by_family(tmp_path / "c")
    for family, splits in families.items():
        at = (int(hashes([family])[0]) >> 11) / 2**53
        assert splits == {"valid" if at < 0.25 else "test" if at < 0.5 else "train"}
    assert {"valid", "test", "train"} == set().union(*families.values())


@needs_mmseqs
def test_a_search_of_its_own_finds_no_relative_of_held_out_clusters_in_train(tmp_path):
    source = write_families(tmp_path / "a.fasta", 30, 6, 0.42)
    manifest, _ = prepare(config([source], tmp_path / "c", split_by="cluster", **HALVES))
    clusters = manifest.report["clusters"]
    assert clusters["clusters"] > 30, "each family is one cluster, and nothing had to move"
    assert clusters["moved"] > 0
    assert manifest.splits["test"].records > 0
    for split in ("test", "valid"):
        assert related(tmp_path / "c", tmp_path, split) == set()
    prepare(config([source], tmp_path / "random", **HALVES))
    assert len(related(tmp_path / "random", tmp_path)) > 10


@needs_mmseqs
def test_clusters_of_mmseqs_give_the_same_corpus_for_any_workers_and_order_of_files(tmp_path):
    one = write_families(tmp_path / "a.fasta", 12, 4, 0.42)
    other = write_families(tmp_path / "b.fasta", 12, 4, 0.42, seed=4)
    for name, sources, workers in (("x", [one, other], 1), ("y", [other, one], 2)):
        prepare(config(sources, tmp_path / name, split_by="cluster", workers=workers, **HALVES))
    assert data_files(tmp_path / "x") == data_files(tmp_path / "y")
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


@needs_mmseqs
@pytest.mark.parametrize("valid", [0.001, 0.98])
def test_too_few_clusters_for_a_split_are_refused_with_a_sentence(tmp_path, valid):
    source = write_families(tmp_path / "a.fasta", 2, 2, 0.02)
    asked = config([source], tmp_path / "c", split_by="cluster", valid_fraction=valid, test_fraction=0.01)
    with pytest.raises(
        DataError, match=r"no cluster is left to (train|validate) on with valid_fraction=0\.\d+"
    ) as said:
        prepare(asked)
    assert str(said.value).endswith("--restart.")


@needs_mmseqs
def test_leaks_counts_records_with_relatives_by_their_identity(tmp_path, capsys):
    rng = random.Random(8)
    train = ["".join(rng.choices(LETTERS, k=150)) for _ in range(40)]
    copies = {"same": train[0], "near": mutated(rng, train[1], 0.02), "half": mutated(rng, train[2], 0.35)}
    copies |= {"far": "".join(rng.choices(LETTERS, k=150)), "part": train[3][:60] + "".join(rng.choices(LETTERS, k=90))}
    names = [f"t{i}" for i in range(40)] + list(copies)
    table = tmp_path / "clusters.tsv"  # which puts the copies into the test, and the others into train
    place = {f"c{i}": (int(hashes([f"c{i}"])[0]) >> 11) / 2**53 for i in range(50)}
    held, kept = (next(name for name, at in place.items() if low <= at < high) for low, high in ((0.0, 0.5), (0.5, 1)))
    table.write_text("".join(f"{held if name in copies else kept}\t{name}\n" for name in names))
    text = "".join(f">{name}\n{protein}\n" for name, protein in zip(names, [*train, *copies.values()], strict=True))
    (tmp_path / "a.fasta").write_text(text)
    corpus = tmp_path / "c"
    how = {"split_by": "cluster", "clusters": str(table), "valid_fraction": 0.0, "test_fraction": 0.5}
    prepare(config([str(tmp_path / "a.fasta")], corpus, deduplicate=False, **how))
    assert main(["data", "leaks", str(corpus), "--json", "--workers", "1"]) == 3
    said = json.loads(capsys.readouterr().out)["splits"]
    assert list(said) == ["test"]
    assert said["test"]["records"] == 5
    assert said["test"]["related"] == {"30": 3, "50": 3, "90": 2}
    assert said["test"]["nearest"] == ["same", "t0", 1.0]
    assert main(["data", "leaks", str(corpus), "--coverage", "0.35", "--workers", "1"]) == 3
    assert "test   5 records: 4 (80.0 %) at 30 %" in capsys.readouterr().out
    assert set(read_manifest(corpus).splits) == {"train", "test"}


@needs_mmseqs
def test_leaks_ends_with_zero_where_there_is_none(tmp_path, capsys):
    source = write_families(tmp_path / "a.fasta", 40, 1, 0.0)
    prepare(config([source], tmp_path / "c", **HALVES))
    assert main(["data", "leaks", str(tmp_path / "c"), "--workers", "1"]) == 0
    assert "0 (0.0 %) at 30 %, 0 (0.0 %) at 50 %, 0 (0.0 %) at 90 %" in capsys.readouterr().out


def test_without_mmseqs_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    source = write_families(tmp_path / "a.fasta", 2, 2, 0.5)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no program mmseqs on the PATH: install it \(apt-get install mmseqs2,"):
        prepare(config([source], tmp_path / "c", split_by="cluster"))
    assert not list(tmp_path.glob("c*"))


def test_an_interruption_ends_what_mmseqs_has_started(tmp_path):
    """The program is a script that starts others; here one that starts a process which would wait for ever."""
    script = tmp_path / "mmseqs"
    pid = tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {pid}.new\nmv {pid}.new {pid}\nwait\n")
    script.chmod(0o755)
    code = "import sys; from longseq_data.prepare.mmseqs import MMseqs; MMseqs(sys.argv[1], None, 1, 1).version()"
    with subprocess.Popen([sys.executable, "-c", code, str(script)], stderr=subprocess.DEVNULL) as caller:
        while not pid.exists():
            assert caller.poll() is None
            time.sleep(0.01)
        caller.send_signal(signal.SIGINT)
        assert caller.wait() != 0
    waiting = int(pid.read_text())
    while Path(f"/proc/{waiting}").exists() and Path(f"/proc/{waiting}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)


def test_what_mmseqs_says_of_a_failure_is_passed_on(tmp_path):
    script = tmp_path / "mmseqs"
    script.write_text("#!/bin/sh\necho no room left >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(DataError, match=r"mmseqs version failed \(no room left\)"):
        MMseqs(str(script), tmp_path, 1, 1).version()


def _at_work(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_mmseqs_has_started_ends_with_its_parent(tmp_path, how):
    program, child = tmp_path / "mmseqs", tmp_path / "child"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {child}.partial\nmv {child}.partial {child}\nwait\n")
    program.chmod(0o755)
    code = (
        "import signal, sys; from pathlib import Path; from longseq_data.prepare.mmseqs import MMseqs; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "MMseqs(sys.argv[1], Path(sys.argv[2]), 1, 2048).version()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, program, tmp_path], stderr=subprocess.DEVNULL)
    while not child.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    number = int(child.read_text())
    assert _at_work(number)
    parent.send_signal(how)
    assert parent.wait(60) != 0
    end = time.monotonic() + 60
    while _at_work(number):
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.02)


def test_a_program_that_fails_is_said_with_its_last_words(tmp_path):
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho no such command >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(DataError, match=r"^mmseqs version failed \(no such command\); give it more room"):
        MMseqs(str(program), tmp_path, 1, 2048).version()


@needs_mmseqs
def test_records_too_short_for_mmseqs_are_refused_with_a_sentence(tmp_path):
    source = tmp_path / "peptides.fasta"
    source.write_text("".join(f">p{i}\n{'ACDE'[: 1 + i % 4]}\n" for i in range(40)))
    with pytest.raises(DataError, match=r"^MMseqs2 compares k-mers, .*split_by=sequence"):
        prepare(config([str(source)], tmp_path / "c", split_by="cluster", **HALVES))
