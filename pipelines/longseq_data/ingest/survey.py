"""A look at the first blocks of every source before a run is started, whatever its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longseq_data.readers.fasta import NUCLEOTIDES, NUCLEOTIDES_SENTENCE, PEPTIDE
from longseq_data.readers.reading import Reading
from longseq_data.splits import Identifiers, Split, SplitRule
from longseq_data.vocabulary import ALPHABETS, PROTEINS, TABLE, X

from .block import Block
from .follow import Road
from .process import OPEN

MIB = 1 << 20
UNITS = {"protein": "residues", "dna": "bases", "pixels": "colour values"}
QUICK = ("protein", "dna", "bytes")  # tokens; others are slow to make
SLOW_BYTES = MIB  # of each source of others
HUB_BYTES = 4 * MIB  # of each dataset, as they come over the network
EVERYTHING = SplitRule(0.0, 0.0)  # is for training
_NUCLEIC = np.isin(np.arange(256), [X, *(TABLE[letter] for letter in NUCLEOTIDES)])  # by id; X says nothing


@dataclass
class Report:
    """What a look at the data found."""

    unit: str
    other: str  # what unknown letters are read as
    records: int = 0
    residues: int = 0  # or bytes of text, or pictures' colour values: see ``unit``
    identifiers: Identifiers = field(default_factory=Identifiers)
    unknown: Counter[str] = field(default_factory=Counter)  # letters outside the alphabet
    notes: list[str] = field(default_factory=list)  # where the first one of each source is
    complete: bool = True  # False: the budget ended before the data did
    mistaken: str | None = None  # see Reading.mistaken
    proteins: bool = False  # whether any record has a letter that nucleotides do not have

    @property
    def splits(self) -> Counter[Split]:
        """Records of each split."""
        return self.identifiers.splits

    @property
    def warning(self) -> str | None:
        """What these data probably are instead of proteins, or text, as a sentence."""
        suspect = self.unit == "residues" and self.residues >= PEPTIDE and not self.proteins
        return NUCLEOTIDES_SENTENCE if suspect else self.mistaken

    def look_at(self, block: Block, rule: SplitRule) -> int:
        """Take up a block; gives the bytes of its tokens, or of its texts."""
        held = len(block.tokens) if block.texts is None else sum(map(len, block.texts))
        self.records += len(block)
        self.residues += held
        self.unknown.update(block.unknown)
        self.notes += block.notes
        if self.unit == "residues" and not self.proteins:
            self.proteins = not _NUCLEIC[block.tokens].all() or bool(set(block.unknown) - set("-.*"))
        for name, place in zip(block.identifiers, block.places(rule.by).tolist(), strict=True):
            self.identifiers.put(name.decode("utf-8", "surrogateescape"), place, rule)
        return held


def survey(
    reading: Reading,
    sources: Sequence[str],
    *,
    strict: bool,
    max_bytes: int = 16 * MIB,
    total_bytes: int = 64 * MIB,
    rule: SplitRule = EVERYTHING,
    cache: str | None = None,
) -> Report:
    """What is wrong should be said in a run's first seconds: the first blocks of every source.

    Reads at most about ``max_bytes`` of tokens of each file and ``total_bytes`` of all, but a block of each source in
    any case. Without a ``rule`` every record counts as training. A split that has no record in a complete report is
    empty.

    cache: where somebody has begun to keep the blocks of these sources; None: they are parsed here.

    Raises the readers' DataErrors.
    """
    alphabet = ALPHABETS.get(reading.tokens, PROTEINS)
    report = Report(UNITS.get(reading.tokens, "bytes of text"), alphabet.other)
    opened = [reading.leaves([source]) for source in sources]
    leaves = [leaf for some in opened for leaf in some]
    report.mistaken = reading.mistaken(leaves)
    kept, alone = Road(reading, leaves, strict, Path(cache) if cache else None), Road(reading, leaves, strict)
    if not reading.has_residues:
        rule = SplitRule(rule.valid, rule.test)
    most = max_bytes if reading.tokens in QUICK else min(max_bytes, SLOW_BYTES)
    most = min(most, total_bytes // max(1, min(len(leaves), OPEN)))  # blocks come of so many at a time
    total = 0
    for some in opened:
        for number, leaf in enumerate(some):
            if number and total >= total_bytes:
                report.complete = False
                break
            left = min(HUB_BYTES if leaf.format == "hub" else most, total_bytes - total)
            seen = 0
            # what has not been begun would be waited for, only to look at its first blocks
            near = left > 0 and (len(leaves) <= OPEN or kept.begun(leaf))
            with closing((kept if near else alone).blocks(leaf)) as blocks:
                for count, block in enumerate(blocks):
                    if count and seen >= left:
                        report.complete = False
                        break
                    seen += report.look_at(block, rule)
            total += seen
    return report
