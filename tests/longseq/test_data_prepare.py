"""``longseq data prepare``, ``verify`` and ``inspect`` as a person meets them, killed at any moment too."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import Command, alive, longseq
from corpora import contents, expected, found, write_files
from longseq.commands.key_help import help_on_flat_keys
from longseq.config.flat import load_flat
from longseq.errors import ConfigError
from longseq_data.corpus.corpus import Corpus
from longseq_data.errors import DataError
from longseq_data.prepare.config import PrepareConfig
from real_files import folder_of

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("files"), records=6000)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 MB: a second or two of work, in several blocks and shards."""
    rng = random.Random(4)
    path = tmp_path_factory.mktemp("large") / "large.fasta"
    pool = "".join(rng.choices(LETTERS, k=1 << 20))
    with path.open("w") as handle:
        for i in range(60_000):
            start, size = rng.randrange(1 << 20), rng.randrange(200, 800)
            handle.write(f">UniRef50_{i} n=1 TaxID={i % 9}\n{pool[start : start + size]}{i:b}\n".replace("0", "A"))
    return str(path)


@pytest.fixture
def place(files: list[str], tmp_path: Path) -> Path:
    """A folder with prepare.yaml, which prepares the corpus "out"."""
    (tmp_path / "prepare.yaml").write_text(f"sources: [{', '.join(files)}]\noutput: out\nood_taxids: 10239\n")
    return tmp_path


def test_a_corpus_is_prepared_looked_at_and_verified(place, files):
    done = longseq("data", "prepare", "prepare.yaml", "workers=2", "min_length=12", folder=place)
    assert done.code == 0, done.err
    wanted = expected(files, keep=lambda i, s, t: len(s) >= 12, held_out=lambda i, t: t == 10239)
    assert found(place / "out") == wanted
    for split, rows in wanted.items():
        assert re.search(rf"^  {split} +{len(rows):,} records", done.out, re.MULTILINE)
    assert re.search(r"^  read +6,000 records, [\d,]+ residues, 3 files$", done.out, re.MULTILINE)
    assert re.search(r"^  dropped +[\d,]+ duplicates$", done.out, re.MULTILINE)
    assert re.search(r"^  dropped +\d+ too short$", done.out, re.MULTILINE)
    assert re.search(r"^  unknown +'-' [\d,]+, 'J' [\d,]+: read as X$", done.out, re.MULTILINE)
    assert done.out.endswith("Check it:  longseq data verify out\n")
    assert "reading: " in done.err  # no terminal: lines

    again = longseq("data", "prepare", "prepare.yaml", "min_length=12", folder=place)
    assert again.code == 0
    assert again.out.endswith("It was there already: nothing has changed.\n")
    other = longseq("data", "prepare", "prepare.yaml", "min_length=13", folder=place)
    assert other.code == 1
    assert other.sentence.endswith(
        "min_length was 12 and is 13; choose another output, or replace it with --overwrite."
    )

    verified = longseq("data", "verify", "out", "--full", folder=place)
    assert verified.code == 0
    records = sum(map(len, wanted.values()))
    assert f"{records:,} of {records:,} records compared" in verified.out

    seen = longseq("data", "inspect", "out", "--records", 2, folder=place)
    assert seen.code == 0
    assert seen.out.count("TaxID") == 2 * len(wanted)
    shown = re.findall(r"^  (UniRef50_\d+)  TaxID (\S+)  ([\d,]+)  ([A-Z]+)…?$", seen.out, re.MULTILINE)
    rows = {identifier: row for split in wanted.values() for identifier, row in split.items()}
    for identifier, taxid, length, letters in shown:
        whole, its_taxid = rows[identifier]
        assert (taxid, length) == (str(its_taxid) if its_taxid >= 0 else "unknown", f"{len(whole):,}")
        assert letters == whole[:60]
    assert len(shown) == 2 * len(wanted)


