"""``longseq score`` and ``embed`` against plain loops over the model."""

from __future__ import annotations

import json
import os
import random
import stat

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from longseq.errors import LongseqError
from longseq.evaluation.embed import embed
from longseq.evaluation.hidden_vectors import _embedded, _Pooling
from longseq.evaluation.records import Record
from longseq.evaluation.vector_options import Wanted
from longseq.trained_model import find
from longseq_data.tokenization import load_tokenizer, save_tokenizer, train_tokenizer
from longseq_data.vocabulary import BOS, EOS, LETTERS, MASK

WILD = "MKVLAACDEFGHIKLMNPQ"


def ids(sequence):
    return [BOS, *(LETTERS.index(letter) for letter in sequence), EOS]


def log_probabilities(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0].double().log_softmax(-1)


def exact(model, sequence):
    tokens = ids(sequence)
    return sum(float(row[token]) for row, token in zip(log_probabilities(model, tokens[:-1]), tokens[1:], strict=True))


def marginals(model, sequence, hidden):
    """Log-probabilities of one sequence with some residues (from 1) masked."""
    tokens = ids(sequence)
    for at in hidden:
        tokens[at] = MASK
    return log_probabilities(model, tokens)


def table(text):
    head, *rows = (line.split("\t") for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def wild(folder):
    (folder / "wild.fasta").write_text(f">wild type\n{WILD}\n")
    return folder / "wild.fasta"


def test_causal_scores_are_exact_log_likelihoods_of_residues_and_end(trained, longseq, folder):
    run = trained()
    (folder / "some.fasta").write_text(">a\nMKV\n>low\nmkvla\n>stop\nMKVLA*\n")
    rows = json.loads(longseq("score", run, "some.fasta", "--json"))
    model = find(run).load()
    assert [row["id"] for row in rows] == ["a", "low", "stop"]
    for row, sequence in zip(rows, ("MKV", "MKVLA", "MKVLA"), strict=True):  # lower case and a final stop mean the same
        assert row["log_likelihood"] == pytest.approx(exact(model, sequence), abs=1e-4)
        assert row["perplexity"] == pytest.approx(np.exp(-row["log_likelihood"] / (len(sequence) + 1)))


@pytest.mark.parametrize("overrides", [["crop"], ["concat"], ["concat", "data.reset=true"]])
def test_evaluate_and_score_give_a_record_the_same_likelihood(trained, longseq, wild, overrides):
    packing, *reset = overrides
    run = trained("one", f"data.packing={packing}", *reset)
    (row,) = json.loads(longseq("score", run, wild, "--json"))
    found = json.loads(longseq("evaluate", run, "--data", wild, "--json"))["splits"]["wild.fasta"]
    assert found["targets"] == len(WILD) + 1
    assert found["loss"] * found["targets"] == pytest.approx(-row["log_likelihood"], rel=1e-6)


def test_masked_scores_hide_each_residue_in_turn(trained, longseq, wild):
    run = trained("masked", "model.objective=masked")
    model, tokens = find(run).load(), ids(WILD)
    (row,) = table(longseq("score", run, wild))
    expected = sum(float(marginals(model, WILD, [at])[at, tokens[at]]) for at in range(1, len(WILD) + 1))
    assert float(row["pseudo_log_likelihood"]) == pytest.approx(expected, abs=1e-3)
    (row,) = table(longseq("score", run, wild, "--passes", 3))
    groups = [range(first, len(WILD) + 1, 3) for first in (1, 2, 3)]
    expected = sum(float(marginals(model, WILD, group)[at, tokens[at]]) for group in groups for at in group)
    assert float(row["pseudo_log_likelihood"]) == pytest.approx(expected, abs=1e-3)


def test_causal_effects_are_differences_of_log_likelihoods(trained, longseq, wild, folder):
    run = trained()
    model = find(run).load()
    (folder / "variants.txt").write_text("# mine\nC7G\n\nA5G:A6V  # two changes\n")
    rows = table(longseq("score", run, wild, "--variant", "m1l", "--variants", "variants.txt"))
    mutants = {"m1l": "L" + WILD[1:], "C7G": WILD[:6] + "G" + WILD[7:], "A5G:A6V": WILD[:4] + "GV" + WILD[6:]}
    assert [row["variant"] for row in rows] == list(mutants)
    for row, mutant in zip(rows, mutants.values(), strict=True):
        assert float(row["effect"]) == pytest.approx(exact(model, mutant) - exact(model, WILD), abs=1e-4)


def test_masked_effects_are_marginals_with_all_sites_hidden(trained, longseq, wild):
    run = trained("masked", "model.objective=masked")
    rows = table(longseq("score", run, wild, "--variant", "A5G:C7V"))
    found = marginals(find(run).load(), WILD, [5, 7])
    a, g, c, v = (LETTERS.index(letter) for letter in "AGCV")
    expected = float(found[5, g] - found[5, a] + found[7, v] - found[7, c])
    assert float(rows[0]["effect"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ("A7G", "A7G does not fit: position 7 of wild is C, not A"),
        ("A24G", "A24G does not fit: wild has 19 residues, and no position 24"),
        ("A5G:A5V", "A5G:A5V changes position 5 (A) twice"),
        ("A5", "'A5' is no change of a residue"),
        ("J5G", "'J5G' is no change of a residue"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused(trained, refused, wild, folder, variant, sentence):
    """By its place, position and residue."""
    (folder / "variants.txt").write_text(f"C7G\n{variant}\n")
    said = refused("score", trained(), wild, "--variants", "variants.txt")
    assert f"variants.txt, line 2: {sentence}" in said


def test_models_of_a_tokenizer_score_embed_and_write_its_tokens(trained, longseq, folder):
    """A special token's name in a text is text."""
    text = "The quick brown fox jumps over the lazy dog; <eos> is no end here. Größe ☃ " * 20
    (folder / "book.txt").write_text(text)
    tokenizer = train_tokenizer([text], "bpe", 300)
    save_tokenizer(tokenizer, folder / "words.json")
    run = trained("words", "data.train=book.txt", "data.test=book.txt", "data.tokenizer=words.json")
    (folder / "short.txt").write_text("fox <eos> ☃")
    source = find(run)
    tokens = [source.begins, *tokenizer_ids("fox <eos> ☃", folder), source.vocabulary.eos]
    rows = log_probabilities(source.load(), tokens[:-1])
    expected = sum(float(row[token]) for row, token in zip(rows, tokens[1:], strict=True))
    (scored,) = table(longseq("score", run, "short.txt"))
    assert int(scored["length"]) == len(tokens) - 2
    assert float(scored["log_likelihood"]) == pytest.approx(expected, abs=1e-4)
    longseq("embed", run, "short.txt", "--per-residue", "--out", "v.npz")
    assert np.load("v.npz")["residues"].shape == (len(tokens) - 2, 32)
    _, written = longseq("sample", run, "--prompt", "fox <eos> ☃", "--length", 5).split("\n", 1)
    assert written.startswith("fox <eos> ☃")


def tokenizer_ids(text, folder):
    return load_tokenizer(str(folder / "words.json")).encode(text, add_special_tokens=False).ids


def test_a_file_without_any_variant_is_refused(trained, refused, wild, folder):
    (folder / "variants.txt").write_text("# none yet\n\n")
    assert "variants.txt: names no variant" in refused("score", trained(), wild, "--variants", "variants.txt")
    (folder / "table.csv").write_text("mutant,score\nM1A,0.5\n")
    sentence = refused("score", trained("two"), wild, "--variants", "table.csv")
    assert "table.csv, line 1: 'mutant' is a table's header: a deep mutational scan is a .csv with" in sentence


def test_passes_without_effect_are_refused(trained, refused, wild):
    causal, masked = trained(), trained("masked", "model.objective=masked")
    assert "passes=3: a causal model" in refused("score", causal, wild, "--passes", "3")
    assert "--passes" in refused("score", masked, wild, "--passes", "3", "--variant", "M1A")


def test_results_take_the_place_of_files_alone(trained, longseq, refused, wild, folder):
    """Not of a folder, nor of a pipe or /dev/null; and a link goes on pointing to its file."""
    run = trained()
    (folder / "results.npz").mkdir()
    os.mkfifo(folder / "pipe")
    assert "results.npz: a folder" in refused("score", run, wild, "--out", "results.npz")
    assert "results.npz: a folder" in refused("embed", run, wild, "--out", "results.npz")
    assert "pipe: a pipe or a device" in refused("score", run, wild, "--out", "pipe")
    assert "stdout: a pipe or a device" in refused("score", run, wild, "--out", "/dev/stdout")
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    (folder / "link.tsv").symlink_to("file.tsv")
    longseq("score", run, wild, "--out", "link.tsv")
    assert (folder / "link.tsv").is_symlink()
    assert (folder / "file.tsv").read_text().startswith("id\tlength")


def test_variants_need_one_wild_type(trained, refused):
    assert "more than one record" in refused("score", trained(), "proteins.fasta", "--variant", "M1A")


def test_inner_stops_are_read_as_x_and_said(trained, capsys, folder):
    from longseq.cli import main

    run = trained()
    (folder / "stops.fasta").write_text(">a\nMK*VL\n")
    assert main(["score", str(run), "stops.fasta"]) == 0
    shown = capsys.readouterr()
    assert "read as X: '*' × 1" in shown.err
    assert float(table(shown.out)[0]["log_likelihood"]) == pytest.approx(exact(find(run).load(), "MKXVL"), abs=1e-4)
    assert main(["score", str(run), "stops.fasta", "data.strict=true"]) == 1
    assert "'*' in record 'a' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "options"), [(None, ()), (0, ()), (1, ()), (1, ("model.block=modern",)), (None, ("model.block=modern",))]
)
def test_embeddings_are_the_models_vectors_of_the_residues(trained, longseq, folder, layer, options):
    run = trained("one", *options)
    words = [] if layer is None else ["--layer", layer]
    for suffix in ("npz", "parquet"):
        longseq("embed", run, "test.fasta", "--per-residue", "--out", f"vectors.{suffix}", *words)
    arrays = np.load(folder / "vectors.npz", allow_pickle=False)
    rows = pq.read_table(folder / "vectors.parquet").to_pylist()
    assert arrays["ids"].tolist() == [row["id"] for row in rows] == [f"t{i}" for i in range(30)]
    assert arrays["length"].tolist() == [row["length"] for row in rows] == [3 * i + 1 for i in range(30)]
    starts = np.cumsum([0, *arrays["length"]])
    model = find(run).load()
    sequences = (folder / "test.fasta").read_text().splitlines()[1::2]
    for number in (0, 1, 17, 29):
        tokens = torch.tensor([ids(sequences[number])])
        with torch.no_grad():
            x, first = model.embedding(tokens), ()
            for block in model.blocks[: 2 if layer is None else layer]:
                found = block(x, None, None, model._rotary(torch.arange(tokens.shape[1])), *first)
                x, *first = found if options else (found,)
            x = (model.norm(x) if layer is None else x)[0, 1:-1].numpy()
        scale = np.abs(x).max()
        np.testing.assert_allclose(arrays["residues"][starts[number] : starts[number + 1]], x, atol=1e-5 * scale)
        np.testing.assert_allclose(arrays["mean"][number], x.mean(0), atol=1e-5 * scale)
        np.testing.assert_allclose(rows[number]["residues"], x, atol=1e-5 * scale)
        np.testing.assert_allclose(rows[number]["mean"], x.mean(0), atol=1e-5 * scale)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("pool", ["mean", "bos", "max"])
def test_pools_and_layers_are_those_of_the_models_vectors(trained, longseq, folder, pool, suffix):
    """One record is longer than a batch, and is read in tiles."""
    run = trained("one", "model.sequence_tile=512", *(("model.objective=masked",) if pool == "bos" else ()))
    layers = (None, 2, 1) if pool == "bos" else (None, 0, 1)
    said = ["last" if layer is None else str(layer) for layer in layers]
    rng = random.Random(2)
    records = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=length)) for length in (7, 5000, 90)]
    (folder / "some.fasta").write_text("".join(f">r{i}\n{record}\n" for i, record in enumerate(records)))
    words = ("embed", run, "some.fasta", "--pool", pool, "--layers", ",".join(said), "--per-residue")
    longseq(*words, "--out", f"v.{suffix}")
    longseq(*words, "--out", f"half.{suffix}", "--dtype", "float16")
    wide, half = (
        dict(np.load(name)) if suffix == "npz" else pq.read_table(name).to_pydict()
        for name in (f"v.{suffix}", f"half.{suffix}")
    )
    names = [f"{what}_{layer}" for what in (pool, "residues") for layer in said]
    assert list(wide) == list(half) == [*(("ids",) if suffix == "npz" else ("id",)), "length", *names]
    model = find(run, ["model.sequence_tile=0"]).load()
    for name, layer in zip(said, layers, strict=True):
        before = 0
        for number, record in enumerate(records):
            with torch.no_grad():
                x = model.hidden(torch.tensor([ids(record)]), layer=layer)[0].numpy()
            own = x[1:-1]
            wanted = {"mean": own.mean(0), "max": own.max(0), "bos": x[0]}[pool]
            np.testing.assert_allclose(wide[f"{pool}_{name}"][number], wanted, atol=2e-5 * np.abs(x).max())
            found = wide[f"residues_{name}"]
            found = found[before : before + len(own)] if suffix == "npz" else found[number]
            np.testing.assert_allclose(found, own, atol=2e-5 * np.abs(x).max())
            before += len(own)
        rounded = np.asarray(wide[f"{pool}_{name}"], np.float16)
        assert np.array_equal(np.asarray(half[f"{pool}_{name}"], np.float16), rounded)
    if suffix == "npz":
        assert half[f"{pool}_1"].dtype == half["residues_last"].dtype == np.float16


