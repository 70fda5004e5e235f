"""The command line as a person meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longseq.cli import VERBS
from longseq.config.loading import described_keys

HEAVY = ("torch", "lightning", "deepspeed", "tensorboard", "datasets")


def longseq(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longseq.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """The top-level packages that `longseq ARGUMENTS` imports, and what it prints."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "from longseq.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that is the user's to fix."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("longseq: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


def test_help_lists_the_verbs_and_imports_nothing_heavy():
    packages, text = imported_by("--help")
    assert packages.isdisjoint({*HEAVY, "omegaconf", "numpy", "Bio", "yaml"})
    for verb, about in VERBS.items():
        assert verb in text
        assert " ".join(about.split()[:5]) in " ".join(text.split())


def test_help_of_fit_lists_every_key_with_its_meaning_and_imports_nothing_heavy():
    packages, text = imported_by("fit", "--help")
    assert packages.isdisjoint(HEAVY)
    words = " ".join(text.split())
    for section, name, about in described_keys():
        assert f" {section}.{name}: " in words
        assert " ".join(about["meaning"].split()) in words
    assert "deepspeed.*" in words


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "fit"])
def test_help_of_a_verb_imports_nothing_heavy(verb):
    packages, text = imported_by(verb, "--help")
    assert packages.isdisjoint(HEAVY)
    assert text.startswith(f"usage: longseq {verb} ")


def test_the_version_is_told():
    from longseq import __version__

    done = longseq("--version")
    assert (done.returncode, done.stdout) == (0, f"longseq {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: VERB"),
        (["fot"], "invalid choice: 'fot'"),
        (["fit"], "the following arguments are required: config\n"),  # and no override
        (["fit", "small.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["fit", "small.yaml", "run.name=x", "--fast=yes"], "unrecognized arguments: --fast=yes"),
        (["data"], "the following arguments are required: ACTION"),
        (["data", "synth", "a.fasta", "records=3"], "unrecognized arguments: records=3"),
        (["evaluate", "one", "--split", "tset"], "invalid choice: 'tset'"),
    ],
)
def test_a_command_that_is_not_understood_shows_its_usage_and_exits_with_2(folder, arguments, sentence):
    done = longseq(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: longseq")
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "missing.yaml"], "missing.yaml: no such file"),
        (["fit", "small.yaml", "trainer.device=2"], "unknown key 'trainer.device'"),
        (["fit", "small.yaml", "trainer.devices"], "an override is section.key=value"),
        (["resume", "runs/none"], "runs/none: no such run folder"),
        (["evaluate", "."], ".: not a run folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line_without_a_traceback(folder, arguments, sentence):
    assert sentence in refused(longseq(*arguments))


def test_overrides_may_stand_before_and_after_options(run, publish):
    publish(3)
    for arguments in (["model.dmi=1", "--json"], ["--json", "model.dmi=1"], ["run.seed=1", "--json", "model.dmi=1"]):
        assert "argument 'model.dmi=1': unknown key" in refused(longseq("evaluate", str(run.path), *arguments))


def test_data_synth_writes_a_corpus_once(folder):
    arguments = ["data", "synth", "new/corpus.fasta.gz", "--families", "3", "--records", "7", "--max-length", "400"]
    done = longseq(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("new/corpus.fasta.gz: 7 records of 3 families, ")
    path = Path("new/corpus.fasta.gz")
    content = path.read_bytes()
    assert gzip.decompress(content).count(b">") == 7

    assert "new/corpus.fasta.gz exists already" in refused(longseq(*arguments))
    assert path.read_bytes() == content
    assert longseq(*arguments, "--seed", "1", "--overwrite").returncode == 0
    assert path.read_bytes() != content
    assert [p.name for p in path.parent.iterdir()] == ["corpus.fasta.gz"]


def test_data_synth_plants_contacts(folder):
    done = longseq(
        "data", "synth", "new/p.fasta.gz", "--contacts", "--records", "5", "--length", "16", "--families", "2"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "new/p.fasta.gz: 5 records of 2 families, 80 residues"
    assert re.fullmatch(r"new/p\.contacts\.jsonl: their contacts; the true parameters find \d+\.\d% of them .*", second)
    assert len(Path("new/p.contacts.jsonl").read_text().splitlines()) == 26
    sentence = refused(longseq("data", "synth", "q.fasta", "--contacts", "--mean-length", "90"))
    assert "--mean-length and --contacts: leave one of them out; its families are of one --length." in sentence
    assert "--coupling needs --contacts, which draws" in refused(longseq("data", "synth", "q.fasta", "--coupling", "1"))
    assert "length is 8" in refused(longseq("data", "synth", "q.fasta", "--contacts", "--length", "8"))
    assert not Path("q.fasta").exists()


def test_data_synth_refuses_numbers_that_make_no_corpus(folder):
    sentence = refused(longseq("data", "synth", "a.fasta", "--families", "9", "--records", "3"))
    assert "9" in sentence
    assert "3" in sentence
    assert not Path("a.fasta").exists()
