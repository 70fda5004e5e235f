"""What a prepared corpus says of itself: manifest.json, next to the folders of its splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError
from longseq_data.vocabulary import BUILT_IN, Vocabulary

FORMAT = 1
MANIFEST = "manifest.json"
OFFSETS = "offsets.npy"  # of a split: where each record begins
QUANTILES = (1, 5, 25, 50, 75, 95, 99)
EXACT_LENGTHS = 4096  # longer ones are counted with three digits, so that there are few different ones


@dataclass(frozen=True)
class Source:
    name: str
    size: int  # bytes as stored
    sha256: str


@dataclass(frozen=True)
class DataFile:
    name: str  # relative to the corpus
    size: int  # bytes
    sha256: str
    rows: int | None = None  # of an Arrow file


@dataclass
class Lengths:
    """Lengths of records in tokens."""

    shortest: int = 0
    longest: int = 0
    quantiles: dict[str, int] = field(default_factory=dict)  # percent -> length; to three digits above EXACT_LENGTHS
    histogram: dict[str, int] = field(default_factory=dict)  # k -> records whose length is in [2^k, 2^(k+1))


@dataclass
class SplitInfo:
    records: int
    tokens: int
    digest: str  # of its rows in their order
    lengths: Lengths
    files: list[DataFile]


@dataclass
class Manifest:
    fingerprint: str  # equal for corpora with the same samples in the same order
    vocabulary: Vocabulary  # a tokenizer's file lies in the corpus
    splits: dict[str, SplitInfo]
    settings: dict[str, object]  # the keys of PrepareConfig that decide the content
    sources: list[Source]
    report: dict[str, object]  # what was read, filtered and dropped: see prepare.Report
    inputs: list[Source] = field(default_factory=list)  # lists that the settings name
    files: list[DataFile] = field(default_factory=list)  # besides those of the splits, but for the manifest itself
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def text(self) -> str:
        return json.dumps({**asdict(self), "vocabulary": _stored(self.vocabulary)}, indent=1) + "\n"


def _stored(vocabulary: Vocabulary) -> dict[str, object]:
    """The same wherever the corpus lies."""
    return asdict(replace(vocabulary, name=Path(vocabulary.name).name))


def fingerprint(vocabulary: Vocabulary, splits: dict[str, SplitInfo]) -> str:
    """A hash of what decides the samples: the token set, and ids, tokens and TaxIDs of every split in their order."""
    content = {name: [split.records, split.tokens, split.digest] for name, split in sorted(splits.items())}
    return hashlib.sha256(json.dumps([FORMAT, _stored(vocabulary), content]).encode()).hexdigest()


def read_manifest(folder: Path, partial: bool = False) -> Manifest:
    """The manifest of a corpus; ``partial``: of one that has not got its name yet.

    Raises DataError where the folder holds no corpus, an unfinished one, or one of another format.
    """
    path = folder / MANIFEST
    if folder.name.endswith(".partial") and not partial:
        raise DataError(f"{folder} is not finished; start `longseq data prepare` again, it goes on.")
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise DataError(
                f"{path}: format {values['format']} of another version of longseq; this one reads format {FORMAT}: "
                f"prepare the corpus again."
            )
        vocabulary = Vocabulary(**values["vocabulary"])
        if vocabulary.name not in BUILT_IN:
            vocabulary = replace(vocabulary, name=str(folder.absolute() / vocabulary.name))
        values["vocabulary"] = vocabulary
        values["splits"] = {name: _split_info(split) for name, split in values["splits"].items()}
        values["sources"] = [Source(**source) for source in values["sources"]]
        values["inputs"] = [Source(**source) for source in values["inputs"]]
        values["files"] = [DataFile(**file) for file in values["files"]]
        return Manifest(**values)
    except (FileNotFoundError, NotADirectoryError):
        whole = folder.absolute()  # "." has no name
        if (whole.parent / f"{whole.name}.partial").is_dir():
            raise DataError(f"{folder} is not finished; start `longseq data prepare` again, it goes on.") from None
        if folder.is_dir():
            raise DataError(f"{folder} is no prepared corpus, it has no {MANIFEST}; name one, or prepare it.") from None
        raise DataError(f"{folder}: there is no such corpus; `longseq data prepare` makes it.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or prepare the corpus again."
        ) from None


def _split_info(values: dict[str, Any]) -> SplitInfo:
    files = [DataFile(**file) for file in values.pop("files")]
    return SplitInfo(lengths=Lengths(**values.pop("lengths")), files=files, **values)


def count_lengths(lengths: npt.NDArray[np.int64]) -> dict[int, int]:
    """{length: records}; lengths above EXACT_LENGTHS are rounded to three digits."""
    unit = 10 ** np.maximum(np.floor(np.log10(np.maximum(lengths, 1))).astype(np.int64) - 2, 0)
    rounded = np.where(lengths <= EXACT_LENGTHS, lengths, lengths // unit * unit)
    values, counts = np.unique(rounded, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def describe_lengths(counts: dict[int, int], shortest: int, longest: int) -> Lengths:
    """Quantiles and histogram of counted lengths."""
    if not counts:
        return Lengths()
    values = np.array(sorted(counts), dtype=np.int64)
    cumulated = np.cumsum([counts[value] for value in values.tolist()])
    places = np.searchsorted(cumulated, [int(cumulated[-1] - 1) * percent // 100 for percent in QUANTILES], "right")
    histogram: dict[str, int] = {}
    for value in values.tolist():
        power = str(value.bit_length() - 1)
        histogram[power] = histogram.get(power, 0) + counts[value]
    quantiles = dict(zip(map(str, QUANTILES), values[places].tolist(), strict=True))
    return Lengths(shortest, longest, quantiles, histogram)


def histogram_lines(histogram: dict[str, int], width: int = 40) -> Iterable[str]:
    """A histogram of lengths as text, one line a power of two."""
    if not histogram:
        return
    powers = [int(power) for power in histogram]
    most = max(histogram.values())
    for power in range(min(powers), max(powers) + 1):
        count = histogram.get(str(power), 0)
        bar = "█" * round(width * count / most) or ("▏" if count else "")
        first, last = (1 << power, (2 << power) - 1) if power >= 0 else (0, 0)
        yield f"{first:>11,} to {last:<11,} {count:>13,} {bar}".rstrip()
