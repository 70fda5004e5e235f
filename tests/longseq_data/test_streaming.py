"""The order of samples: a pure function of the spec, that shows every residue as often as it should."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from Bio import SeqIO

from longseq_data.errors import DataError
from longseq_data.streaming import (
    evaluation_samples,
    evaluation_windows,
    split_of,
    target_counts,
    training_samples,
    training_windows,
)
from longseq_data.vocabulary import BOS, EOS, IGNORE, MASK, RESIDUES, decode

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
        assert sum(BOS in sample.tokens for sample in samples) == 1


@pytest.mark.parametrize("length", [2, 7, 11, 100])
@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_masked_evaluation_shows_every_residue_once(packing, length, make_spec, proteins):
    samples = list(evaluation_samples(make_spec(packing=packing, objective="masked", length=length)))
    shown = np.concatenate([original(sample) for sample in samples])
    assert decode(shown[shown < RESIDUES]) == "".join(sequences(proteins))
    for sample in samples:
        assert (sample.targets != IGNORE).any()
        assert len(sample.tokens) == len(sample.targets) <= length


def test_evaluation_stops_after_max_samples(make_spec):
    spec = make_spec()
    some = list(evaluation_samples(spec, 5))
    assert len(some) == 5
    assert all(map(equal, some, evaluation_samples(spec)))
    assert list(evaluation_samples(spec, 0)) == []


@pytest.mark.parametrize("packing", ["crop", "concat"])
def test_target_counts_are_the_targets_of_an_evaluation_pass(packing, make_spec, proteins):
    spec = make_spec(packing=packing)
    targets = np.concatenate([sample.targets for sample in evaluation_samples(spec)])
    assert target_counts(spec).tolist() == np.bincount(targets, minlength=29).tolist()
    letters = Counter("".join(sequences(proteins)))
    counts = target_counts(make_spec(packing=packing, objective="masked"))
    assert {decode([i]): n for i, n in enumerate(counts) if n} == letters


def test_target_counts_stop_at_their_limit(make_spec, proteins):
    first, second = sequences(proteins)[:2]
    assert target_counts(make_spec(), len(first) + 1).sum() == len(first) + 1
    assert target_counts(make_spec(), len(first) + 2).sum() == len(first) + len(second) + 2


# Training


def test_a_crop_epoch_has_every_record_once_in_another_order_each_time(make_spec, proteins):
    stream = training_samples(make_spec(length=100))
    epochs = [[decode(sample.tokens[1:]) for sample in islice(stream, 37)] for _ in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(sequences(proteins))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


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
    monkeypatch.setattr("longseq_data.streaming.BUFFER_RESIDUES", 30)
    spec = make_spec(length=100, shuffle_buffer=10_000)
    epoch = [decode(sample.tokens[1:]) for sample in islice(training_samples(spec), 37)]
    assert Counter(epoch) == Counter(sequences(proteins))


def test_unknown_letters_reach_the_samples_as_x_or_stop_a_strict_stream(make_spec, write):
    source = write("a.fasta", ">a\nAJ*\n")
    (sample,) = evaluation_samples(make_spec(sources=(source,)))
    assert decode(sample.targets) == "AX<eos>"
    with pytest.raises(DataError, match="line 2: character 'J'"):
        next(training_samples(make_spec(sources=(source,), strict=True)))