def test_files_are_counted_without_being_prepared(place, files):
    seen = longseq("data", "inspect", *files, "--records", 1, folder=place)
    assert seen.code == 0
    rows = expected(files, deduplicate=False)
    residues = sum(len(letters) for split in rows.values() for letters, _ in split.values())
    assert seen.out.startswith(f"3 files: 6,000 records, {residues:,} residues\n")
    assert seen.out.count("TaxID") == 1
    (place / "one.fasta").write_text(
        ">UniRef50_A a TaxID=5 n=1,204 x n=1204 Tax=Homo sapiens TaxID=9606 RepID=A_B\nAC\n"
    )
    (place / "two.fasta").write_text(">sp|A|B OX=5 a OS=Human virus PE=1 SV=1\nAC\n>c\nD\n>d\nE\n")
    seen = longseq("data", "inspect", "one.fasta", "two.fasta", folder=place)
    assert seen.out.splitlines()[-3:] == [
        "  UniRef50_A  TaxID 9606 (Homo sapiens, 1,204 members)  2  AC",
        "  sp|A|B  TaxID unknown (Human virus)  2  AC",
        "  c  TaxID unknown  1  D",
    ]
    (place / "bad.fasta").write_text(">a\nAC\n>b\n")
    bad = longseq("data", "inspect", "bad.fasta", folder=place)
    assert bad.code == 1
    assert "bad.fasta, line 3: record 'b' has no residues" in bad.sentence


