"""The synthetic corpus: repeatable, UniRef in form, BLOSUM62 in substance, and worth learning from."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import resource
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO

from longseq_data.errors import DataError
from longseq_data.synth import synthetic
from longseq_data.synth.substitution import AMINO_ACIDS, blosum62_process
from longseq_data.synth.synthetic import (
    SyntheticReport,
    SyntheticSpec,
    synthesize,
    write_fasta,
)

SMALL = SyntheticSpec(families=7, records=61, seed=3, mean_length=53, min_length=20)
HEADER = re.compile(
    r"UniRef50_(?P<id>[A-Z0-9]+) (?P<description>\S.*) n=(?P<members>\d+) Tax=(?P<taxon>\S.*) TaxID=(?P<taxid>\d+) "
    r"RepID=(?P<entry>[A-Z0-9_]+)"
)


def family_of(header: str) -> str:
    return re.search(r"F(\d+)M\d+ ", header)[1]


# ---------------------------------------------------------------------------------------------------- families


def test_pair_identity_is_what_tree_rates_and_process_imply(monkeypatch: pytest.MonkeyPatch):
    """Two members at height h split at u·h, so they are 2uh apart: average exp(Q·2uhr) over u and the gamma rates r."""
    monkeypatch.setattr(synthetic, "INDELS", 0.0)
    spec = SyntheticSpec(families=400, records=800, mean_length=90, divergence=0.6)
    pairs = [synthetic.family_members(spec, family, 2) for family in range(spec.families)]
    # All but the first residue, which is always M.
    same = np.concatenate(
        [np.frombuffer(a[1:].encode(), "u1") == np.frombuffer(b[1:].encode(), "u1") for a, b in pairs]
    )

    process = blosum62_process()
    root = np.sqrt(process.background)
    eigenvalues, vectors = np.linalg.eigh(process.rates * root[:, None] / root)
    time = 2 * spec.divergence * (np.arange(1000) + 0.5) / 1000
    decay = ((1 - 2 * np.outer(time, eigenvalues)) ** -0.5).mean(axis=0)  # gamma with shape ½: E exp(wtr) = (1-2wt)^-½
    expected = process.background @ (vectors**2 @ decay)
    assert same.mean() == pytest.approx(expected, abs=0.02)


def test_families_have_conserved_and_variable_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic, "INDELS", 0.0)
    members = synthetic.family_members(SyntheticSpec(families=1, records=80, mean_length=400), 0, 80)
    columns = np.array([list(member) for member in members]).T
    conserved = np.array([Counter(column).most_common(1)[0][1] / len(column) for column in columns])
    assert (conserved == 1).mean() > 0.1
    assert (conserved < 0.6).mean() > 0.1


def test_members_without_divergence_are_copies_and_indels_come_with_it():
    spec = SyntheticSpec(families=1, records=40, divergence=0)
    assert len(set(synthetic.family_members(spec, 0, 40))) == 1
    assert len({len(member) for member in synthetic.family_members(replace(spec, divergence=0.5), 0, 40)}) > 5


@pytest.mark.parametrize("members", [1, 2, 3, 17, 256])
def test_a_family_has_the_members_asked_for_and_each_begins_with_methionine(members: int):
    sequences = synthetic.family_members(SMALL, 4, members)
    assert len(sequences) == members
    assert all(sequence[0] == "M" and set(sequence) <= set(AMINO_ACIDS) for sequence in sequences)


def test_lengths_have_the_mean_asked_for():
    spec = SyntheticSpec(families=2000, records=2000, mean_length=100, divergence=1.0)
    lengths = np.array([len(sequence) for _, sequence in synthesize(spec)])
    assert lengths.mean() == pytest.approx(100, abs=5)  # standard error 1.3
    assert np.median(lengths) < 95  # a long right tail


def test_lengths_keep_their_bounds_through_indels():
    spec = SyntheticSpec(families=20, records=200, mean_length=42, min_length=40, max_length=45, divergence=3.0)
    lengths = {len(sequence) for _, sequence in synthesize(spec)}
    assert min(lengths) == 40
    assert max(lengths) == 45


def test_every_record_is_nearest_to_its_own_family():
    records = list(synthesize(SyntheticSpec(families=8, records=120, seed=1, mean_length=110)))
    families = np.array([family_of(header) for header, _ in records])
    words = [{sequence[i : i + 3] for i in range(len(sequence) - 2)} for _, sequence in records]
    shared = np.array([[len(a & b) / len(a | b) for b in words] for a in words])
    np.fill_diagonal(shared, 0)
    alike = families[:, None] == families
    has_kin = alike.sum(axis=1) > 1
    assert (families[shared.argmax(axis=1)] == families)[has_kin].all()
    assert shared[alike].mean() > 5 * shared[~alike].mean()


def test_family_sizes_add_up_and_are_skewed():
    sizes = synthetic.family_sizes(SyntheticSpec(families=101, records=5003))
    assert sizes.sum() == 5003
    assert sizes.min() >= 1
    assert sizes.max() > 5 * np.median(sizes)
    assert (synthetic.family_sizes(SyntheticSpec(families=9, records=9)) == 1).all()


# ------------------------------------------------------------------------------------------------- the corpus


def test_same_seed_gives_the_same_bytes_and_another_seed_another_corpus(tmp_path: Path):
    for name in ("a.fasta", "b.fasta", "a.fasta.gz", "b.fasta.gz"):
        write_fasta(SMALL, tmp_path / name)
    write_fasta(replace(SMALL, seed=4), tmp_path / "other.fasta")
    plain = (tmp_path / "a.fasta").read_bytes()
    assert plain == (tmp_path / "b.fasta").read_bytes()
    packed = (tmp_path / "a.fasta.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # RFC 1952: no file name in the flags, no time, whenever it was written
    assert packed == (tmp_path / "b.fasta.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert plain != (tmp_path / "other.fasta").read_bytes()


def test_corpus_is_the_same_on_every_machine(tmp_path: Path):
    """The digest was taken once. If it changes, so does every corpus that somebody has made: say so in the README."""
    write_fasta(SMALL, tmp_path / "a.fasta")
    assert (
        hashlib.sha256((tmp_path / "a.fasta").read_bytes()).hexdigest()
        == "2b1a474cd1d722de7165478b31837cb5b96d0d1ff0977c44eb8924a8e0d085e0"
    )


def test_seeds_share_neither_identifiers_nor_sequences():
    first, second = (list(synthesize(replace(SMALL, seed=seed))) for seed in (3, 4))
    assert not {header.split()[0] for header, _ in first} & {header.split()[0] for header, _ in second}
    assert not {sequence for _, sequence in first} & {sequence for _, sequence in second}


def test_headers_are_those_of_uniref_and_agree_with_the_corpus():
    records = list(synthesize(SMALL))
    matches = [HEADER.fullmatch(header) for header, _ in records]
    assert all(matches)
    assert len({match["id"] for match in matches}) == SMALL.records
    assert all(match["entry"].startswith(match["id"]) for match in matches)
    members = Counter(family_of(header) for header, _ in records)
    assert all(int(match["members"]) == members[family_of(match.string)] for match in matches)
    assert len(members) == SMALL.families


@pytest.mark.parametrize("name", ["corpus.fasta", "corpus.fasta.gz"])
def test_biopython_reads_back_what_was_written(tmp_path: Path, name: str):
    done: list[int] = []
    spec = replace(SMALL, records=300)
    report = write_fasta(spec, tmp_path / "new" / "folder" / name, progress=done.append)
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / "new" / "folder" / name, "rt") as lines:
        text = lines.read()
    (tmp_path / "plain.fasta").write_text(text)
    parsed = [(record.description, str(record.seq)) for record in SeqIO.parse(tmp_path / "plain.fasta", "fasta")]
    assert parsed == list(synthesize(spec))
    assert report == SyntheticReport(families=7, records=300, residues=sum(len(sequence) for _, sequence in parsed))
    assert max(len(line) for line in text.splitlines() if line[0] != ">") == 60
    assert done == [256, 300]


def test_families_are_interleaved():
    families = [family_of(header) for header, _ in synthesize(SyntheticSpec(families=16, records=800, mean_length=40))]
    assert len(set(families[:80])) >= 10


def test_groups_hold_every_record_once(monkeypatch: pytest.MonkeyPatch):
    whole = sorted(synthesize(SMALL))
    monkeypatch.setattr(synthetic, "GROUP", 5)
    assert sorted(synthesize(SMALL)) == whole


@pytest.mark.parametrize("name", ["corpus.fasta", "corpus.fasta.gz"])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, name: str):
    with pytest.raises(KeyboardInterrupt):
        write_fasta(
            replace(SMALL, records=600), tmp_path / name, progress=lambda done: signal.raise_signal(signal.SIGINT)
        )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path: Path):
    (tmp_path / "old.fasta").write_text(">old\nMK\n")
    with pytest.raises(KeyboardInterrupt):
        write_fasta(
            replace(SMALL, records=600),
            tmp_path / "old.fasta",
            overwrite=True,
            progress=lambda done: signal.raise_signal(signal.SIGINT),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["old.fasta"]
    assert (tmp_path / "old.fasta").read_text() == ">old\nMK\n"


@pytest.mark.parametrize("name", ["corpus.fasta", "corpus.fasta.gz"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path, name: str):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot be written .* choose another disk; nothing half-written was left"):
            write_fasta(replace(SMALL, records=2000), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_refused_unless_overwritten(tmp_path: Path):
    path = tmp_path / "corpus.fasta"
    path.write_text("precious")
    with pytest.raises(DataError, match=r"corpus\.fasta exists already"):
        write_fasta(SMALL, path)
    assert path.read_text() == "precious"
    assert write_fasta(SMALL, path, overwrite=True).records == SMALL.records
    assert path.read_text().startswith(">UniRef50_")


def test_a_folder_or_a_file_for_a_parent_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="is a folder"):
        write_fasta(SMALL, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_fasta(SMALL, tmp_path / "file" / "corpus.fasta")


@pytest.mark.parametrize("overwrite", [False, True])
def test_devices_and_pipes_are_never_replaced(tmp_path: Path, overwrite: bool):
    os.mkfifo(tmp_path / "pipe.fasta")
    (tmp_path / "device.fasta").symlink_to("/dev/null")
    for name in ("pipe.fasta", "device.fasta"):
        with pytest.raises(DataError, match="is no regular file"):
            write_fasta(SMALL, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "pipe.fasta").is_fifo()
    assert (tmp_path / "device.fasta").is_char_device()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": 0}, "families is 0"),
        ({"records": 6}, "records is 6 for 7 families"),
        ({"seed": -1}, "seed is -1"),
        ({"min_length": 0}, "min_length is 0"),
        ({"mean_length": 19}, "mean_length is 19: it must lie between min_length"),
        ({"mean_length": 2001}, "mean_length is 2001"),
        ({"divergence": -0.1}, "divergence is -0.1"),
        ({"divergence": float("nan")}, "divergence is nan"),
    ],
)
def test_a_bad_value_is_refused_by_name(changes: dict[str, float], message: str):
    with pytest.raises(DataError, match=message):
        replace(SMALL, **changes)


def test_context_predicts_held_out_members_far_better_than_frequencies():
    """The longest context of up to four residues seen in training names the next; a unigram names the commonest."""
    training: list[str] = []
    held_out: list[str] = []
    for header, sequence in synthesize(SyntheticSpec(families=16, records=900, mean_length=70)):
        digest = hashlib.blake2b(header.split()[0].encode()).digest()
        (held_out if digest[0] < 26 else training).append("^^^^" + sequence)
    following: dict[str, Counter[str]] = defaultdict(Counter)
    for sequence in training:
        for i in range(4, len(sequence)):
            for order in range(5):
                following[sequence[i - order : i]][sequence[i]] += 1
    guess = {context: counts.most_common(1)[0][0] for context, counts in following.items()}

    def accuracy(orders: range) -> float:
        right = [
            next(guess[context] for order in orders if (context := sequence[i - order : i]) in guess) == sequence[i]
            for sequence in held_out
            for i in range(4, len(sequence))
        ]
        return sum(right) / len(right)

    unigram, context = accuracy(range(1)), accuracy(range(4, -1, -1))
    assert 0.07 < unigram < 0.13
    assert context > 0.40
