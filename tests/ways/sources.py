"""Small data of every kind, and what a plain reader finds in them: the documents as tokens, in the order of the files.

Every split holds documents of one token, of two, of just a sequence's length, and longer than several sequences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corpora import by_sequence, tables
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.splits import split_of
from longseq_data.tokenization import save_tokenizer, train_tokenizer

LENGTH = 24  # data.length of every way
LETTERS = "ACDEFGHIKLMNPQRSTVWYBOUXZ"
SIDE = 5  # of an image: 75 values, so more than three sequences
SIZES = {"one": [1], "two": [2, 60], "many": [1, 2, 60, 23, 24, 25, 7, 90, 3, 48, 22, 1]}
# More sequences than `longseq evaluate` reads at once, 4,096 tokens: a batch that is full is made another way.
TRAIN = [1, 2, 100, 23, 24, 25, *range(3, 40)] * 5
TEXT = "the sea is deep and the night was öde ∑ long ago when a whale sang to us of cold water"


@dataclass(frozen=True)
class Special:
    bos: int
    eos: int
    mask: int
    ordinary: int  # ids below stand for data


@dataclass(frozen=True)
class Source:
    """Keys that name the data, and what a plain reader finds there."""

    keys: tuple[str, ...]
    special: Special
    documents: dict[str, list[list[int]]]  # of each split, ordinary tokens
    identifiers: list[str]  # of the test split
    file: Path | None  # the test split's records, for the verbs that take a file; None: of images
    units: int = 0  # bytes, or colour values, of the test split
    words: int = 0
    closed: bool = True  # whether a document ends with EOS
    # Of a split of several sources by name: how many of its documents each has, in order.
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    family: tuple[str, ...] = ()  # keys of data.packing=family
    clusters: dict[str, list[str]] = field(default_factory=dict)  # of each document, by the name of its cluster


def make(kind: str, records: str, folder: Path) -> Source:
    """The data of a way, in a new folder."""
    folder.mkdir(parents=True)
    sizes = {"train": TRAIN, "valid": SIZES[records], "test": SIZES[records]}
    makers = {"fasta": _fasta, "dna": _dna, "corpus": _corpus, "bytes": _lines, "tokenizer": _tokenizer}
    makers |= {"pixels": _pixels, "prepared text": _prepared_text, "prepared pixels": _prepared_pixels}
    return {**makers, "mixture": _mixture}[kind](folder, sizes)


_PROTEIN = Special(25, 26, 28, 25)
_DNA = Special(5, 6, 8, 5)
_BYTES = Special(256, 257, 259, 256)


def _keys(folder: Path, suffix: str) -> tuple[str, ...]:
    return tuple(f"data.{split}={folder / split}{suffix}" for split in ("train", "valid", "test"))


def _proteins(rng: random.Random, size: int) -> str:
    """Residues that are not all alike, so that there is something to learn."""
    return "".join(rng.choices(LETTERS, [9, 1, 5, 5, 3] * 5, k=size))


def _write_fasta(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(f">{name} what it does\n{text[:50]}\n{text[50:]}\n" for name, text in rows))


def _fasta(folder: Path, sizes: dict[str, list[int]]) -> Source:
    rng, documents, names = random.Random(1), {}, []
    for split, lengths in sizes.items():
        rows = [(f"{split}{i}", _proteins(rng, size)) for i, size in enumerate(lengths)]
        _write_fasta(folder / f"{split}.fasta", rows)
        documents[split] = [[LETTERS.index(letter) for letter in text] for _, text in rows]
        names = [name for name, _ in rows]
    return Source(_keys(folder, ".fasta"), _PROTEIN, documents, names, folder / "test.fasta")


def _dna(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """Upper and lower case, N, RNA's U, and a letter for two bases."""
    read = dict(zip("ACGTNacgtUuR", [0, 1, 2, 3, 4, 0, 1, 2, 3, 3, 3, 4], strict=True))
    rng, documents, names = random.Random(6), {}, []
    for split, lengths in sizes.items():
        texts = ["".join(rng.choices(list(read), [9, 3, 3, 5, 1, 5, 2, 2, 2, 1, 1, 1], k=size)) for size in lengths]
        rows = [(f"{split}{i}", text) for i, text in enumerate(texts)]
        _write_fasta(folder / f"{split}.fasta", rows)
        documents[split] = [[read[letter] for letter in text] for text in texts]
        names = [name for name, _ in rows]
    keys = ("data.tokenizer=dna", "data.reverse_complement=true")
    return Source((*_keys(folder, ".fasta"), *keys), _DNA, documents, names, folder / "test.fasta")


