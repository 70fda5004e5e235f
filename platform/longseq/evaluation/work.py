"""What is done to a file's records, batch by batch, in one process or in shards: scores, effects, vectors, counts.

``field/`` has more, of assays and of chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from longseq.evaluation.context import Asked, Read, again, contexts, read
from longseq.evaluation.field.contacts import Pairs
from longseq.evaluation.field.proteingym import Assays
from longseq.evaluation.field.structure import Residues
from longseq.evaluation.likelihood import Share, causal, pseudo, share_effects, shares
from longseq.evaluation.records import Record, batches, records
from longseq.evaluation.shards import Group, Job, Row, Work
from longseq.evaluation.tallies import Tallies
from longseq.evaluation.variant_request import Variants, asked_for
from longseq.evaluation.vector_work import Vectors
from longseq_data.vocabulary import Tokens

Fields = dict[str, Any]

_STATE = 64  # tokens that a state is counted for: megabytes, however short a row is


class _InContext(Work[Group, Row]):
    """Options: context, the fields of context.Asked; both, whether both directions are read."""

    @property
    def both(self) -> bool:
        return bool(self.job.options.get("both"))

    @cached_property
    def before(self) -> list[Tokens]:
        return contexts(self.source, Asked(*self.job.options.get("context", ())))

    @cached_property
    def contexts(self) -> list[Read]:
        return read(self.model, self.before)

    def cost(self, length: int) -> int:
        """What a row of so many tokens counts for in a batch: behind a context it has a state, or the context, too."""
        if not self.before:
            return length
        spec = self.source.config.performer_spec(self.source.vocabulary.size)
        return max(length, _STATE) + max(len(row) if again(spec, len(row)) else 0 for row in self.before)


class Scores(_InContext[list[Record], Fields]):
    """Log-likelihoods of records: the fields of SequenceScore. Option: passes."""

    def groups(self) -> Iterator[list[Record]]:
        return batches(records(self.source, self.job.file), lambda record: self.cost(len(record.row)))

    def rows(self, group: list[Record]) -> list[Fields]:
        vocabulary, passes = self.source.vocabulary, self.job.options["passes"]
        if self.source.causal:
            found = causal(self.model, vocabulary, [record.row for record in group], self.contexts, self.both)
        else:
            found = [pseudo(self.model, vocabulary, record.row, passes) for record in group]
        return [
            {
                "id": record.identifier,
                "length": record.length,
                "log_likelihood": value,
                "pseudo": not self.source.causal,
            }
            for record, value in zip(group, found, strict=True)
        ]


class Effects(_InContext[Share, tuple[int, float]]):
    """Effects of variants: their numbers among those asked for, and the effects. Options: variants, table."""

    @cached_property
    def asked(self) -> Variants:
        return asked_for(self.source, self.job.file, self.job.options["variants"], self.job.options["table"])

    def groups(self) -> Iterator[Share]:
        return iter(
            shares(self.asked.wild, self.asked.variants, self.source.causal, self.cost(len(self.asked.wild.row)))
        )

    @cached_property
    def _of_share(self) -> Any:
        wild, variants = self.asked.wild, self.asked.variants
        vocabulary, is_causal = self.source.vocabulary, self.source.causal
        return share_effects(self.model, vocabulary, wild, variants, is_causal, self.contexts, self.both)

    def rows(self, group: Share) -> list[tuple[int, float]]:
        return list(zip([number for alike in group for number in alike], self._of_share(group), strict=True))


_KINDS: dict[str, type[Work[Any, Any]]] = {
    "score": Scores,
    "effects": Effects,
    "embed": Vectors,
    "evaluate": Tallies,
    "proteingym": Assays,
    "contacts": Pairs,
    "structure": Residues,
}


def work_of(job: Job) -> Work[Any, Any]:
    """What a job asks for."""
    return _KINDS[job.kind](job)