def test_ids_are_as_given_or_numbered_where_they_repeat(trained, longseq, folder):
    run, given = trained(), ["a", "b", "a", "a.2", "a", "c"]
    (folder / "twice.fasta").write_text("".join(f">{name}\nMKV{'A' * at}\n" for at, name in enumerate(given)))
    longseq("embed", run, "twice.fasta", "--out", "v.npz")
    assert np.load("v.npz")["ids"].tolist() == given
    longseq("embed", run, "twice.fasta", "--out", "v.npz", "--ids", "numbered")
    assert np.load("v.npz")["ids"].tolist() == ["a", "b", "a.3", "a.2", "a.4", "c"]


def test_vectors_that_there_are_not_are_refused(trained, refused):
    run = trained()
    for words, said in (
        (("--layers", "1,9"), "layer=9: one has 2 blocks; take 0 to 2"),
        (("--layers", "1,1"), "layers=1,1: give each layer once"),
        (("--layers", "1", "--layer", "1"), "layer=1 and layers=1: give one of them"),
        (("--pool", "bos"), "pool=bos: one is causal, and the token before a record sees nothing of it"),
    ):
        assert said in refused("embed", run, "test.fasta", "--out", "out.npz", *words)
    masked = trained("both", "model.objective=masked")
    words = "--pool", "bos", "--layers", "last,0"
    assert "in layer 0 the token before a record is the same for all" in refused(
        "embed", masked, "test.fasta", "--out", "out.npz", *words
    )
    (one, *_), (other, *_) = (embed(masked, "test.fasta", layers=(last,), pool="max") for last in ("last", None))
    assert np.array_equal(one.residues, other.residues)
    assert one.residues.shape == (1, one.length, one.pooled.shape[1])
    assert np.array_equal(one.pooled, one.residues.max(1))
    with pytest.raises(AttributeError, match=r"pool=max was asked for, and no mean: take \.pooled"):
        one.mean  # noqa: B018


