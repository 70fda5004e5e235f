"""``longseq completion``: what bash completes, asked of bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from longseq.cli import VERBS
from longseq.commands.completion import script
from longseq.config.shipped import shipped

pytestmark = [
    pytest.mark.interfaces,
    pytest.mark.skipif(shutil.which("bash") is None, reason="no bash"),
]
ASK = """
source "$1"
COMP_WORDS=("${@:2}"); COMP_CWORD=$(( $# - 2 )); COMPREPLY=()
_longseq 2>/dev/null
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """completed(word, ...): what the last word may become after ``longseq``."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script").write_text(script("bash"))
    (folder / "mine.yaml").touch()

    def completed(*words: str) -> set[str]:
        command = ["bash", "-c", ASK, "bash", "./script", "longseq", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    return completed


def test_verbs_are_completed(completed):
    assert completed("") == set(VERBS)
    assert completed("ev") == {"evaluate"}
    assert {"prepare", "leaks", "synth"} <= completed("data", "")


def test_configurations_that_come_with_longseq_and_files_are_completed(completed):
    assert completed("fit", "protein/") == {name for name in shipped() if name.startswith("protein/")}
    assert completed("fit", "mi") == {"mine.yaml"}


def test_keys_are_completed_after_other_keys(completed):
    assert completed("fit", "mine.yaml", "optim.wa") == {"optim.warmup_steps="}
    # bash cuts words at '='
    assert completed("fit", "mine.yaml", "optim.warmup_steps", "=", "3", "trainer.max_st") == {"trainer.max_steps="}


def test_options_and_their_choices_are_completed(completed):
    assert completed("submit", "--dry") == {"--dry-run"}
    assert completed("submit", "mine.yaml", "--job", "p") == {"prepare"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_reads_its_script(tmp_path):
    (tmp_path / "_longseq").write_text(script("zsh"))
    subprocess.run(["zsh", "-n", tmp_path / "_longseq"], check=True)
