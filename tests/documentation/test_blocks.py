"""Every block of commands in the pages is run, with small sizes, or the page says why not."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from documentation.pages import ROOT, Block, blocks, written
from documentation.workshop import Hands, furnish
from longseq.runs.curves import read_curves
from longseq_data.vocabulary import LETTERS

pytestmark = pytest.mark.distributed

COMMANDS = ("bash", "python")
PAGES = [page for page in written() if any(b.language in COMMANDS and not b.reason for b in blocks(page))]


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Hands:
    return Hands(furnish(tmp_path_factory.mktemp("workshop")))


def test_every_block_has_a_language_and_those_not_run_have_a_reason():
    everything = [block for page in written() for block in blocks(page)]
    assert {block.language for block in everything} <= {*COMMANDS, "text", "yaml", "mermaid"}
    for block in everything:
        assert block.reason is None or (block.language in COMMANDS and len(block.reason) > 10), block.place
    fences = sum(len(re.findall(r"^```", page.read_text(), re.M)) for page in written())
    assert fences == 2 * len(everything)
    run = [block for block in everything if block.language in COMMANDS and not block.reason]
    assert len(run) > 35


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, hands: Hands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "here"
    shutil.copytree(hands.template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGSEQ_SITE", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "platform", ROOT / "pipelines"))))
    threads, names = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for block in blocks(page):
            if block.language in COMMANDS and not block.reason:
                run(block, hands, names, monkeypatch)
    finally:
        torch.set_num_threads(threads)
    AFTER.get(str(page.relative_to(ROOT)), lambda found: None)(names)


def run(block: Block, hands: Hands, names: dict[str, object], patch: pytest.MonkeyPatch) -> None:
    try:
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        else:
            hands.type(block.text, patch.setenv)
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            error.add_note(f"in {block.place}")
        raise


def batches_are_as_the_page_says(found: dict) -> None:
    assert found["tokens"].shape == found["targets"].shape
    assert found["tokens"].shape[0] == 32
    assert found["tokens"].dtype == torch.int64
    assert found["consumed"] == 32


def text_goes_on_from_the_prompt(found: dict) -> None:
    text = found["tokenizer"].decode(found["ids"][0], skip_special_tokens=True)
    assert text.startswith("MKV")
    assert set(text) <= set(LETTERS)


def the_output_has_the_shape_of_the_values(found: dict) -> None:
    assert found["out"].shape == found["v"].shape
    assert found["out"].isfinite().all()


# Of a corpus, fp16, several processes, labels, trainer.benchmarks; and gradient_noise/, which a key asks for.
RARE = {"train/epoch", "train/loss_scale", "time/slowest_rank", "time/slowest_ratio", "train/rmse", "valid/rmse"}
RARE |= {"time/benchmark_seconds"}


def the_page_of_curves_has_those_of_the_run(found: dict) -> None:
    page = (ROOT / "docs/reference/curves.md").read_text()
    names = {name for name in re.findall(r"`([a-z_]+/[a-zA-Z_]+)`", page) if not name.startswith("attention/")}
    shown = {re.sub("NN$", "00", name) for name in names} - {"tensorboard/evaluation"}
    written = set(read_curves(Path("runs/mine/tensorboard")))
    assert written - shown == set()
    assert {name for name in shown - written if not name.startswith("gradient_noise/")} == RARE


def the_page_of_the_run_folder_has_what_is_in_it(found: dict) -> None:
    page = (ROOT / "docs/reference/run-folder.md").read_text()
    named = set(re.findall(r"^  ([\w.]+)/?  ", page, re.MULTILINE))
    inside = {path.name for path in Path("runs/mine").iterdir() if not path.name.startswith(".")}
    assert inside - named == set()
    others = {"tokenizer.json", "branch.json", "loggers", "profiles", "figures", "slurm", "code", "STOPPED"}
    assert named - inside == others  # of other runs


def the_pages_of_a_run_have_what_it_has(found: dict) -> None:
    the_page_of_curves_has_those_of_the_run(found)
    the_page_of_the_run_folder_has_what_is_in_it(found)


AFTER = {
    "README.md": the_output_has_the_shape_of_the_values,
    "docs/how-to/attention.md": the_output_has_the_shape_of_the_values,
    "docs/how-to/data.md": batches_are_as_the_page_says,
    "docs/tutorials/proteins.md": the_pages_of_a_run_have_what_it_has,
    "docs/how-to/hugging-face.md": text_goes_on_from_the_prompt,
}
