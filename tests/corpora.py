"""Small protein files for the tests of prepared corpora, and what must become of them, computed another way."""

from __future__ import annotations

import gzip
import hashlib
import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.splits import split_of

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = LETTERS + "BOUXZ"
TAXIDS = (9606, 2157, 10239, 83333)


def write_files(
    folder: Path, records: int = 9000, files: int = 3, seed: int = 1, duplicates: float = 0.05
) -> list[str]:
    """FASTA files, every second one gzipped, with lower case, unknown letters and repeated sequences."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[list[str]] = [[] for _ in range(files)]
    before: list[str] = []
    for i in range(records):
        if before and rng.random() < 0.05:
            sequence = rng.choice(before)
        else:
            sequence = "".join(rng.choices(LETTERS, k=int(rng.lognormvariate(4.5, 0.9)) + 1))
            if rng.random() < 0.03:
                sequence = sequence.lower()
            if rng.random() < 0.03:
                sequence += rng.choice(["J", "*", "XX", "-A", "jj"])
            before.append(sequence)
        header = f"UniRef50_{rng.randrange(10**9):09d} protein {i} n=1"
        if rng.random() < 0.9:
            header += f" Tax=Some thing TaxID={rng.choice(TAXIDS)} RepID=X_{i}"
        lines = [sequence[j : j + 60] for j in range(0, len(sequence), 60)]
        texts[i % files].append("\n".join([f">{header}", *lines]) + "\n")
    names = []
    for number, text in enumerate(texts):
        path = folder / (f"part{number}.fasta" if number % 2 else f"part{number}.fasta.gz")
        content = "".join(text).encode()
        path.write_bytes(content if number % 2 else gzip.compress(content, 1))
        names.append(str(path))
    return names


def by_sequence(identifier: str, letters: str, valid: float, test: float) -> str:
    """The split by a hash of the sequence."""
    digest = hashlib.blake2b(bytes(map(ALPHABET.index, letters)), digest_size=16).digest()
    place = (int.from_bytes(digest[8:], "big") >> 11) / 2**53
    return "valid" if place < valid else "test" if place < valid + test else "train"


def by_id(identifier: str, letters: str, valid: float, test: float) -> str:
    return split_of(identifier, valid, test)


def expected(
    names: list[str],
    *,
    keep=lambda identifier, letters, taxid: True,
    held_out=lambda identifier, taxid: False,
    valid: float = 0.05,
    test: float = 0.05,
    deduplicate: bool = True,
    split=None,
) -> dict[str, dict[str, tuple[str, int]]]:
    """{split: {id: (letters, TaxID)}} by Biopython and a dictionary of all sequences."""
    from Bio import SeqIO

    groups: dict[str, list[tuple[str, int]]] = {}
    for name in names:
        with gzip.open(name, "rt") if name.endswith(".gz") else Path(name).open() as handle:
            for record in SeqIO.parse(handle, "fasta"):
                letters = str(record.seq).upper().removesuffix("*")
                letters = "".join(letter if letter in ALPHABET else "X" for letter in letters)
                words = [word for word in record.description.split() if word.startswith("TaxID=")]
                taxid = int(words[0].removeprefix("TaxID=")) if words else -1
                if keep(record.id, letters, taxid):
                    groups.setdefault(letters, []).append((record.id, taxid))
    splits: dict[str, dict[str, tuple[str, int]]] = {}
    for letters, group in groups.items():
        kept = [min(group)] if deduplicate else group
        ood = [any(held_out(*row) for row in group)] if deduplicate else [held_out(*row) for row in group]
        for (identifier, taxid), out in zip(kept, ood, strict=True):
            name = "ood" if out else (split or by_sequence)(identifier, letters, valid, test)
            splits.setdefault(name, {})[identifier] = (letters, taxid)
    return splits


def tables(corpus: Path) -> dict[str, pa.Table]:
    """Each split, read by pyarrow from its files in their order."""
    splits: dict[str, pa.Table] = {}
    for folder in sorted(path for path in corpus.iterdir() if path.is_dir()):
        parts = [pa.ipc.open_stream(file.read_bytes()).read_all() for file in sorted(folder.glob("*.arrow"))]
        splits[folder.name] = pa.concat_tables(parts)
    return splits


def found(corpus: Path) -> dict[str, dict[str, tuple[str, int]]]:
    """{split: {id: (letters, TaxID)}} of a prepared corpus."""
    splits = {}
    for name, table in tables(corpus).items():
        columns = (table["id"].to_pylist(), table["tokens"].to_pylist(), table["taxid"].to_pylist())
        rows = {i: ("".join(ALPHABET[t] for t in tokens), taxid) for i, tokens, taxid in zip(*columns, strict=True)}
        assert len(rows) == table.num_rows, "an id comes twice"
        splits[name] = rows
    return splits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flat_and_stream(table: pa.Table, eos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flat tokens, stream with EOS, record number of each place of the stream) of a split."""
    rows = [np.array(tokens) for tokens in table["tokens"].to_pylist()]
    stream = [part for row in rows for part in (row, [eos])]
    numbers = [np.full(len(row) + 1, i) for i, row in enumerate(rows)]
    return np.concatenate(rows), np.concatenate(stream), np.concatenate(numbers)


def config(files: list[str], place: Path, **changes: object) -> PrepareConfig:
    """A preparation of ``files`` to ``place``, in this process unless ``workers`` says otherwise."""
    return PrepareConfig(**{"sources": files, "output": str(place), "workers": 1, **changes})  # type: ignore[arg-type]


def made(files: list[str], place: Path, **changes: object) -> dict[str, dict[str, tuple[str, int]]]:
    """What is in the corpus that is made of ``files``."""
    prepare(config(files, place, **changes))
    return found(place)


def data_files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which names the sources."""
    return {name: content for name, content in contents(folder).items() if name != "manifest.json"}


def clustered(folder: Path, sizes: list[int], alone: int, longest: int, seed: int) -> Path:
    """folder/corpus of a.fasta, in which cluster c of table.tsv has ``sizes[c]`` records, and some are not listed."""
    draw = random.Random(seed)
    names = [(f"c{c}_0", f"c{c}_{i}") for c, size in enumerate(sizes) for i in range(size)]
    rows = [member for _, member in names] + [f"alone{i}" for i in range(alone)]
    draw.shuffle(rows)
    text = "".join(f">{name} a\n{''.join(draw.choices('ACDEFGHIKL', k=draw.randint(5, longest)))}\n" for name in rows)
    (folder / "a.fasta").write_text(text)
    (folder / "table.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in names))
    settings = {"valid_fraction": 0.0, "test_fraction": 0.0, "workers": 1}
    prepare(PrepareConfig([str(folder / "a.fasta")], str(folder / "corpus"), **settings))
    return folder