def test_numbers_too_large_for_half_precision_are_refused(trained):
    rows, record = np.full((4, 3), 70_000.0, np.float32), Record("r7", np.zeros(4, np.uint8))
    (pooling,) = _Pooling.of(record, Wanted(layers=(2,), dtype="float16"), 3)
    said = r"dtype=float16: the vectors of r7, layer 2, have numbers above its largest, 65,504; take float32"
    with pytest.raises(LongseqError, match=said):
        pooling.add(0, rows)
    (pooling,) = _Pooling.of(record, Wanted(dtype="float16", per_residue=False), 3)
    pooling.add(0, rows)
    with pytest.raises(LongseqError, match="the vectors of r7, layer last, have"):
        pooling.pooled()


def test_vectors_of_a_record_are_held_once():
    """Tiles of two layers fill the array that is handed out."""
    x = np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float32)
    read = _Pooling.of(Record("r", np.zeros(12, np.uint8)), Wanted(layers=(1, 2), several=True), 3)
    for rows, pooling in zip(x, read, strict=True):
        for start, stop in ((0, 1), (1, 7), (7, 11), (11, 12)):
            pooling.add(start, rows[start:stop])
    found = _embedded(Record("r", np.zeros(12, np.uint8)), read)
    assert np.array_equal(found.residues, x[:, 1:11])
    assert all(pooling.kept.base is found.residues for pooling in read)


