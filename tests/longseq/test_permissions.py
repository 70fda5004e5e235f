"""Whatever is published has the mode that the user's umask gives, whichever library wrote it."""

from __future__ import annotations

import os
import stat

import pytest

from longseq.cli import main

pytestmark = pytest.mark.interfaces


@pytest.mark.parametrize(
    "umask", [pytest.param(0o022, marks=pytest.mark.long), 0o027, 0o077], ids=["022", "027", "077"]
)
def test_published_files_have_the_mode_of_the_umask(trained, folder, umask):
    before = os.umask(umask)
    try:
        run = trained("model.objective=masked", "data.packing=crop", "trainer.accelerator=cpu")
        commands = (
            ["export", run.path, "out"],
            ["evaluate", run.path, "--split", "train"],
            ["figures", run.path],
            ["embed", "out", "proteins.fasta", "--out", "vectors.parquet"],
            ["embed", "out", "proteins.fasta", "--out", "vectors.npz"],
            ["score", "out", "proteins.fasta", "--out", "scores.tsv"],
            ["data", "prepare", "prepare.yaml"],
            ["data", "synth", "synth.fasta.gz", "--families", "2", "--records", "9"],
            ["data", "tokenizer", "words.json", "book.txt", "--size", "270"],
        )
        (folder / "prepare.yaml").write_text("sources: [proteins.fasta]\noutput: corpus\n")
        (folder / "book.txt").write_text("the quick brown fox\n" * 50)
        for command in commands:
            assert main([str(part) for part in command]) == 0, command
    finally:
        os.umask(before)
    made = [path for path in folder.rglob("*") if not path.is_symlink()]
    given = {"proteins.fasta", "small.yaml"}  # by the fixture, before
    names = {path.name for path in made}
    assert {"model.safetensors", "vectors.parquet", "vectors.npz", "tokenizer.json", "words.json"} <= names
    for path in made:
        if path.name not in given:
            mode = 0o777 if path.is_dir() else 0o666
            assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path
