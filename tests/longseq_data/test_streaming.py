"""The order of samples: a pure function of the spec, that shows every residue as often as it should."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from Bio import SeqIO

from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.samples.streaming import evaluation_windows, target_counts
from longseq_data.splits import split_of
from longseq_data.vocabulary import BOS, EOS, IGNORE, MASK, RESIDUES, decode
from plain_samples import evaluation_samples, training_samples, training_windows

EVERY_MODE = [(packing, objective) for packing in ("crop", "concat") for objective in ("causal", "masked")]
every_mode = pytest.mark.parametrize(("packing", "objective"), EVERY_MODE)


def sequences(sources: list[str]) -> list[str]:
    return [str(record.seq) for source in sources for record in SeqIO.parse(source, "fasta")]


def original(sample) -> np.ndarray:
    """The tokens of a masked sample before masking."""
    return np.where(sample.targets == IGNORE, sample.tokens, sample.targets)


def equal(a, b) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)


# The split


def test_the_split_of_an_identifier_never_changes():
    # u by coreutils: printf %s ID | b2sum -l 64, as a fraction of 2^64:
    # UniRef50_O57809 0x45ce7fece537e3ab .2727, a 0x40f8... .2538, b 0x8472... .5174, c 0x373f... .2158
    assert split_of("UniRef50_O57809", 0.273, 0.0) == "valid"
    assert split_of("UniRef50_O57809", 0.272, 0.001) == "test"
    assert split_of("UniRef50_O57809", 0.272, 0.0) == "train"
    found = {name: split_of(name, 0.25, 0.25) for name in ["a", "b", "c", "d", "e", "UniRef50_P11608", "λ"]}
    assert found == {
        "a": "test",
        "b": "train",
        "c": "valid",
        "d": "train",
        "e": "valid",
        "UniRef50_P11608": "train",
        "λ": "train",
    }


def test_the_splits_have_the_fractions_asked_for():
    n = 20_000
    counts = Counter(split_of(f"UniRef50_{i}", 0.05, 0.1) for i in range(n))
    for split, fraction in {"valid": 0.05, "test": 0.1, "train": 0.85}.items():
        assert abs(counts[split] / n - fraction) < 5 * (fraction * (1 - fraction) / n) ** 0.5
    assert split_of("a", 0.0, 0.0) == "train"
    assert split_of("a", 1.0, 0.0) == "valid"
    assert split_of("a", 0.0, 1.0) == "test"


def test_the_three_splits_are_a_partition(make_spec, proteins):
    seen: Counter[str] = Counter()
    for split in ("train", "valid", "test"):
        spec = make_spec(split=split, length=100)
        seen += Counter(decode(sample.tokens[1:]) for sample in evaluation_samples(spec))
    assert seen == Counter(sequences(proteins))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_empty_split_is_an_error_and_no_endless_loop(split, make_spec):
    fraction = {"valid_fraction": 1.0 if split == "train" else 0.0, "test_fraction": 0.0}
    spec = make_spec(split=split, **fraction)
    for samples in (training_samples(spec), evaluation_samples(spec)):
        with pytest.raises(DataError) as caught:
            next(samples)
        said = str(caught.value)
        assert said.startswith(f"The {split} split of ")
        assert "none of 37 records" in said
        change = {"train": "lower data.valid_fraction or", "valid": "raise data.valid", "test": "raise data.test"}
        assert change[split] in said


def test_an_empty_split_of_many_files_names_three_and_says_how_to_go_on_without(make_spec, proteins):
    spec = make_spec(sources=(*proteins * 10,), split="valid", valid_fraction=0.0)
    for samples in (training_samples(spec), evaluation_samples(spec)):
        with pytest.raises(DataError) as caught:
            next(samples)
        said = str(caught.value)
        assert said.startswith(
            f"The valid split of {proteins[0]}, {proteins[1]}, {proteins[0]} and 17 more (20 in all)"
        )
        assert said.count(".fasta") == 3
        assert "(trainer.valid_every=0)" in said
    with pytest.raises(DataError) as caught:
        next(evaluation_samples(make_spec(split="test", test_fraction=0.0)))
    assert f"of {', '.join(proteins)} is empty" in str(caught.value)
    assert "valid_every" not in str(caught.value)


def test_no_sources_is_an_error(make_spec):
    with pytest.raises(DataError, match="no file at all"):
        next(training_samples(make_spec(sources=())))


@pytest.mark.parametrize(
    "wrong",
    [
        {"packing": "pad"},
        {"objective": "span"},
        {"split": "dev"},
        {"length": 1},
        {"shuffle_buffer": 0},
        {"valid_fraction": -0.1},
        {"valid_fraction": 0.6, "test_fraction": 0.5},
    ],
)
def test_a_spec_rejects_bad_values(wrong, make_spec):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_spec(**wrong)


# Evaluation


@pytest.mark.parametrize("length", [2, 7, 11, 100])
@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_causal_evaluation_scores_every_residue_and_eos_once(packing, length, make_spec, proteins):
    samples = list(evaluation_samples(make_spec(packing=packing, length=length)))
    targets = "".join(decode(sample.targets) for sample in samples)
    assert targets == "".join(f"{sequence}<eos>" for sequence in sequences(proteins))
    for sample in samples:
        assert 1 <= len(sample.tokens) == len(sample.targets) <= length
        assert np.array_equal(sample.tokens[1:], sample.targets[:-1])
    if packing == "concat":
        assert {len(sample.tokens) for sample in samples[:-1]} == {length}
        assert samples[0].tokens[0] == EOS  # before the first record what training shows before any
        assert not any(BOS in sample.tokens for sample in samples)


@pytest.mark.parametrize("length", [2, 7, 11, 100])
@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_masked_evaluation_shows_every_residue_once(packing, length, make_spec, proteins):
    samples = list(evaluation_samples(make_spec(packing=packing, objective="masked", length=length)))
    shown = np.concatenate([original(sample) for sample in samples])
    assert decode(shown[shown < RESIDUES]) == "".join(sequences(proteins))
    for sample in samples:
        assert (sample.targets != IGNORE).any()
        assert len(sample.tokens) == len(sample.targets) <= length


def numbered(write, name: str, records: int) -> str:
    """A file of records ``name``_0, ``name``_1, ... of one residue."""
    return write(f"{name}.fasta", "".join(f">{name}_{i}\nA\n" for i in range(records)))


def identifiers(windows) -> list[str]:
    return [piece.record.identifier for window in windows for piece in window.pieces]


@every_mode
def test_evaluation_stops_after_max_samples(packing, objective, make_spec):
    spec = make_spec(packing=packing, objective=objective)
    assert len(list(evaluation_samples(spec, 5))) == 5
    assert list(evaluation_samples(spec, 0)) == []


def test_a_sampled_evaluation_has_no_record_twice_and_enough_samples_are_all_of_them(make_spec, proteins):
    spec = make_spec(length=100)
    for samples in (9, 37, 1000):
        found = Counter(identifiers(evaluation_windows(spec, samples)))
        assert found.total() == min(samples, 37)
        assert max(found.values()) == 1
    assert identifiers(evaluation_windows(spec)) == [r.id for s in proteins for r in SeqIO.parse(s, "fasta")]


def test_a_sampled_evaluation_comes_from_all_of_the_split(make_spec, write):
    sources = tuple(numbered(write, name, n) for name, n in [("a", 600), ("b", 900)])
    found = identifiers(evaluation_windows(make_spec(sources=sources), 300))
    assert abs(sum(name.startswith("a") for name in found) - 120) < 5 * 8  # of 300, with a standard error below 8.5
    positions = [int(name[2:]) / (600 if name[0] == "a" else 900) for name in found]
    assert all(0.1 < share < 0.4 for share in np.histogram(positions, 4, (0, 1))[0] / 300)  # of each quarter


def test_a_sample_of_large_files_comes_from_several_of_them(make_spec, write, monkeypatch):
    monkeypatch.setattr("longseq_data.samples.streaming.SAMPLE_BUFFER", 30)
    sources = tuple(numbered(write, name, 500) for name in "abcde")
    found = Counter(name[0] for name in identifiers(evaluation_windows(make_spec(sources=sources), 50)))
    assert all(2 <= found[name] <= 20 for name in "abcde")
    counts = target_counts(make_spec(sources=(*sources, write("x.fasta", ">x\nC\n" * 500))), 200)
    assert 10 <= counts[1] <= 25  # one record of six is C, a hundred records in all


def test_a_sampled_evaluation_depends_on_neither_seed_nor_shuffle_buffer(make_spec):
    def sample(**changes) -> list[str]:
        return identifiers(evaluation_windows(make_spec(**changes), 9))

    assert sample() == sample(seed=6, shuffle_buffer=3)
    assert sample() != sample(split="train")


@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_target_counts_are_the_targets_of_an_evaluation_pass(packing, make_spec, proteins):
    spec = make_spec(packing=packing)
    targets = np.concatenate([sample.targets for sample in evaluation_samples(spec)])
    assert target_counts(spec).tolist() == np.bincount(targets, minlength=29).tolist()
    letters = Counter("".join(sequences(proteins)))
    counts = target_counts(make_spec(packing=packing, objective="masked"))
    assert {decode([i]): n for i, n in enumerate(counts) if n} == letters


def test_target_counts_stop_at_their_limit(make_spec, proteins):
    order = [window.pieces[0].record for window in evaluation_windows(make_spec(length=100), 37)]
    first, second = (record.length + 1 for record in order[:2])
    assert target_counts(make_spec(), first).sum() == first
    assert target_counts(make_spec(), first + 1).sum() == first + second
    assert target_counts(make_spec(), 10**6).tolist() == target_counts(make_spec()).tolist()


# Training


def test_a_crop_epoch_has_every_record_once_in_another_order_each_time(make_spec, proteins):
    stream = training_samples(make_spec(length=100))
    epochs = [[decode(sample.tokens[1:]) for sample in islice(stream, 37)] for _ in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(sequences(proteins))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_large_files_mix_from_the_start_and_end_together(make_spec, write):
    sources = tuple(numbered(write, name, 400) for name in "abc")
    stream = identifiers(islice(training_windows(make_spec(sources=sources, shuffle_buffer=8)), 2400))
    for epoch in (stream[:1200], stream[1200:]):
        assert len(set(epoch)) == 1200
        for start in range(0, 1200, 60):
            found = Counter(name[0] for name in epoch[start : start + 60])
            assert all(12 <= found[name] <= 28 for name in "abc")


def test_without_a_shuffle_buffer_files_come_whole_in_a_random_order(make_spec, write):
    sources = tuple(numbered(write, name, 30) for name in "abcdef")
    stream = identifiers(islice(training_windows(make_spec(sources=sources, shuffle_buffer=1)), 360))
    files = [stream[start : start + 30] for start in range(0, 360, 30)]
    assert all(file == [f"{file[0][0]}_{number}" for number in range(30)] for file in files)
    orders = ["".join(file[0][0] for file in epoch) for epoch in (files[:6], files[6:])]
    assert sorted(orders[0]) == sorted(orders[1]) == list("abcdef")
    assert orders[0] != orders[1]


@pytest.mark.parametrize("sources", [3, 40])
def test_sources_take_turns_a_few_at_a_time_and_are_closed(sources, make_spec, write, monkeypatch):
    opened: list[str] = []
    most = 0

    def watched(reading, leaf, **settings):
        nonlocal most
        opened.append(leaf.source)
        most = max(most, len(opened))
        try:
            yield from parsed(reading, leaf, **settings)
        finally:
            opened.remove(leaf.source)

    monkeypatch.setattr("longseq_data.ingest.follow.parsed", watched)
    monkeypatch.setattr("longseq_data.ingest.block.MOST_RECORDS", 1)
    names = [f"f{i:02}" for i in range(sources)]
    spec = make_spec(sources=tuple(numbered(write, name, 3 + i % 5) for i, name in enumerate(names)), shuffle_buffer=2)
    records = sum(3 + i % 5 for i in range(sources))
    windows = training_windows(spec)
    epoch = identifiers(islice(windows, records))
    assert sorted(epoch) == sorted(f"{name}_{j}" for i, name in enumerate(names) for j in range(3 + i % 5))
    assert most == min(sources, 16)
    next(windows)
    assert opened
    windows.close()
    assert not opened
    assert len(list(evaluation_windows(spec, 2))) == 2
    assert not opened


def test_a_bad_file_among_those_open_ends_the_stream_and_closes_the_others(make_spec, write, proteins):
    spec = make_spec(sources=(*proteins, write("bad.fasta", ">x\nA\n>y\n")))
    with pytest.raises(DataError, match=r"bad\.fasta, line 3: record 'y' has no residues"):
        list(islice(training_windows(spec), 40))


def test_crops_are_pieces_of_their_record_with_bos_and_eos_only_at_its_ends(make_spec, proteins):
    whole = [f"<bos>{sequence}<eos>" for sequence in sequences(proteins)]
    starts = Counter()
    for sample in islice(training_samples(make_spec(length=11)), 37 * 8):
        text = decode([sample.tokens[0], *sample.targets])
        assert any(text in document for document in whole)
        assert len(sample.tokens) == 11 or (sample.tokens[0] == BOS and sample.targets[-1] == EOS)
        starts[text.startswith("<bos>"), text.endswith("<eos>")] += 1
    assert len(starts) == 4  # the beginning, the end, both, neither


def test_every_crop_of_a_record_is_as_likely_as_the_others(make_spec, write):
    source = write("one.fasta", ">a\nACDEFGHIKLMN\n")  # 14 tokens, windows of 11: 4 starts
    n = 2000
    first = Counter(int(s.tokens[0]) for s in islice(training_samples(make_spec(sources=(source,), length=10)), n))
    assert set(first) == {BOS, 0, 1, 2}
    assert all(abs(count / n - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5 for count in first.values())


def test_a_concatenated_epoch_predicts_every_token_once(make_spec, proteins):
    length = 11
    tokens = sum(len(sequence) + 1 for sequence in sequences(proteins))
    windows = 2 * tokens // length + 1
    samples = list(islice(training_samples(make_spec(packing="concat", length=length)), windows))
    assert all(len(sample.tokens) == length for sample in samples)
    assert samples[0].tokens[0] == BOS
    for sample, following in pairwise(samples):
        assert sample.targets[-1] == following.tokens[0]
    stream = np.concatenate([sample.targets for sample in samples])
    for epoch in range(2):
        text = decode(stream[epoch * tokens : (epoch + 1) * tokens])
        assert Counter(text.split("<eos>")[:-1]) == Counter(sequences(proteins))


@every_mode
def test_starting_late_equals_skipping(packing, objective, make_spec):
    spec = make_spec(packing=packing, objective=objective, split="train")
    everything = list(islice(training_samples(spec), 260))  # several epochs
    for start in (0, 1, 2, 17, 26, 60, 131, 250):
        for late, sample in zip(training_samples(spec, start), everything[start : start + 9], strict=False):
            assert equal(late, sample)


@every_mode
def test_the_order_is_a_function_of_the_seed(packing, objective, make_spec):
    def stream(seed: int) -> list:
        spec = make_spec(packing=packing, objective=objective, seed=seed)
        return list(islice(training_samples(spec), 50))

    assert all(map(equal, stream(1), stream(1)))
    assert not all(map(equal, stream(1), stream(2)))


@every_mode
def test_scored_targets_are_known_without_tokenising(packing, objective, make_spec):
    spec = make_spec(packing=packing, objective=objective, length=9)
    for windows, samples in [
        (islice(training_windows(spec, 3), 200), training_samples(spec, 3)),
        (evaluation_windows(spec), evaluation_samples(spec)),
    ]:
        for window, sample in zip(windows, samples, strict=False):
            assert spec.scored(window) == (sample.targets != IGNORE).sum()


def test_masks_differ_between_epochs(make_spec, write):
    source = write("one.fasta", ">a\nACDEFGHIKLMNPQRSTVWYACDEFGHIKLMNPQRSTVWY\n")
    spec = make_spec(sources=(source,), length=64, objective="masked")
    masks = {tuple(np.flatnonzero(s.targets != IGNORE)) for s in islice(training_samples(spec), 20)}
    assert len(masks) > 15
    assert any((s.tokens == MASK).any() for s in islice(training_samples(spec), 20))


def test_a_shuffle_buffer_of_residues_bounds_memory_and_loses_nothing(make_spec, proteins, monkeypatch):
    monkeypatch.setattr("longseq_data.samples.shuffling.BUFFER_RESIDUES", 30)
    spec = make_spec(length=100, shuffle_buffer=10_000)
    epoch = [decode(sample.tokens[1:]) for sample in islice(training_samples(spec), 37)]
    assert Counter(epoch) == Counter(sequences(proteins))


def test_unknown_letters_reach_the_samples_as_x_or_stop_a_strict_stream(make_spec, write):
    source = write("a.fasta", ">a\nAJ*\n")
    (sample,) = evaluation_samples(make_spec(sources=(source,)))
    assert decode(sample.targets) == "AX<eos>"
    with pytest.raises(DataError, match="line 2: character 'J'"):
        next(training_samples(make_spec(sources=(source,), strict=True)))
