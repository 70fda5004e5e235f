"""Relatives in the context of a causal model: scores and samples against one plain pass over everything."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import tables
from longseq.data import split_spec
from longseq.errors import LongseqError
from longseq.evaluation.context import Asked, contexts, read
from longseq.evaluation.generation import Settings, draw
from longseq.evaluation.likelihood import causal
from longseq.evaluation.sample import sample
from longseq.evaluation.score import score, variant_effects
from longseq.trained_model import find
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.fasta import read_records
from longseq_data.samples.rank_share import Share
from longseq_data.vocabulary import BOS, EOS, LETTERS, PROTEIN

from .test_any_length import build, named, reference

pytestmark = pytest.mark.usefixtures("one_thread")

RELATIVES = ["MKLVWY", "AACDEFGHIK", "WWYYVVTTSS", "PQRSTVWYAC"]


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def plain(context: list[int], sequence: str, **options) -> float:
    """Σ log p of a sequence and its end behind a context, by one pass in float64."""
    tokens = np.array([*context, *ids(sequence), EOS])
    found = reference(tokens[:-1], **options).numpy()
    return float(sum(found[place - 1, tokens[place]] for place in range(len(context), len(tokens))))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequence_tile": 4},
        {"sequence_tile": 4, "window": 3, "learned_share": True, "conv": 3},
        {"kind": "exact"},
        {"window": 40},
        {"sequence_tile": 6, "window": 5},
        {"sequence_tile": 8, "window": 2, "forget_gate": True},
        {"sequence_tile": 5, "kernel": "elu", "mask_scaling": True},
        {"sequence_tile": 7, "kernel": "gelu"},
    ],
    ids=named,
)
def test_a_context_read_once_scores_as_one_pass_over_everything(options):
    context = np.array([BOS, *ids("MKLVWY"), EOS, *ids("AACDEFGHIK"), EOS], dtype=np.uint8)
    model = build(**options)
    behind = read(model, [context])
    rows = [np.array([BOS, *ids(text), EOS], dtype=np.uint8) for text in ("MKLVW", "A", "WWWWYYYYVVVVTTTT")]
    own = {key: value for key, value in options.items() if key != "sequence_tile"}
    wanted = [plain(context.tolist(), text, **own) for text in ("MKLVW", "A", "WWWWYYYYVVVVTTTT")]
    for _ in range(2):  # what was read stays as it is
        assert causal(model, PROTEIN, rows, behind) == pytest.approx(wanted, rel=2e-6)
    assert causal(model, PROTEIN, rows[2:], behind) == pytest.approx(wanted[2:], rel=2e-6)
    without = causal(model, PROTEIN, rows)
    assert abs(np.array(without) - wanted).min() > 1e-3
    drawn = next(iter(draw(model, PROTEIN, BOS, ids("MK"), 1, Settings(5, seed=2), context=context)))
    whole = plain(context.tolist(), "MK" + "".join(LETTERS[token] for token in drawn.tokens[2:]), **own)
    end = 0.0 if drawn.ended else _end(context, drawn.tokens, own)
    assert drawn.log_likelihood == pytest.approx(whole - end, rel=1e-5)


def _end(context: np.ndarray, tokens: np.ndarray, options: dict) -> float:
    return float(reference(np.array([*context, *tokens]), **options)[-1, EOS])


@pytest.fixture
def relatives(folder: Path) -> Path:
    path = folder / "relatives.a3m"
    rows = [RELATIVES[0], RELATIVES[1].lower(), "-".join(RELATIVES[2]), f"..{RELATIVES[3]}--"]
    path.write_text("#6\t1\n>ss_pred\nCCHHH\n" + "".join(f">r{number}\n{row}\n" for number, row in enumerate(rows)))
    return path


def test_relatives_of_an_alignment_are_whole_and_come_in_other_orders(trained, relatives):
    source = find(trained("family", "model.objective=causal"))
    found = contexts(source, Asked(str(relatives), 0, 40))
    first = set()
    for row in found:
        assert row[0] == source.begins
        assert row[-1] == EOS
        text = "".join(LETTERS[token] if token < len(LETTERS) else "|" for token in row[1:-1].tolist())
        assert Counter(text.split("|")) == Counter(RELATIVES)
        first.add(text.split("|")[0])
    assert first == set(RELATIVES)
    for row in contexts(source, Asked(str(relatives), 20, 40)):  # as many as fit
        assert len(row) in (12, 19)
    with pytest.raises(LongseqError, match=r"the shortest relative takes 7 tokens, and the context has 7: give it 8"):
        contexts(source, Asked(str(relatives), 7, 1))


def test_scores_effects_and_samples_with_a_context_by_the_command_line(trained, relatives, folder, longseq, refused):
    run = trained("family", "model.objective=causal")
    model, source = find(run).load("cpu"), find(run)
    words = ("--context", relatives, "--context-orders", 3, "trainer.accelerator=cpu")
    rows = json.loads(longseq("score", run, "test.fasta", "--json", *words))
    behind = contexts(source, Asked(str(relatives), 0, 3))
    for record in (rows[0], rows[7], rows[29]):
        ((sequence,),) = [
            [
                part.partition("\n")[2]
                for part in Path("test.fasta").read_text().split(">")
                if part.startswith(f"{name}\n")
            ]
            for name in [record["id"]]
        ]
        sequence = sequence.replace("\n", "")
        each = []
        for context in behind:
            tokens = torch.tensor([*context.tolist(), *ids(sequence), EOS])
            with torch.inference_mode():
                found = model(tokens[None, :-1]).double()[0].log_softmax(-1)
            each.append(float(found.gather(1, tokens[1:, None])[len(context) - 1 :].sum()))
        assert record["log_likelihood"] == pytest.approx(np.mean(each), rel=1e-5)
    (folder / "wild.fasta").write_text(">w\nMKLVWYAC\n")
    (folder / "both.fasta").write_text(">w\nMKLVWYAC\n>m\nMKLAWYAC\n")
    (effect,) = variant_effects(run, "wild.fasta", ["V4A"], context=relatives, context_orders=3)
    wild, mutant = (each.log_likelihood for each in score(run, "both.fasta", context=relatives, context_orders=3))
    assert effect.effect == pytest.approx(mutant - wild, rel=1e-6)
    ours, bare = (
        [each.text for each in sample(run, number=3, length=20, seed=4, **how)] for how in ({"context": relatives}, {})
    )
    assert ours != bare
    printed = longseq("sample", run, "--number", 3, "--length", 20, "--seed", 4, "--context", relatives)
    assert [part.split("\n", 1)[1].replace("\n", "") for part in printed.split(">")[1:]] == ours
    before = relatives.read_bytes()
    assert "the file that is read" in refused("score", run, "test.fasta", "--context", relatives, "--out", relatives)
    assert relatives.read_bytes() == before
    assert "name its file" in refused("score", run, "test.fasta", "--context-tokens", 5)
    masked = trained("masked", "model.objective=masked")
    assert "a masked model reads both sides" in refused("score", masked, "test.fasta", "--context", relatives)


def test_what_a_context_holds_is_said_and_records_that_are_in_it(trained, relatives, capsys):
    run = trained("family", "model.objective=causal")
    text = ">a\nMKLVWY\n>b\nMKLVWYA\n>c\nPQRSTVWYAC\n"
    Path("own.fasta").write_text(text)
    list(score(run, "own.fasta", context=relatives, context_orders=9, context_tokens=20))
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"{relatives}: 2 of 4 relatives, in 20 tokens at most",
        f"longseq: warning: own.fasta: 2 of its sequences are in {relatives}, too, and have then been read before they "
        "are scored",
    ]
    Path("odd.a3m").write_text(">a\nMK1ZZ\n>b\nmk-j1\n")
    list(sample(run, length=2, context="odd.a3m"))
    assert capsys.readouterr().err.splitlines() == [
        "odd.a3m: 2 of 2 relatives, in 48 tokens at most",
        "longseq: warning: odd.a3m: letters are read as X: '1' × 2, 'j' × 1",
    ]


def test_an_evaluation_of_families_tells_the_loss_by_the_members_before(trained, folder, longseq):
    draw = random.Random(3)
    names = [(f"c{c}_0", f"c{c}_{i}") for c in range(30) for i in range(1 + c % 5)]
    rows = "".join(f">{name}\n{''.join(draw.choices('ACDEFGHIKL', k=draw.randint(3, 20)))}\n" for _, name in names)
    (folder / "families.fasta").write_text(rows)
    (folder / "table.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in names))
    settings = {"split_by": "cluster", "clusters": str(folder / "table.tsv"), "valid_fraction": 0.1, "workers": 1}
    prepare(PrepareConfig([str(folder / "families.fasta")], str(folder / "corpus"), test_fraction=0.3, **settings))
    words = ("data.train=corpus", "data.test=[]", "data.packing=family", "data.clusters=table.tsv", "data.cache=cache")
    run = trained("families", "model.objective=causal", *words)
    report = json.loads(longseq("evaluate", run, "--split", "test", "--json", "--bootstrap", 0))["splits"]["test"]
    table = tables(folder / "corpus")["test"]["id"].to_pylist()
    assert report["targets"] == sum(
        len(record.sequence) + 1 for record in read_records("families.fasta") if record.identifier in table
    )
    model = find(run).load("cpu")
    loss, targets = np.zeros(12), np.zeros(12, np.int64)
    for make in split_spec(find(run).config, "test").evaluation(Share(1, 1, 0, 1)):
        row = make()["tokens"][0].astype(np.int64).tolist()
        wanted = make()["targets"][0].tolist()
        with torch.inference_mode():
            found = model(torch.tensor([row])).double()[0].log_softmax(-1)
        members = 0
        for place, target in enumerate(wanted):
            members += row[place] == EOS
            place_of = [0, 1, 2, 2, 3][min(members, 4)]
            loss[place_of] -= float(found[place, target])
            targets[place_of] += 1
    assert targets.sum() == report["targets"]
    before = report["by_members_before"]
    assert [(row["from"], row["to"]) for row in before] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert [row["targets"] for row in before] == targets[:4].tolist()
    assert [row["loss"] for row in before] == pytest.approx((loss[:4] / targets[:4]).tolist(), rel=1e-5)
    printed = longseq("evaluate", run, "--split", "test", "--details")
    assert f"{'before':>13}{'targets':>12}{'loss':>9}" in printed
    assert f"{'2–3':>13}{targets[2]:>12,}{loss[2] / targets[2]:>9.4f}" in printed
