"""How fast data come: files that stream in and a prepared corpus, next to decompression alone and other libraries.

Every contender reads the same proteins, taking turns in rounds, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import gzip
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

from longseq.benchmarks.request import DataSizes
from longseq_data.cores import cores
from longseq_data.corpus.corpus import Corpus
from longseq_data.ingest.cache import entry_of, group_lock
from longseq_data.ingest.process import Job, ingest
from longseq_data.ingest.survey import survey
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.reading import FASTA
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.rank_share import Samples
from longseq_data.samples.streaming import StreamSpec
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

MIB = 1 << 20
LONG, SHORT = 8192, 512  # tokens of a joined sequence, and of a crop
STEP_TOKENS = 131_072
RECORD_BYTES = 420  # of a synthetic record, header included, about

# contender: (what is counted, what it does)
CONTENDERS: dict[str, tuple[str, str]] = {
    "decompress": ("MB", "gzip.open(...).read: the text of FASTA.gz, nothing more"),
    "fasta": ("MB", f"one shuffled epoch of FASTA.gz in batches of {LONG} joined tokens, no worker"),
    "fasta crops": ("MB", f"one shuffled epoch of FASTA.gz in batches of crops of {SHORT}, no worker"),
    "blocks": ("MB", f"the same in batches of {LONG} joined tokens, from the blocks of an earlier pass"),
    "ingest": ("MB", "FASTA.gz to blocks in data.cache"),
    "biopython": ("MB", "Bio.SeqIO.parse over gzip.open, nothing done with the records"),
    "datasets": ("MB", "datasets.load_dataset('text', streaming=True): its lines, nothing done with them"),
    "corpus": ("tokens", f"prepared corpus, {LONG} joined tokens, one worker"),
    "corpus crops": ("sequences", f"prepared corpus, crops of {SHORT}, one worker"),
    "corpus buckets": ("sequences", f"prepared corpus, crops of {SHORT} by length, one worker"),
    "corpus masked": ("sequences", f"prepared corpus, crops of {SHORT}, 15 % masked, one worker"),
    "prepare on 1": ("MB", "longseq data prepare with workers=1"),
    "prepare on 2": ("MB", "longseq data prepare with workers=2"),
}

# (name, contender, what it is held against: another contender or a rate, what the ratio should reach)
GOALS: tuple[tuple[str, str, str | float, float], ...] = (
    ("FASTA.gz to batches / decompression", "fasta", "decompress", 0.8),
    (f"corpus at {LONG}, tokens/s / 50 million", "corpus", 50e6, 1.0),
    (f"corpus crops of {SHORT}, sequences/s / 100,000", "corpus crops", 100e3, 1.0),
    ("prepare on two cores / one", "prepare on 2", "prepare on 1", 1.5),
)


@dataclass(frozen=True, kw_only=True)
class DataRequest(DataSizes):
    """What is measured: ``files``, or about ``megabytes`` of synthetic FASTA; ``folder`` holds what is made."""

    folder: Path
    files: tuple[str, ...] = ()
    contenders: tuple[str, ...] = tuple(CONTENDERS)


@dataclass
class Measured:
    unit: str
    about: str
    rates: list[float] = field(default_factory=list)  # units per second, by the wall clock, one a round
    cpu_seconds: list[float] = field(default_factory=list)  # of all processes

    @property
    def rate(self) -> float:
        return median(self.rates)


def measure(request: DataRequest, say: Callable[[str], None]) -> dict[str, Measured]:
    """Time every contender in every round."""
    sources = list(request.files) or [_synthetic(request, say)]
    size = sum(_text_bytes(source) for source in sources) / 1e6
    say(f"{size:,.0f} MB of FASTA text in {len(sources)} file(s)")
    corpus = request.folder / "corpus"
    _prepare(sources, corpus, workers=0)
    works = _works(request, sources, corpus, size)
    results = {name: Measured(*CONTENDERS[name]) for name in request.contenders}
    for number in range(request.rounds):
        for name, result in results.items():
            say(f"round {number + 1} of {request.rounds}: {name}")
            cpu, start = _cpu_seconds(), time.perf_counter()
            units, seconds = works[name]()
            result.rates.append(units / (seconds or time.perf_counter() - start))
            result.cpu_seconds.append(_cpu_seconds() - cpu)
    return results


def ratios(results: Mapping[str, Measured]) -> list[dict[str, object]]:
    """The goals, and what was reached: medians of the ratios of each round."""
    found: list[dict[str, object]] = []
    for name, contender, beside, goal in GOALS:
        if contender not in results or (isinstance(beside, str) and beside not in results):
            continue
        rates = results[contender].rates
        others = results[beside].rates if isinstance(beside, str) else [beside] * len(rates)
        by_round = [rate / other for rate, other in zip(rates, others, strict=True)]
        found.append({"name": name, "goal": goal, "reached": median(by_round), "rounds": by_round})
    return found


def numbers(request: DataRequest, results: Mapping[str, Measured]) -> dict[str, object]:
    """Everything that was measured, for the JSON file."""
    return {
        "request": {**asdict(request), "folder": str(request.folder)},
        "cores": cores(),
        "contenders": {name: asdict(result) for name, result in results.items()},
        "ratios": ratios(results),
    }


def table(results: Mapping[str, Measured]) -> str:
    """Rates by contender, then the goals."""
    head = f"{'contender':<16}{'median per second':>22}{'slowest':>14}{'fastest':>14}{'CPU seconds':>13}"
    lines = [f"{head}   what it does"]
    for name, result in results.items():
        slowest, fastest = min(result.rates), max(result.rates)
        rate = f"{_short(result.rate)} {result.unit}"
        cpu = f"{median(result.cpu_seconds):>13.2f}"
        lines.append(f"{name:<16}{rate:>22}{_short(slowest):>14}{_short(fastest):>14}{cpu}   {result.about}")
    lines.append("")
    lines += [f"{ratio['name']}: {ratio['reached']:.2f} (goal {ratio['goal']})" for ratio in ratios(results)]
    return "\n".join(lines)


def _short(rate: float) -> str:
    return f"{rate / 1e6:,.1f} million" if rate >= 1e6 else f"{rate:,.1f}" if rate < 1e3 else f"{rate:,.0f}"


def _works(
    request: DataRequest, sources: list[str], corpus: Path, size: float
) -> dict[str, Callable[[], tuple[float, float]]]:
    """Each contender as a function that gives (units, seconds; 0: those of the whole call)."""

    def all_of(work: Callable[[], Iterable[object]]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            for _ in work():
                pass
            return size, 0.0

        return run

    def of_corpus(packing: str, length: int, objective: str, unit: str) -> Callable[[], tuple[float, float]]:
        spec = CorpusSpec(str(corpus), "train", length, packing, objective, 0, batch_tokens=STEP_TOKENS)
        return lambda: _endless(spec, STEP_TOKENS // length, unit, request.seconds)

    def preparing(workers: int) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            _prepare(sources, request.folder / f"prepared-{workers}", workers)
            return size, 0.0

        return run

    report = survey(FASTA, sources, strict=False, max_bytes=1 << 62, total_bytes=1 << 62)
    records, stream = report.records, report.records + report.residues

    for _ in _ingested(sources, request.folder / "cache"):
        pass
    return {
        "decompress": all_of(lambda: _decompressed(sources)),
        "fasta": all_of(lambda: _streamed(sources, "concat", LONG, stream // LONG)),
        "fasta crops": all_of(lambda: _streamed(sources, "crop", SHORT, records)),
        "blocks": all_of(lambda: _streamed(sources, "concat", LONG, stream // LONG, request.folder / "cache")),
        "ingest": all_of(lambda: _ingested(sources, request.folder / "ingested")),
        "biopython": all_of(lambda: _biopython(sources)),
        "datasets": all_of(lambda: _datasets(sources)),
        "corpus": of_corpus("concat", LONG, "causal", "tokens"),
        "corpus crops": of_corpus("crop", SHORT, "causal", "sequences"),
        "corpus buckets": of_corpus("bucket", SHORT, "causal", "sequences"),
        "corpus masked": of_corpus("crop", SHORT, "masked", "sequences"),
        "prepare on 1": preparing(1),
        "prepare on 2": preparing(2),
    }


def _synthetic(request: DataRequest, say: Callable[[str], None]) -> str:
    path = request.folder / f"synthetic-{request.megabytes}.fasta.gz"
    if not path.exists():
        say(f"writing {request.megabytes} MB of synthetic FASTA to {path}")
        request.folder.mkdir(parents=True, exist_ok=True)
        records = max(1000, request.megabytes * 1_000_000 // RECORD_BYTES)
        write_fasta(SyntheticSpec(families=64, records=records, mean_length=300, seed=0), path)
    return str(path)


def _text_bytes(source: str) -> int:
    return sum(len(piece) for piece in _decompressed([source]))


def _decompressed(sources: list[str]) -> Iterator[bytes]:
    for source in sources:
        with gzip.open(source) if source.endswith(".gz") else Path(source).open("rb") as handle:
            while piece := handle.read(MIB):
                yield piece


def _ingested(sources: list[str], folder: Path) -> Iterator[object]:
    """Into a folder of its own, in this process."""
    leaves = FASTA.leaves(sources)
    entries = tuple(entry for leaf in leaves if (entry := entry_of(folder, FASTA, leaf, strict=False)) is not None)
    for entry in entries:
        entry.clear()
    lock = group_lock(folder, entries)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    ingest(Job(entries, FASTA, strict=False, lock=lock))
    yield from entries


def _streamed(
    sources: list[str], packing: str, length: int, samples: int, cache: Path | None = None
) -> Iterator[object]:
    """One epoch, as training reads it, but for its last incomplete batch: an endless stream does not tell its end."""
    folder = None if cache is None else str(cache)
    spec = StreamSpec(tuple(sources), None, 0.0, 0.0, length, packing, "causal", seed=0, cache=folder)
    rows = STEP_TOKENS // length
    share = TrainingBatches(spec, batch_sequences=rows, accumulate=1, rank=0, world=1)
    return islice(Loader(share, workers=0), samples // rows)  # in this process, as the decompression next to it


def _biopython(sources: list[str]) -> Iterator[object]:
    from Bio import SeqIO

    for source in sources:
        with gzip.open(source, "rt") if source.endswith(".gz") else Path(source).open() as handle:
            yield from SeqIO.parse(handle, "fasta")


def _datasets(sources: list[str]) -> Iterator[object]:
    import datasets

    datasets.disable_progress_bars()
    yield from datasets.load_dataset("text", data_files=sources, split="train", streaming=True)


def _endless(spec: Samples, rows: int, unit: str, seconds: float) -> tuple[float, float]:
    """Units and seconds of at least ``seconds`` of batches of one worker, its start not counted."""
    batches = iter(Loader(TrainingBatches(spec, batch_sequences=rows, accumulate=1, rank=0, world=1), workers=1))
    for _ in range(5):  # those that were prepared while nobody waited
        next(batches)
    start, units = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        tokens = next(batches)["tokens"]
        units += tokens.numel() if unit == "tokens" else len(tokens)
    return units, time.perf_counter() - start


def _prepare(sources: list[str], output: Path, workers: int) -> None:
    config = PrepareConfig(
        sources=sources, output=str(output), workers=workers, valid_fraction=0.01, test_fraction=0.01
    )
    if workers:
        shutil.rmtree(output, ignore_errors=True)
    prepare(config, overwrite=True)
    Corpus.open(output, "train")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