def test_damage_is_named_and_leaves_with_an_error(place):
    assert longseq("data", "prepare", "prepare.yaml", folder=place).code == 0
    path = next((place / "out" / "train").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    done = longseq("data", "verify", "out", folder=place)
    assert done.code == 1
    assert f"train/{path.name} has another SHA-256" in done.sentence
    none = longseq("data", "verify", "nothing", folder=place)
    assert "there is no such corpus" in none.sentence


# interruptions


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in children(child)]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(large, tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {large}\nworkers: 2\n")
    whole = longseq("data", "prepare", "prepare.yaml", "output=whole", "workers=1", folder=tmp_path)
    assert whole.code == 0, whole.err
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    moments = [
        lambda: any(partial.glob("parts/map/*.arrow")),
        lambda: len(list(partial.glob("parts/map/*.arrow"))) > 4,
        lambda: any(partial.glob("parts/sources/*.json")),
        lambda: any(partial.glob("parts/shards/*.json")),
        lambda: any(partial.glob("train/*.arrow")),
        lambda: (partial / "manifest.json").exists(),
    ]
    killed = 0
    for come in moments:
        command = Command("data", "prepare", "prepare.yaml", "output=out", folder=tmp_path)
        while not come() and command.process.poll() is None:
            time.sleep(0.001)
        below = []
        if command.process.poll() is None:
            below = children(command.process.pid)
            command.kill(command.process.pid)
        command.process.wait()
        killed += command.process.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while any(map(alive, below)):  # no process is left behind
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if out.exists():
            break
        assert partial.is_dir()
        with pytest.raises(DataError, match="is not finished"):  # nothing takes it for a corpus
            Corpus.open(out, "train")
    assert killed >= 4
    done = longseq("data", "prepare", "prepare.yaml", "output=out", folder=tmp_path)
    assert done.code == 0, done.err
    assert contents(out) == contents(tmp_path / "whole")
    # .out is what Command keeps of the output
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [".out", "out"]


def test_ctrl_c_says_that_it_goes_on_and_leaves_no_process(large, tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {large}\nworkers: 2\noutput: out\n")
    command = Command("data", "prepare", "prepare.yaml", folder=tmp_path)
    while not any(tmp_path.glob("out.partial/parts/map/*.arrow")):
        time.sleep(0.005)
        assert command.process.poll() is None, command.err.read_text()
    below = children(command.process.pid)
    command.interrupt()
    ended = command.end()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.err.strip().endswith("Interrupted. The same command goes on from here.")
    assert below
    deadline = time.monotonic() + 60
    while any(map(alive, below)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    assert longseq("data", "prepare", "prepare.yaml", folder=tmp_path).code == 0


def test_a_second_one_at_the_same_time_is_told(large, tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {large}\noutput: out\n")
    command = Command("data", "prepare", "prepare.yaml", folder=tmp_path)
    while not (tmp_path / "out.partial").exists():
        time.sleep(0.005)
    (tmp_path / "second").mkdir()
    second = longseq("data", "prepare", "../prepare.yaml", "output=../out", folder=tmp_path / "second")
    assert second.code == 1
    assert f"is being prepared already (process {command.process.pid})" in second.sentence
    assert command.end().code == 0


@pytest.fixture
def little_room(tmp_path: Path):
    """A disk of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_with_room_it_goes_on(large, little_room, tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {large}\noutput: {little_room}/out\nworkers: 2\n")
    full = longseq("data", "prepare", "prepare.yaml", folder=tmp_path)
    assert full.code == 1
    assert f"{little_room}/out: cannot be written (No space left on device); make room" in full.sentence
    assert any(little_room.glob("out.partial/parts/map/*.arrow"))
    assert not any(little_room.rglob("*.partial/**/*.partial"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(little_room)], check=True)
    assert longseq("data", "prepare", "prepare.yaml", folder=tmp_path).code == 0
    assert longseq("data", "verify", little_room / "out", folder=tmp_path).code == 0


def test_a_limit_on_file_size_is_a_full_disk(large, tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {large}\noutput: out\nworkers: 2\n")
    limit = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash"]  # 1,024,000 bytes
    full = longseq("data", "prepare", "prepare.yaml", folder=tmp_path, inside=limit)
    assert full.code == 1
    assert "out: cannot be written (File too large); raise the limit on the size of files (ulimit -f)" in full.sentence
    assert longseq("data", "prepare", "prepare.yaml", folder=tmp_path).code == 0


# the configuration


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load(text, *overrides): the configuration of p.yaml with this text."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> PrepareConfig:
        Path("p.yaml").write_text(text)
        return load_flat(PrepareConfig, Path("p.yaml"), overrides, "longseq data prepare --help")

    return load


def test_arguments_go_before_the_file_and_one_value_needs_no_brackets(load):
    config = load("sources: a.fasta\nmin_length: 3\nood_taxids: 7\n", "min_length=4", "sources=*.gz", "output=12:30")
    assert (config.sources, config.min_length, config.ood_taxids) == (["*.gz"], 4, [7])
    assert (config.output, config.max_length) == ("12:30", None)
    assert load("", "sources='[a,b]'".replace("'", ""), "max_length=null").sources == ["a", "b"]
    assert load("") == PrepareConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("a: 1", [], "p.yaml:1: unknown key 'a'. `longseq data prepare --help` lists the keys."),
        ("sources: a\nmin_lenght: 1", [], "p.yaml:2: unknown key 'min_lenght'. Did you mean min_length (leave out"),
        ("", ["duplicate=1"], "argument 'duplicate=1': unknown key 'duplicate'. Did you mean deduplicate ("),
        ("min_length: x", [], "p.yaml:1: min_length=x is not a whole number: leave out shorter records"),
        ("\nood_taxids: [a]", [], "p.yaml:2: ood_taxids=['a'] is not a list of whole numbers: records of these"),
        ("min_length: 0", [], "p.yaml:1: min_length=0 must be at least 1: leave out shorter records (tokens)."),
        ("", ["valid_fraction=1"], "argument 'valid_fraction=1' must be at least 0 and below 1:"),
        ("unknown: y", [], "p.yaml:1: unknown=y: choose from x, refuse, drop."),
        ("", ["min_length"], "argument 'min_length': an override is key=value."),
        ("", ["sources=[a"], "argument 'sources=[a': not valid YAML: "),
        ("- a", [], "p.yaml: a configuration is a mapping"),
        ("a: [", [], "p.yaml:1: not valid YAML: "),
    ],
)
def test_a_key_that_does_not_fit_is_refused_with_its_place(load, text, overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        load(text, *overrides)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_keys_that_cannot_go_together_are_refused_with_the_file(place):
    done = longseq("data", "prepare", "prepare.yaml", "exclude_taxids=[10239]", folder=place)
    assert done.code == 1
    assert done.sentence.startswith("prepare.yaml and its overrides: TaxID 10239 is in ood_taxids and in exclude")
    assert longseq("data", "prepare", "none.yaml", folder=place).sentence.startswith("none.yaml: no such file")


def test_help_says_what_every_key_means():
    done = subprocess.run(
        [sys.executable, "-m", "longseq.cli", "data", "prepare", "--help"], capture_output=True, text=True, timeout=60
    )
    words = " ".join(done.stdout.split())
    assert " ".join(help_on_flat_keys(PrepareConfig).split()) in words
    for name in PrepareConfig.__dataclass_fields__:
        assert f" {name}: " in words


# real proteins, where there are any

REAL = folder_of("proteins")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real proteins here: set LONGSEQ_PROTEINS")
def test_real_proteins_with_viruses_held_out_are_counted_as_biopython_counts(tmp_path):
    (tmp_path / "prepare.yaml").write_text(f"sources: {REAL}/*.fasta.gz\noutput: out\nood_taxids: 10239\n")
    done = longseq("data", "prepare", "prepare.yaml", folder=tmp_path)
    assert done.code == 0, done.err
    names = sorted(map(str, REAL.glob("*.fasta.gz")))
    assert found(tmp_path / "out") == expected(names, held_out=lambda identifier, taxid: taxid == 10239)
    shutil.rmtree(tmp_path / "out")
