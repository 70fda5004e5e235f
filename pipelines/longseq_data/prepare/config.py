"""What `longseq data prepare` is asked for: every key with its type, default and meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longseq_data.cores import cores
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.readers.formats import FORMATS, Leaf
from longseq_data.readers.reading import PART_BYTES, TABLES, TOKENS, Reading, agree
from longseq_data.splits import SplitRule

PFAM = re.compile(r"PF\d{5}")

SPLIT_BY = ("sequence", "id", "cluster")

# Keys that came later, with what the versions before did.
ADDED: dict[str, object] = {
    "split_by": "id",
    "clusters": "mmseqs",
    "cluster_identity": 0.3,
    "cluster_coverage": 0.8,
    "format": ["fasta"],
    "tokenizer": "protein",
    "column": None,
    "part_bytes": None,
    "image_size": None,
}

# Keys that change how the work is done, and not what comes out.
NOT_CONTENT = ("output", "workers", "memory_mb")


def key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that carries its meaning and its limits, as the keys of a run's configuration do."""
    metadata = {"meaning": meaning, "choices": choices, "at_least": at_least, "below": below}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PrepareConfig:
    """A corpus to prepare. Call ``check`` before use."""

    sources: list[str] = key(
        [],
        "files, plain or compressed: paths, globs, URLs; folders of text, tables or images; "
        "hub:OWNER/NAME[:CONFIG]#SPLIT",
    )
    output: str = key("", "folder of the prepared corpus, to be made")
    format: str = key(
        "auto",
        "of all files; auto: by their names, FASTA where they say nothing (UniProt's .dat and .xml too); lines: a "
        "document a line; jsonl, parquet and hub have columns",
        choices=("auto", *FORMATS),
    )
    tokenizer: str = key(
        "auto",
        "what the tokens are: protein, dna, bytes (of text), pixels, or a Hugging Face tokenizers FILE.json, which is "
        "copied into the corpus; auto: protein for FASTA, pixels for images, else bytes",
    )
    column: str | None = key(None, "field of a table with the text or image; default: text, or image with pixels")
    part_bytes: int = key(PART_BYTES, "a longer text is several records, cut at the end of a line", at_least=64)
    image_size: int = key(64, "pixels on each side of an image, cropped and scaled down to it", at_least=1)
    min_length: int = key(1, "leave out shorter records (tokens)", at_least=1)
    max_length: int | None = key(None, "leave out longer records (tokens); null: no limit", at_least=1)
    include_taxids: list[int] = key([], "keep only records of these TaxIDs, as headers give them; empty: all")
    exclude_taxids: list[int] = key([], "leave out records of these TaxIDs, as headers give them")
    unknown: str = key(
        "x",
        "letters outside the alphabet: x reads them as X (N in DNA), refuse stops at the first one, drop leaves out "
        "records with more X than max_unknown; text that is not UTF-8, which tokenizer=bytes takes as it is, is "
        "refused by refuse, else read as U+FFFD",
        choices=("x", "refuse", "drop"),
    )
    max_unknown: float = key(
        0.1, "with unknown=drop: largest share of X in a record, of unknown letters too", at_least=0, below=1
    )
    deduplicate: bool = key(
        True, "of records with the same tokens keep the one with the smallest id; held out if one of them is"
    )
    split_by: str | None = key(
        None,
        "what is hashed to hold records out: sequence (the tokens); id; or cluster, which holds whole clusters of "
        "similar sequences out; null: sequence, but id for text and images, as while streaming them, and where a "
        "corpus or an unfinished preparation of a version before goes on",
        choices=SPLIT_BY,
    )
    clusters: str = key(
        "mmseqs",
        "with split_by=cluster: a TSV of representative and member, plain or gzipped, as MMseqs2 and UniRef have it; "
        "repid: RepID of UniRef's headers; mmseqs: MMseqs2 clusters the records, then clusters of held-out records "
        "that have a relative in train go there, until a search finds none",
    )
    cluster_identity: float = key(
        0.3, "with clusters=mmseqs: records at least this identical are relatives", at_least=0.2, below=1
    )
    cluster_coverage: float = key(
        0.8, "with clusters=mmseqs: where the alignment covers at least this share of a record", at_least=0.1, below=1
    )
    valid_fraction: float = key(0.05, "share of the records, or clusters, held out by a hash", at_least=0, below=1)
    test_fraction: float = key(0.05, "another such share", at_least=0, below=1)
    ood_ids: str | None = key(None, "file of ids or accessions, one a line: these records form the ood split")
    ood_taxids: list[int] = key([], "records of these TaxIDs, as headers give them, form the ood split")
    ood_pfam_map: str | None = key(
        None, "TSV of ids and their Pfam accessions, as UniProt exports it (columns Entry and Pfam)"
    )
    ood_pfam: list[str] = key([], "records of these Pfam families form the ood split; needs ood_pfam_map")
    ood_pfam_random: int = key(
        0, "hold out so many families of ood_pfam_map, drawn by seed (Choromanski et al.: 20)", at_least=0
    )
    seed: int = key(0, "draws the families of ood_pfam_random", at_least=0)
    workers: int = key(0, "processes; 0: one for each core", at_least=0)
    memory_mb: int = key(2048, "memory for all processes together, as a guide (MiB)", at_least=64)

    def check(self) -> None:
        """Raise DataError for values that cannot go together; each sentence names the key."""
        if not self.sources:
            raise DataError("sources is empty: name files, sources='[a.fasta.gz,b.fasta.gz]'.")
        if not self.output.strip():
            raise DataError("output is missing: name the folder to be made, output=data/uniref50.")
        if self.max_length is not None and self.max_length < self.min_length:
            raise DataError(f"max_length={self.max_length} is below min_length={self.min_length}: raise it.")
        if self.valid_fraction + self.test_fraction >= 1:
            raise DataError(
                f"valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} leave nothing to train "
                f"on: lower them."
            )
        both = sorted(set(self.include_taxids) & set(self.exclude_taxids))
        if both:
            raise DataError(f"TaxID {both[0]} is in include_taxids and in exclude_taxids: remove one of them.")
        lost = sorted(set(self.ood_taxids) & set(self.exclude_taxids))
        if lost:
            raise DataError(f"TaxID {lost[0]} is in ood_taxids and in exclude_taxids: remove one of them.")
        if self.include_taxids and (rest := sorted(set(self.ood_taxids) - set(self.include_taxids))):
            raise DataError(f"TaxID {rest[0]} of ood_taxids is not in include_taxids: add it there.")
        for family in self.ood_pfam:
            if not PFAM.fullmatch(family):
                raise DataError(f"ood_pfam: {family!r} is no Pfam accession; write it as PF00042.")
        if (self.ood_pfam or self.ood_pfam_random) and self.ood_pfam_map is None:
            raise DataError("ood_pfam_map is missing: no header says which records belong to a family.")
        if self.ood_pfam_map is not None and not (self.ood_pfam or self.ood_pfam_random):
            raise DataError("ood_pfam_map alone holds nothing out: set ood_pfam or ood_pfam_random.")
        if self.ood_pfam and self.ood_pfam_random:
            raise DataError("ood_pfam and ood_pfam_random are both set: keep one of them.")

    def reading(self, sources: list[str]) -> Reading:
        """How the sources become tokens. Raises DataError where they do not go together, or keys do not fit them."""
        name = self.tokenizer if self.tokenizer in ("auto", *TOKENS) else str(user_path(self.tokenizer).absolute())
        tokens = agree(sources, self.format, name)
        read = Reading(self.format, tokens, self.column, self.image_size, self.part_bytes)
        if self.unknown == "drop" and not read.has_residues:
            raise DataError(f"unknown=drop counts letters outside an alphabet, and {tokens} have none: leave it out.")
        by = self.clusters if self.clusters in ("mmseqs", "repid") else None
        if self.split_by == "cluster" and by and tokens != "protein":
            raise DataError(f"clusters={by} is for proteins, and these are {tokens}: name a TSV, or another split_by.")
        return read

    @property
    def rule(self) -> SplitRule:
        """Where records go that no cluster decides on."""
        by = "sequence" if self.split_by in (None, "cluster") else str(self.split_by)
        return SplitRule(self.valid_fraction, self.test_fraction, by)

    @property
    def cluster_table(self) -> str | None:
        """The TSV of clusters, where one is named."""
        named = self.split_by == "cluster" and self.clusters not in ("mmseqs", "repid")
        return self.clusters if named else None

    @property
    def processes(self) -> int:
        """``workers``, or the number of cores that this process may use."""
        return self.workers or cores()

    def content(self, read: Reading, leaves: Sequence[Leaf]) -> dict[str, object]:
        """The keys that decide what comes out, with their values; lists without order are sorted.

        Those that say how files are read come as what they mean, null where they mean nothing.
        """
        values = {name: value for name, value in vars(self).items() if name not in (*NOT_CONTENT, "sources")}
        values["split_by"] = self.rule.by if self.split_by != "cluster" else "cluster"
        formats = {leaf.format for leaf in leaves}
        texts = read.tokens != "pixels" and formats != {"fasta"}
        values["format"] = list(formats)
        values["tokenizer"] = read.kept_name
        values["column"] = (self.column or ("text" if texts else "image")) if formats & {*TABLES} else None
        values["part_bytes"] = self.part_bytes if texts else None
        values["image_size"] = self.image_size if read.tokens == "pixels" else None
        return {name: sorted(set(value)) if isinstance(value, list) else value for name, value in values.items()}
