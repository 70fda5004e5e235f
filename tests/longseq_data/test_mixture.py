"""Mixtures: which sample of which source is sample n, by a plain loop; the same for any ranks, workers and resumes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from corpora import write_files
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.reading import Reading
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.draw import STEP, WHOLE, Draw, _floors
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.rank_share import Samples, Share
from longseq_data.samples.rows import Finish
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import PROTEIN

WEIGHTS = (0.7, 0.2, 0.099, 0.001)
HISTORY = ((1500, (1, 1, 1)), (1501, (5, 1, 1)), (5000, (0.1, 0.1, 2)))


@pytest.mark.parametrize("weights", [WEIGHTS, (1, 2), (5,), (1, 1e-9, 3)])
@pytest.mark.parametrize("seed", [0, 7])
def test_drawn_shares_are_the_weights_within_a_thousandth(weights, seed):
    drawn = np.bincount(Draw(seed, weights).sources(0, 10**6), minlength=len(weights)) / 10**6
    assert abs(drawn - np.array(weights) / sum(weights)).max() < 3e-5


def test_other_seeds_draw_other_orders_of_the_same_shares():
    one, other = (Draw(seed, (1, 1)).sources(0, 5000) for seed in (0, 1))
    assert 0.3 < (one == other).mean() < 0.7
    steps = np.abs(np.diff(one))
    assert 0.3 < steps.mean() < 0.7  # in no regular turns


@pytest.mark.parametrize("before", [(), HISTORY])
def test_counts_are_those_of_the_sequence_also_where_weights_changed(before):
    draw = Draw(3, (1, 2, 0.001), before)
    sources = draw.sources(0, 9000)
    for n in (0, 1, 3, 1023, 1024, 1025, 1500, 1501, 1502, 5000, 5001, 8999, 9000):
        assert draw.counts(n) == np.bincount(sources[:n], minlength=3).tolist()
    for first, until in ((0, 10), (1000, 3000), (1499, 5002), (8000, 8001), (7, 7)):
        np.testing.assert_array_equal(draw.sources(first, until), sources[first:until])


def test_a_change_of_weights_changes_the_draw_from_its_sample_on():
    plain, changed = Draw(3, (1, 1)).sources(0, 4000), Draw(3, (9, 1), [(1700, (1, 1))]).sources(0, 4000)
    np.testing.assert_array_equal(changed[:1700], plain[:1700])
    assert (changed[1700:] == 0).mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("begin", [0, 5, WHOLE - 1, WHOLE + 77, 3**40])
def test_the_sum_of_floors_is_that_of_a_loop(begin):
    for n in (0, 1, 2, 7, 100, 999):
        assert _floors(n, begin) == sum((STEP * i + begin) // WHOLE for i in range(n))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Callable[..., tuple[Samples, ...]]:
    """Files in the cache, files that are not kept, and a prepared corpus."""
    folder = tmp_path_factory.mktemp("mixture")
    names = [write_files(folder / f"files-{i}", records=70 + 40 * i, files=2) for i in range(3)]
    prepare(PrepareConfig(sources=names[2], output=str(folder / "corpus"), workers=1))

    def parts(objective: str, reset: bool, packing: str) -> tuple[Samples, ...]:
        how = {"length": 50, "packing": packing, "objective": objective, "reset": reset}
        kept = {"cache": str(folder / "cache"), "later_epochs": "permutation"}
        return (
            StreamSpec(tuple(names[0]), "train", 0.05, 0.05, seed=1, shuffle_buffer=20, **how, **kept),
            StreamSpec(tuple(names[1]), "train", 0.05, 0.05, seed=2, shuffle_buffer=20, **how),
            CorpusSpec(str(folder / "corpus"), "train", seed=3, **how),
        )

    return parts


def plain(spec: MixtureSpec, samples: int) -> list[dict[str, list[int]]]:
    """The first samples, each taken alone from its own source."""
    finish = Finish(spec.objective, spec.seed, PROTEIN, spec.reset)
    alone = [part.taker(0) for part in spec.parts]
    counts, found = [0] * len(spec.parts), []
    for n, source in enumerate(spec.draw.sources(0, samples).tolist()):
        number = counts[source]
        counts[source] += 1
        taken = alone[source].take(np.array([number]), number + 1)
        rows, documents = taken.rows()

        class One:
            numbers = np.array([n])

            def __len__(self) -> int:
                return 1

            def rows(self):
                return rows, documents  # noqa: B023

        found.append({name: row[0].tolist() for name, row in finish.batch(One(), 1, {}).items()})
    return found


def rows_of(spec: MixtureSpec, start: int, steps: int, world: int, workers: int, accumulate: int = 1) -> list[dict]:
    """The samples of some steps in their global order, padding left out."""
    group, found = 12, {}
    for rank in range(world):
        how = {"batch_sequences": group // world // accumulate, "accumulate": accumulate}
        loader = Loader(TrainingBatches(spec, **how, rank=rank, world=world, start=start), workers)
        rows = []
        for batch in islice(loader, steps * accumulate):
            names = [name for name in ("tokens", "targets", "segments") if name in batch]
            for i in range(len(batch["tokens"])):
                real = batch["tokens"][i] != PROTEIN.pad
                rows.append({name: batch[name][i][real].tolist() for name in names})
        assert int(batch["samples"]) == start + steps * group
        found.update(zip(range(rank, steps * group, world), rows, strict=True))
    return [found[number] for number in range(steps * group)]


@pytest.mark.parametrize(("packing", "reset"), [("concat", False), ("concat", True), ("crop", False)])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_batches_hold_the_samples_of_a_plain_loop_for_any_ranks_and_workers(parts, objective, packing, reset):
    draw = Draw(5, (3, 1, 2), [(60, (1, 1, 1)), (100, (1, 5, 1))])
    spec = MixtureSpec(("a", "b", "c"), parts(objective, reset, packing), draw, 9, reset)
    expected = plain(spec, 36 * 12)
    for start, world, workers, accumulate in ((0, 1, 0, 1), (84, 2, 1, 1), (120, 4, 0, 3), (240, 3, 2, 2)):
        found = rows_of(spec, start, 8, world, workers, accumulate)
        assert found == expected[start : start + 96], (start, world)


def test_targets_of_a_step_are_counted_over_all_sources(parts):
    spec = MixtureSpec(("a", "b", "c"), parts("masked", False, "crop"), Draw(5, (1, 1, 1)), 9)
    for world in (1, 2):
        for rank in range(world):
            makes = spec.training(0, Share(6 // world, 2, rank, world))
            for _ in range(4):
                batches = [make() for make in islice(makes, 2)]
                scored = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
                assert [int(batch["step_targets"]) for batch in batches] == [scored] * 2


def test_an_evaluation_takes_each_source_whole_and_says_which(parts):
    spec = MixtureSpec(("a", "b", "c"), parts("causal", False, "crop"), Draw(5, (1, 1, 1)), 9)
    for most in (None, 5):
        share = Share(4, 1, 0, 1)
        alone = [[make() for make in part.evaluation(share, most)] for part in spec.parts]
        found = [make() for make in spec.evaluation(share, most)]
        assert [int(batch["part"]) for batch in found] == [i for i, some in enumerate(alone) for _ in some]
        for batch, other in zip(found, [batch for some in alone for batch in some], strict=True):
            np.testing.assert_array_equal(batch["targets"], other["targets"])


def test_passes_over_each_source_are_counted_where_its_size_is_known(parts):
    spec = MixtureSpec(("a", "b", "c"), parts("causal", False, "crop"), Draw(5, (3, 1, 2)), 9)
    list(islice(spec.training(0, Share(4, 1, 0, 1)), 60))  # until the first is in the cache
    counts = spec.draw.counts(500)
    sizes = [sum(len(batch["tokens"]) for batch in _once(part)) for part in spec.parts]
    assert spec.epochs(500) == {"a": counts[0] / sizes[0], "c": counts[2] / sizes[2]}


def _once(part: Samples) -> list[dict]:
    """Records of the split, one each: of crops from the beginning."""
    import dataclasses

    return [make() for make in dataclasses.replace(part, crop="first").evaluation(Share(1, 1, 0, 1))]  # type: ignore[type-var]


def test_sources_of_wide_tokens_mix_with_padding(write):
    """A tokenizer's ids need more than a byte, and rows of two sources have two widths."""
    sources = [write(f"{i}.txt", "\n".join("ab" * (i * 9 + 1) for _ in range(9)) + "\n") for i in range(2)]
    how = {"reading": Reading("lines", "bytes"), "shuffle_buffer": 1}
    parts = tuple(StreamSpec((source,), None, 0, 0, 30, "crop", "causal", 0, **how) for source in sources)
    spec = MixtureSpec(("a", "b"), parts, Draw(1, (1, 1)), 0)
    batch = next(spec.training(0, Share(16, 1, 0, 1)))()
    lengths = (batch["tokens"] != parts[0].vocabulary.pad).sum(1)
    assert set(lengths.tolist()) == {3, 21}
