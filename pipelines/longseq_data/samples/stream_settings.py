"""What the samples of streamed files and their order depend on."""

from __future__ import annotations

from dataclasses import dataclass, field

from longseq_data.ingest.follow import Tell
from longseq_data.ingest.ring import Ring
from longseq_data.readers.documents import DocumentEncoder
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.splits import SplitRule
from longseq_data.vocabulary import InfillVocabulary, Vocabulary

from .infilling import check_infilling
from .rows import check_choices


@dataclass(frozen=True)
class StreamSettings:
    """Everything that the samples and their order depend on."""

    sources: tuple[str, ...]  # as expand_sources gives them; see ``reading``
    split: str | None  # "train", "valid" or "test"; None: every record
    valid_fraction: float  # of the records, by a hash: see ``split_by``
    test_fraction: float
    length: int  # tokens that the model sees at once
    packing: str  # "crop": one record one sample; "concat": records joined by EOS, cut into full windows
    objective: str  # "causal" or "masked"
    seed: int
    shuffle_buffer: int = 10_000  # records, and never more than BUFFER_RESIDUES (2^26) residues
    strict: bool = False  # refuse letters outside the alphabet instead of mapping them to X, and text that is not UTF-8
    reading: Reading = FASTA  # the sources' format, and what their tokens are
    reset: bool = False  # "concat": documents [BOS] ... [EOS] that do not see each other, with segment numbers
    crop: str = "random"  # "crop": where a record longer than the window is cropped, "random" or its "first" tokens
    split_by: str = "id"  # or "sequence", of records that have residues: see splits.SplitRule
    reverse_complement: bool = False  # of DNA: half of the training samples come as the other strand
    reverse: float = 0.0  # the share of the training samples whose records are read from their last token on
    fim_rate: float | None = None  # of causal training samples: so much of the documents is laid out for infilling
    infilled: bool = False  # evaluations have all documents laid out, and score what is filled in
    measured: bool = False  # samples know how many bytes and words their targets stand for; slower, for evaluation
    later_epochs: str = "buffer"  # the order after the first: through the buffer as well, or a "permutation" of all
    # records, which needs a cache
    cache: str | None = None  # the folder of the sources' blocks; None: see ``ring``
    ring: Ring | None = field(default=None, compare=False)  # blocks of a training without a cache; None: every reader
    # parses for itself
    tell: Tell | None = field(default=None, compare=False)  # gets what is worth a warning

    def __post_init__(self) -> None:
        check_choices(
            self, later_epochs=("buffer", "permutation"), crop=("random", "first"), packing=("crop", "concat")
        )
        check_choices(self, objective=("causal", "masked"), split=("train", "valid", "test", None))
        check_infilling(self.objective, self.fim_rate)
        if self.reset and self.packing != "concat":
            raise ValueError("reset is about concatenated documents: packing must be 'concat'")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, not {self.length}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 record, not {self.shuffle_buffer}")
        if min(self.valid_fraction, self.test_fraction) < 0 or self.valid_fraction + self.test_fraction > 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} must not be negative, "
                f"nor more than 1 together"
            )

    @property
    def rule(self) -> SplitRule:
        by = self.split_by if self.reading.has_residues else "id"
        return SplitRule(self.valid_fraction, self.test_fraction, by)

    @property
    def vocabulary(self) -> Vocabulary:
        tokens = self.reading.vocabulary
        return tokens if self.fim_rate is None else InfillVocabulary.of(tokens)

    @property
    def whole(self) -> bool:
        """Whether all records are of the split."""
        return self.split is None or (self.split == "train" and not self.valid_fraction and not self.test_fraction)

    @property
    def overlap(self) -> int:
        """Tokens that a window has beyond ``length``: a causal one needs the target of its last position."""
        return 1 if self.objective == "causal" else 0

    @property
    def encoder(self) -> DocumentEncoder:
        """What turns this stream's windows into tokens."""
        return DocumentEncoder(self.vocabulary)