def test_memory_of_an_embedding_does_not_grow_with_the_sequences(folder):
    """What is read and what is held stay within a row group of each other."""
    from longseq.evaluation import embedding_files
    from longseq.evaluation.vector_options import Embedded

    read, behind = 0, []

    class Counted(Embedded):
        @property
        def residues(self):
            behind.append(read - int(self.identifier))
            return np.full((3, 4), int(self.identifier), np.float32)

    def items():
        nonlocal read
        for number in range(2000):
            read += 1
            yield Counted(str(number), 3, np.full(4, number, np.float32))

    assert embedding_files.write_parquet(items(), folder / "v.parquet", 4, Wanted()) == 2000
    assert max(behind) <= 257
    assert pq.read_table(folder / "v.parquet")["mean"][1999].as_py() == [1999.0] * 4


def test_an_embedding_that_fails_leaves_no_file(trained, refused, folder):
    run = trained()
    (folder / "bad.fasta").write_text(">a\nMKV\n>nothing\n")
    assert "bad.fasta, line 3" in refused("embed", run, "bad.fasta", "--out", "out.npz")
    assert ".parquet or .npz" in refused("embed", run, "test.fasta", "--out", "out.csv")
    assert "take 0 to 2" in refused("embed", run, "test.fasta", "--out", "out.npz", "--layer", "3")
    assert not list(folder.glob("*out*"))


def test_results_never_replace_what_they_are_of(trained, refused, folder):
    run = trained("one", "model.objective=masked")
    (folder / "wild.fasta").write_text(">wild\nMK?V\n")
    (folder / "one.fasta").write_text(">one\nMKV\n")
    (folder / "changes").write_text("M1A\n")
    (folder / "link.fasta").symlink_to("wild.fasta")
    for words in (
        ("score", run, "test.fasta", "--passes", "1", "--out", folder / "test.fasta"),
        ("score", run, "one.fasta", "--variants", "changes", "--out", "changes"),
        ("sample", run, "--infill", "wild.fasta", "--out", "link.fasta"),
    ):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert "the file that is read, and results would replace it" in refused(*words)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