def _corpus(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """A corpus whose splits get so many records by their sequences."""
    rng, rows, number = random.Random(2), [], 0
    left = {split: list(lengths) for split, lengths in sizes.items()}
    while any(left.values()):
        name, number = f"r{number}", number + 1
        size = next(iter(filter(None, left.values())))[0]
        sequence = _proteins(rng, size)
        split = by_sequence(name, sequence, 0.2, 0.2)
        if size in left[split]:
            left[split].remove(size)
            rows.append((name, sequence))
    _write_fasta(folder / "all.fasta", rows)
    settings = {"valid_fraction": 0.2, "test_fraction": 0.2, "deduplicate": False, "workers": 1}
    prepare(PrepareConfig([str(folder / "all.fasta")], str(folder / "corpus"), **settings))
    documents, names = {}, []
    for split, table in tables(folder / "corpus").items():
        documents[split] = table["tokens"].to_pylist()
        if split == "test":
            names = table["id"].to_pylist()
    assert {split: len(found) for split, found in documents.items()} == {s: len(n) for s, n in sizes.items()}
    test = {name: text for name, text in rows if name in names}
    _write_fasta(folder / "test.fasta", [(name, test[name]) for name in names])
    family = _clustered(folder)
    return Source(_corpus_keys(folder), _PROTEIN, documents, names, folder / "test.fasta", **family)


def _mixture(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """Files and a corpus to train on, two named files for the validation, one for the test."""
    for name in ("files", "prepared", "more"):
        (folder / name).mkdir()
    files, corpus, more = _fasta(folder / "files", sizes), _corpus(folder / "prepared", sizes), {}
    rng = random.Random(7)
    rows = [(f"more{i}", _proteins(rng, size)) for i, size in enumerate(sizes["valid"])]
    _write_fasta(folder / "more" / "valid.fasta", rows)
    more = [[LETTERS.index(letter) for letter in text] for _, text in rows]
    train = f"[{{path: {folder / 'files/train.fasta'}, weight: 2}}, {{path: {folder / 'prepared/corpus'}, name: kept}}]"
    valid = f"{{one: {folder / 'files/valid.fasta'}, two: [{folder / 'more/valid.fasta'}]}}"
    keys = (f"data.train={train}", f"data.valid={valid}", f"data.test={folder / 'files/test.fasta'}")
    documents = {
        **files.documents,
        "train": [*files.documents["train"], *corpus.documents["train"]],
        "valid": [*files.documents["valid"], *more],
    }
    parts = {
        "train": {"train": len(files.documents["train"]), "kept": len(corpus.documents["train"])},
        "valid": {"one": len(files.documents["valid"]), "two": len(more)},
    }
    return Source(keys, _PROTEIN, documents, files.identifiers, folder / "files/test.fasta", parts=parts)


def _texts(folder: Path, sizes: dict[str, list[int]]) -> dict[str, list[str]]:
    """Of each split lines of so many bytes, written to its file."""
    rng, texts = random.Random(3), {}
    for split, lengths in sizes.items():
        lines = []
        for size in lengths:
            text = " ".join(rng.choices(TEXT.split(), k=size)).encode()[:size].decode(errors="ignore").strip()
            lines.append(text + "x" * (size - len(text.encode())))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        texts[split] = lines
    return texts


def _lines(folder: Path, sizes: dict[str, list[int]]) -> Source:
    texts = _texts(folder, sizes)
    documents = {split: [list(text.encode()) for text in lines] for split, lines in texts.items()}
    return _of_text(folder, _BYTES, texts, documents, ("data.format=lines",))


def _tokenizer(folder: Path, sizes: dict[str, list[int]]) -> Source:
    import tokenizers

    texts = _texts(folder, sizes)
    save_tokenizer(train_tokenizer([TEXT] * 3, "bpe", 320), folder / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = {
        split: [plain.encode(text, add_special_tokens=False).ids for text in lines] for split, lines in texts.items()
    }
    ids = plain.get_vocab(with_added_tokens=True)
    special = Special(ids["<bos>"], ids["<eos>"], ids["<mask>"], min(ids["<bos>"], ids["<eos>"], ids["<mask>"]))
    keys = ("data.format=lines", f"data.tokenizer={folder / 'tokenizer.json'}")
    return _of_text(folder, special, texts, documents, keys)


def _of_text(
    folder: Path, special: Special, texts: dict[str, list[str]], documents: dict[str, list[list[int]]], keys: tuple
) -> Source:
    test = texts["test"]
    names = [f"test.txt:{number}" for number in range(1, len(test) + 1)]
    units, words = sum(len(text.encode()) for text in test), sum(len(text.split()) for text in test)
    return Source((*_keys(folder, ".txt"), *keys), special, documents, names, folder / "test.txt", units, words)


def _pixels(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """As many images as the others have records; all are of one size."""
    rng, documents = np.random.default_rng(4), {}
    for split, lengths in sizes.items():
        (folder / split).mkdir()
        documents[split] = []
        for number in range(min(len(lengths), 50)):  # of several sequences each
            values = np.minimum(rng.integers(0, 40, (SIDE, SIDE, 3)) + 5 * (number % 40), 255).astype(np.uint8)
            Image.fromarray(values).save(folder / split / f"{number:03}.png")
            documents[split].append(values.ravel().tolist())
    units = sum(map(len, documents["test"]))
    return Source((*_keys(folder, ""), f"data.image_size={SIDE}"), _BYTES, documents, [], None, units, closed=False)


def _prepared_text(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """Tokenized JSON Lines, whose splits get so many records by their ids."""
    import tokenizers

    texts = _texts(folder, sizes)
    save_tokenizer(train_tokenizer([TEXT] * 3, "bpe", 320), folder / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = {name: text for split, lines in texts.items() for name, text in zip(_ids(split, "{}"), lines, strict=False)}
    _write_jsonl(folder / "all.jsonl", rows)
    names = _prepared(folder, folder / "all.jsonl", sizes, tokenizer=str(folder / "tokenizer.json"))
    documents = {
        split: [plain.encode(rows[name], add_special_tokens=False).ids for name in ids] for split, ids in names.items()
    }
    _write_jsonl(folder / "test.jsonl", {name: rows[name] for name in names["test"]})
    special = (plain.token_to_id(name) for name in ("<bos>", "<eos>", "<mask>"))
    bos, eos, mask = special
    test = [rows[name] for name in names["test"]]
    units, words = sum(len(text.encode()) for text in test), sum(len(text.split()) for text in test)
    kind = Special(bos, eos, mask, min(bos, eos, mask))
    family = _clustered(folder)
    return Source(_corpus_keys(folder), kind, documents, names["test"], folder / "test.jsonl", units, words, **family)


def _prepared_pixels(folder: Path, sizes: dict[str, list[int]]) -> Source:
    """Images, whose splits get so many by the names of their files."""
    rng, values = np.random.default_rng(4), {}
    counts = {split: min(len(lengths), 50) for split, lengths in sizes.items()}
    (folder / "images").mkdir()
    for split, number_of in counts.items():
        for number, name in zip(range(number_of), _ids(split, "images/{}.png"), strict=False):
            image = np.minimum(rng.integers(0, 40, (SIDE, SIDE, 3)) + 5 * (number % 40), 255).astype(np.uint8)
            Image.fromarray(image).save(folder / name)
            values[name] = image.ravel().tolist()
    names = _prepared(folder, folder / "images", {split: [1] * each for split, each in counts.items()}, image_size=SIDE)
    documents = {split: [values[name] for name in ids] for split, ids in names.items()}
    units = sum(map(len, documents["test"]))
    return Source(_corpus_keys(folder), _BYTES, documents, [], None, units, closed=False)


def _ids(split: str, form: str) -> Iterator[str]:
    """Identifiers of a split, without end."""
    return (name for number in count() if split_of(name := form.format(number), 0.2, 0.2) == split)


def _prepared(folder: Path, source: Path, sizes: dict[str, list[int]], **keys: object) -> dict[str, list[str]]:
    """Prepare a corpus; the ids of each split in its order."""
    shares = {"valid_fraction": 0.2, "test_fraction": 0.2, "deduplicate": False, "workers": 1}
    prepare(PrepareConfig([str(source)], str(folder / "corpus"), **shares, **keys))  # type: ignore[arg-type]
    names = {split: table["id"].to_pylist() for split, table in tables(folder / "corpus").items()}
    assert {split: len(ids) for split, ids in names.items()} == {split: len(each) for split, each in sizes.items()}
    return names


def _clustered(folder: Path) -> dict[str, Any]:
    """Three records a cluster, of which every fourth is in no table, so that each of its records is one by itself."""
    clusters: dict[str, list[str]] = {}
    with (folder / "clusters.tsv").open("w") as file:
        for split, table in tables(folder / "corpus").items():
            clusters[split] = []
            for number, name in enumerate(table["id"].to_pylist()):
                listed = number // 3 % 4 < 3
                clusters[split].append(f"{split}-{number // 3}" if listed else name)
                file.write(f"{clusters[split][-1]}\t{name}\n" * listed)
    return {
        "family": (f"data.clusters={folder / 'clusters.tsv'}", f"data.cache={folder / 'cache'}"),
        "clusters": clusters,
    }


def _corpus_keys(folder: Path) -> tuple[str, ...]:
    return f"data.train={folder / 'corpus'}", "data.valid_fraction=0.2", "data.test_fraction=0.2"


def _write_jsonl(path: Path, rows: dict[str, str]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + chr(10) for name, text in rows.items()))
