"""For a new run: how long the parts of few short texts are. No torch here."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from longseq.config.schema import Config
from longseq_data.corpus.corpus import is_corpus
from longseq_data.readers.reading import Reading
from longseq_data.splits import split_of

# Texts of more stored bytes have enough parts for every split.
_SHORT = 1 << 25
_LEAST_PART = 64  # bytes, as of the key


def fit_parts(config: Config) -> None:
    """For a new run: read few short texts in parts small enough for each share held out of them, and say so.

    The sources are resolved. Nothing changes where the parts of data.part_bytes fill the training and validation split.
    """
    data = config.data
    if any(map(is_corpus, data.files("train"))):
        return
    shares = 0.0 if data.valid else data.valid_fraction, 0.0 if data.test else data.test_fraction
    wanted = {"train", *(["valid"] if shares[0] and config.trainer.valid_every else [])}
    leaves = Reading(format=data.format).leaves(data.files("train"))
    texts = all(leaf.format == "text" and Path(leaf.source).is_file() for leaf in leaves)
    if not any(shares) or not texts or sum(Path(leaf.source).stat().st_size for leaf in leaves) > _SHORT:
        return

    def splits(part_bytes: int) -> Counter[str]:
        """Bytes of each."""
        read, found = Reading(format="text", tokens="bytes", part_bytes=part_bytes), Counter[str]()
        for leaf in leaves:
            for text in read.texts(leaf, strict=False):
                found[split_of(text.identifier, *shares)] += len(text.data)
        return found

    before = splits(data.part_bytes)
    if wanted <= set(before):
        return
    size, total = data.part_bytes, sum(before.values())
    while size >= 2 * _LEAST_PART and size > total:
        size //= 2
    while size >= 2 * _LEAST_PART:
        size //= 2
        found = splits(size)
        held = dict(zip(("valid", "test"), shares, strict=True))
        if found["train"] and all(
            found[name] and found[name] < 2 * share * total for name, share in held.items() if share
        ):
            data.part_bytes = size
            print(
                f"data.train: {total:,} bytes of text are too few parts to hold some out, so it is read in parts of "
                f"data.part_bytes={size}: {found['train']:,} bytes to train on, {found['valid']:,} to validate on and "
                f"{found['test']:,} for the test. Name files in data.valid and data.test to read it whole.",
                file=sys.stderr,
            )
            return
