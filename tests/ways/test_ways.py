"""Every way through longseq with a tiny model: fit, resume, evaluate, score, sample, embed, export, figures.

What the commands find is held against plain loops (oracle.py) over what a plain reader finds in the files (sources.py).
Few ways that hold every pair of values (axes.py) run always, all of them with ``make test-long``.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from command_line import checkpoint, checkpoints, curve, weights_checksum
from longseq.evaluation.generation import Settings, draw
from longseq.trained_model import find
from longseq_data.readers.fasta import read_records
from ways import axes, oracle
from ways.axes import Way
from ways.sources import LENGTH, LETTERS, Source

SETTINGS = (
    *("model.dim=16", "model.depth=2", "model.heads=2", "model.ffn_dim=24", "model.dropout=0.1"),
    *("attention.features=8", "attention.redraw_every=2", f"data.length={LENGTH}", f"data.batch_tokens={4 * LENGTH}"),
    *("optim.lr=0.03", "optim.warmup_steps=1", "optim.schedule=constant", "run.seed=5"),
    *("trainer.strategy=single", "trainer.accelerator=cpu", "trainer.ema_decay=0.5", "trainer.peak_tflops=1"),
    *("trainer.valid_every=2", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9", "trainer.log_every=1"),
    *("trainer.probe_every=4", "trainer.sample_tokens=5"),
)
COVER = axes.cover()
REST = [way for way in axes.ways() if way not in COVER]


def test_the_cover_holds_every_pair_of_the_table_and_few_ways():
    def held(ways: list[Way]) -> set:
        return {pair for way in ways for pair in axes.pairs(way)}

    assert held(COVER) == held(axes.ways())
    assert axes.cover() == COVER
    assert len(COVER) < len(axes.ways()) / 8


@pytest.mark.parametrize("way", COVER, ids=axes.name)
def test_a_way_gives_what_plain_loops_give(way, data, here, longseq, refused):
    go(way, data(way["source"], way["records"]), here, longseq, refused)


@pytest.mark.long
@pytest.mark.parametrize("way", REST, ids=axes.name)
def test_every_other_way_gives_what_plain_loops_give(way, data, here, longseq, refused):
    go(way, data(way["source"], way["records"]), here, longseq, refused)


def go(way: Way, source: Source, folder: Path, longseq: Callable[..., str], refused: Callable[..., str]) -> None:
    """All verbs, one after the other."""
    words = [*source.keys, *(source.family if way["packing"] == "family" else ()), *SETTINGS, *axes.settings(way)]
    longseq("fit", "empty.yaml", *words, "run.name=whole", "trainer.max_steps=5")
    longseq("fit", "empty.yaml", *words, "run.name=two", "trainer.max_steps=3")
    longseq("resume", "runs/two", "trainer.max_steps=5")
    resumed_as_if_never_stopped(folder)
    evaluated(way, source, longseq)
    if "pixels" in way["source"]:
        no_file_of_pixels(way, longseq, refused)
    else:
        scored(way, source, longseq)
        embedded(way, source, longseq)
        sampled(way, source, longseq, refused)
    exported(way, source, folder, longseq)
    pictured(longseq)


def resumed_as_if_never_stopped(folder: Path) -> None:
    whole, two = folder / "runs/whole", folder / "runs/two"
    assert checkpoints(whole) == [2, 4, 5]
    assert checkpoints(two) == [2, 3, 4, 5]
    for step in (2, 4, 5):
        assert weights_checksum(two, step) == weights_checksum(whole, step), step
        ours, theirs = (load_file(checkpoint(run, step) / "ema.safetensors") for run in (two, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for tag in ("train/loss", "valid/loss"):
        assert curve(two, tag) == curve(whole, tag), tag
    assert load_file(checkpoint(whole, 5) / "model.safetensors").keys() == ours.keys()


def evaluated(way: Way, source: Source, longseq: Callable[..., str]) -> None:
    """Of the last weights on every split, of every checkpoint, and of the running mean."""
    splits = ("train", "valid", "test")
    chosen = [word for split in splits for word in ("--split", split)]
    report = json.loads(longseq("evaluate", "runs/two", *chosen, "--json", "--bootstrap", 9))
    assert report["step"] == 5
    infill = ("#infill",) if way["objective"] == "fim" else ()
    behind = {split: (*(f"/{part}" for part in source.parts.get(split, ())), *infill) for split in splits}
    splits = [name for split in splits for name in (split, *(split + part for part in behind[split]))]
    assert list(report["splits"]) == splits
    for split in splits:
        held(report["splits"][split], way, source, split, find(Path("runs/two")))
    if way["records"] == "one" or (way["objective"] != "masked" and way["packing"] != "concat"):
        # While training: of a sample of the split, drawn in an order of its own that masks and joins depend on.
        opened = find(checkpoint(Path("runs/two"), 4))
        plain = oracle.scores(opened.load("cpu"), opened.vocabulary, way, source, "valid", seed=5)
        assert curve(Path("runs/two"), "valid/loss")[4] == pytest.approx(plain.loss, rel=2e-5)
        for part in source.parts.get("valid", ()):
            plain = oracle.scores(opened.load("cpu"), opened.vocabulary, way, source, f"valid/{part}", seed=5)
            assert curve(Path("runs/two"), f"valid/{part}/loss")[4] == pytest.approx(plain.loss, rel=2e-5)
    every = json.loads(longseq("evaluate", "runs/two", "--all-checkpoints", "--json", "--bootstrap", 0))
    assert [one["step"] for one in every] == [2, 3, 4, 5]
    held(every[0]["splits"]["test"], way, source, "test", find(checkpoint(Path("runs/two"), 2)))
    mean = json.loads(longseq("evaluate", "runs/two", "--ema", "--json", "--bootstrap", 0))
    held(mean["splits"]["test"], way, source, "test", find(Path("runs/two"), ema=True))
    if source.file:
        file = json.loads(longseq("evaluate", "runs/two", "--data", source.file, "--json", "--bootstrap", 0))
        alone = {**way, "packing": "crop"} if way["packing"] == "family" else way  # no table knows a file's records
        held(file["splits"][source.file.name], alone, source, "test", find(Path("runs/two")))


def held(found: dict, way: Way, source: Source, split: str, opened) -> None:
    plain = oracle.scores(opened.load("cpu"), opened.vocabulary, way, source, split, seed=5)
    assert found["targets"] == plain.targets
    assert found["loss"] == pytest.approx(plain.loss, rel=2e-5)
    assert abs(found["accuracy"] * plain.targets - plain.right) <= plain.undecided + 1e-6
    if source.units and split == "test" and way["objective"] != "masked" and way["crop"] != "first":
        name = "bits_per_byte" if source.closed else "bits_per_dimension"
        assert found[name] == pytest.approx(plain.bits(source.units), rel=2e-5)
        if source.closed:
            assert found["bytes"] == source.units
            assert found["words"] == source.words


def scored(way: Way, source: Source, longseq: Callable[..., str]) -> None:
    behind: tuple[object, ...] = ()
    contexts: list[list[int] | None] = [None]
    if way["behind"] == "relatives":
        behind = ("--context", source.file, "--context-tokens", 40, "--context-orders", 2)
        contexts = [*oracle.contexts(way, source, 40, 2)]
    rows = json.loads(longseq("score", "runs/two", source.file, "--json", *behind))
    assert [row["id"] for row in rows] == source.identifiers
    model, kind = find(Path("runs/two")).load("cpu"), "pseudo_" if way["objective"] == "masked" else ""
    for row, document in zip(rows, source.documents["test"], strict=True):
        assert row["length"] == len(document)
        expected = np.mean([oracle.log_likelihood(model, way, source, document, before=first) for first in contexts])
        assert row[f"{kind}log_likelihood"] == pytest.approx(expected, rel=2e-5)


def embedded(way: Way, source: Source, longseq: Callable[..., str]) -> None:
    longseq("embed", "runs/two", source.file, "--out", "vectors.parquet")
    table = pq.read_table("vectors.parquet")
    assert table["id"].to_pylist() == source.identifiers
    model = find(Path("runs/two")).load("cpu")
    for found, document in zip(table["mean"].to_pylist(), source.documents["test"], strict=True):
        np.testing.assert_allclose(found, oracle.vector(model, way, source, document), atol=2e-5)


def sampled(way: Way, source: Source, longseq: Callable[..., str], refused: Callable[..., str]) -> None:
    if way["objective"] == "masked":
        assert "masked model" in refused("sample", "runs/two")
        if source.special.bos == 25:
            Path("holes.fasta").write_text(">a\n?\n>b\nMK?V\n")
            longseq("sample", "runs/two", "--infill", "holes.fasta", "--out", "filled.fasta")
            first, second = (record.sequence for record in read_records("filled.fasta"))
            assert (len(first), second[:2], second[3]) == (1, "MK", "V")
            assert {first, second[2]} <= set(LETTERS)
        if way["source"] == "dna":
            Path("holes.fasta").write_text(">a\nAu?n\n")
            longseq("sample", "runs/two", "--infill", "holes.fasta", "--out", "filled.fasta")
            (record,) = read_records("filled.fasta")
            assert (record.sequence[:2], record.sequence[3]) == ("AT", "N")
            assert record.sequence[2] in "ACGTN"
        return
    behind: tuple[object, ...] = ()
    before = None
    if way["behind"] == "relatives":
        behind = ("--context", source.file, "--context-tokens", 40)
        (before,) = oracle.contexts(way, source, 40, 1, seed=4)
    words = ("sample", "runs/two", *behind, "--number", 3, "--length", 12, "--seed", 4)
    text = longseq(*words)
    assert text == longseq(*words)
    assert text != longseq(*words[:-1], 5)
    assert text.count("sample-") == 3
    if way["objective"] == "fim" and way["source"] in ("fasta", "dna"):
        filled = longseq("sample", "runs/two", "--infill", "AC<gap>GT", "--length", 5, "--number", 2).splitlines()[1::2]
        assert all(line.startswith("AC") and line.endswith("GT") and len(line) <= 9 for line in filled), filled
    opened, settings = find(Path("runs/two")), Settings(12, seed=4)
    model = opened.load("cpu")
    context = None if before is None else np.array(before)
    drawn = list(draw(model, opened.vocabulary, oracle.begins(way, source), [], 3, settings, context=context))
    said = [float(word) for word in re.findall(r"log_likelihood=(\S+)", text)]
    for each, shown in zip(drawn, said, strict=True):
        assert all(token < source.special.ordinary for token in each.tokens)
        assert each.ended == (len(each.tokens) < 12)
        expected = oracle.log_likelihood(model, way, source, list(each.tokens), each.ended, before)
        assert shown == pytest.approx(expected, rel=2e-5, abs=1e-4)  # of which four digits are shown


def no_file_of_pixels(way: Way, longseq: Callable[..., str], refused: Callable[..., str]) -> None:
    for words in (("score",), ("embed", "--out", "vectors.parquet")):
        assert "pixels" in refused(words[0], "runs/two", "empty.yaml", *words[1:])
    assert "pixels" in refused("sample", "runs/two")


def exported(way: Way, source: Source, folder: Path, longseq: Callable[..., str]) -> None:
    transformers = importlib.import_module("transformers")
    importlib.import_module("longseq.huggingface")
    longseq("export", "runs/two", "out")
    kind = "AutoModelForMaskedLM" if way["objective"] == "masked" else "AutoModelForCausalLM"
    theirs = getattr(transformers, kind).from_pretrained("out").eval()
    model = find(Path("runs/two")).load("cpu")
    for document in source.documents["test"]:
        row = torch.tensor([[oracle.begins(way, source), *document][:50]])
        with torch.no_grad():
            assert torch.equal(theirs(input_ids=row).logits, model(row))
    if source.file:  # an exported folder knows how its model reads, and not how files are written
        form = [word for word in source.keys if word.startswith("data.format=")]
        words = (*form, "--data", source.file, "--json", "--bootstrap", 0)
        ours, again = (json.loads(longseq("evaluate", target, *words)) for target in ("runs/two", "out"))
        assert ours["splits"][source.file.name]["loss"] == again["splits"][source.file.name]["loss"]


def pictured(longseq: Callable[..., str]) -> None:
    names = longseq("figures", "runs/two").split()
    assert names
    for name in names:
        with Image.open(name) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 5
