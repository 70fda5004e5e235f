"""Samples of a prepared corpus in an endless, stateless order: any of them is found without those before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count

import numpy as np
import numpy.typing as npt

from longseq_data.corpus.corpus import Corpus
from longseq_data.randomness import generator
from longseq_data.readers.documents import Extent
from longseq_data.vocabulary import ALPHABETS, InfillVocabulary, Vocabulary

from .buckets import block_samples, cut_block
from .corpus_cuts import Crops, Cut, Joined, Plan, rounds
from .families import Families
from .infilling import Infilling, check_infilling
from .members import Members
from .order import permutation
from .rank_share import MakeBatch, Share, even
from .rows import Arrays, Finish, Integers, check_choices, turn_of

PLANNED = 4096  # samples of a rank, at once: a plan costs a hundred small steps of NumPy
PACKINGS = ("concat", "crop", "bucket", "family")
LOOK = 1 << 16  # samples from which the mean length is taken; they are stored in a random order


class _Taker:
    """Nothing is kept: any sample is found without those before it."""

    ahead = PLANNED

    def __init__(self, spec: CorpusSpec) -> None:
        self._spec = spec

    def take(self, numbers: Integers, until: int) -> Plan:
        return self._spec.planned(numbers)


@dataclass(frozen=True)
class CorpusSpec:
    """Everything that the samples of a prepared corpus and their order depend on. See streaming.StreamSpec."""

    path: str
    split: str  # "train", "valid", "test" or "ood"
    length: int  # tokens that the model sees at once
    packing: str  # "concat": the stream of all records in full windows; "crop": one record a sample;
    # "bucket": the same, in steps of similar lengths within batch_tokens; "family": a cluster a sample, in such steps
    objective: str  # "causal" or "masked"
    seed: int
    reset: bool = False  # "concat": documents [BOS] ... [EOS] that do not see each other, with segment numbers
    crop: str = "random"  # where a record longer than the window is cropped, "random" or its "first" tokens
    batch_tokens: int = 0  # "bucket", "family": of one step over all ranks, padding included
    measured: bool = False  # evaluations know how many bytes and words their targets stand for
    members: str | None = None  # a file of prepare.members. "crop", "bucket": an epoch takes one of each cluster;
    # "family": which records make one
    reverse_complement: bool = False  # of DNA: half of the training samples come as the other strand
    reverse: float = 0.0  # the share of the training samples whose records are read from their last token on
    fim_rate: float | None = None  # of causal training samples: so much of the documents is laid out for infilling
    infilled: bool = False  # evaluations have all documents laid out, and score what is filled in

    def __post_init__(self) -> None:
        check_choices(self, packing=PACKINGS, objective=("causal", "masked"), crop=("random", "first"))
        check_infilling(self.objective, self.fim_rate)
        if self.reset and self.packing != "concat":
            raise ValueError("reset is about concatenated documents: packing must be 'concat'")
        if self.members and self.packing == "concat":
            raise ValueError("members are whole records: packing must be 'crop', 'bucket' or 'family'")
        if self.packing == "family" and not self.members:
            raise ValueError("families need members")
        if self.packing == "family" and self.crop != "random":
            raise ValueError("families are cut where the window ends: crop must be 'random'")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, not {self.length}")
        if self.by_length and self.batch_tokens < self.length:
            raise ValueError(f"batch_tokens {self.batch_tokens} must be at least one sample of {self.length} tokens")

    @property
    def by_length(self) -> bool:
        """Whether steps are of samples of similar lengths."""
        return self.packing in ("bucket", "family")

    @cached_property
    def corpus(self) -> Corpus:
        """Raises DataError where there is no whole corpus with this split."""
        return Corpus.open(self.path, self.split)

    @property
    def vocabulary(self) -> Vocabulary:
        tokens = self.corpus.vocabulary
        return tokens if self.fim_rate is None else InfillVocabulary.of(tokens)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.path,)

    @cached_property
    def cut(self) -> Cut:
        if self.packing == "concat":
            return Joined(self.corpus, self.length, self.objective, self.seed, self.reset)
        members = Members(self.members) if self.members else None
        if self.packing == "family":
            assert members is not None
            return Families(self.corpus, self.length, self.objective, self.seed, members)
        return Crops(self.corpus, self.length, self.objective, self.seed, self.crop, members)

    @property
    def epoch_samples(self) -> int:
        """Samples of one pass over the corpus."""
        return self.cut.epoch

    def epochs(self, samples: int) -> dict[str, float]:
        return {"": samples / self.epoch_samples}

    def begin(self) -> None:
        """Nothing is left to do."""

    def measuring(self) -> CorpusSpec:
        """The same with ``measured`` where the losses add up to the probability of text or images."""
        return replace(
            self, measured=not self.infilled and self.vocabulary.name not in ALPHABETS and self.objective == "causal"
        )

    def infilling(self) -> CorpusSpec:
        """See rank_share.Samples."""
        return replace(self, infilled=True)

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """See rank_share.Samples. Rows of ``by_length`` vary from step to step; inside a step its rest comes first.

        Raises DataError where there is no whole corpus.
        """
        if self.by_length:
            return self._bucketed(start, share)
        return even(self.taker(start), self._finish(training=True), start, share)

    def taker(self, start: int, warn: bool = False) -> _Taker:
        return _Taker(self)

    def planned(self, numbers: Integers) -> Plan:
        """Training samples by their numbers."""
        plan = self.cut.plan(numbers)
        return replace(plan, turn=turn_of(self))

    def _finish(self, *, training: bool) -> Finish:
        tokens, length = self.vocabulary, self.length
        infilling = Infilling.of(self.fim_rate, self.infilled, self.seed, tokens, length, training=training)
        return Finish(self.objective, self.seed, tokens, self.reset, infilling)

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        """See rank_share.Samples. The whole split in its order, or ``max_samples`` drawn from it whatever the seed."""
        plans = self.cut.evaluation(sampled=max_samples is not None)
        for plan in rounds(plans, share.step_samples, max_samples):
            yield partial(self._scored, plan[share.rank :: share.world], share.batch_sequences)

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        """See rank_share.Samples; ``max_targets``: of about so many, from records drawn at random."""
        corpus, counts, seen, chunk = self.corpus, np.zeros(self.vocabulary.size, dtype=np.int64), 0, 256
        causal, first = self.objective == "causal", self.packing != "concat" and self.crop == "first"
        for begin in range(0, len(corpus), chunk):
            records = np.arange(begin, min(begin + chunk, len(corpus)))
            if max_targets is not None:
                records = permutation(len(corpus), 0, 0)(records)
            lengths = corpus.lengths(records)
            kept = np.minimum(lengths, self.length if causal else self.length - 1) if first else lengths
            for start, size in zip(corpus.offsets[records].tolist(), kept.tolist(), strict=True):
                counts += np.bincount(corpus.read(start, start + size), minlength=counts.size)
            if causal and self.vocabulary.closed:
                counts[self.vocabulary.eos] += int((kept < self.length).sum()) if first else len(records)
            seen = int(counts.sum())
            if max_targets is not None and seen >= max_targets:
                break
        return counts

    def _bucketed(self, start: int, share: Share) -> Iterator[MakeBatch]:
        finish = self._finish(training=True)
        # Records, and clusters, are stored in a random order. Of members that are drawn, all records tell the mean.
        many = self.epoch_samples if self.packing == "family" else len(self.corpus)
        whole = self.cut.whole(np.arange(min(LOOK, many)))
        extra = self.objective == "causal"  # the token that is only a target
        size = block_samples(float(np.minimum(whole - extra, self.length).mean()), self.batch_tokens)
        for block in count(start // size):
            plan = self.planned(np.arange(block * size, (block + 1) * size))
            sizes, scored = plan.sizes, finish.scored(plan)
            if finish.infilling is not None:
                sizes = finish.infilling.sizes(plan.pieces(), plan.numbers)
            steps = cut_block(sizes - extra, self.batch_tokens)
            consumed = block * size
            for number in np.argsort(generator(self.seed, "bucket", block).random(len(steps)), kind="stable").tolist():
                before, consumed = consumed, consumed + len(steps[number])
                if consumed <= start:
                    continue
                step = steps[number][max(0, start - before) :]  # a run in other steps may have stopped inside this one
                mine = step[share.rank :: share.world]
                facts = {"step_targets": int(scored[mine].sum()), "samples": consumed}
                rows = -(-len(step) // (share.world * share.accumulate))
                for micro_batch in range(share.accumulate):
                    yield partial(finish.batch, plan[mine[micro_batch :: share.accumulate]], rows, facts)

    def _scored(self, plan: Plan, rows: int) -> Arrays:
        finish = self._finish(training=False)
        if not self.measured:
            return finish.batch(plan, rows, {})
        found = Extent(0, 0)
        for record, first, last in plan.cut.spans(plan) if len(plan) else ():
            if last > first:
                found = found.plus(self.corpus.measure(record, first, last))
        return finish.batch(plan, rows, {"bytes": found.bytes, "words": found.words})
