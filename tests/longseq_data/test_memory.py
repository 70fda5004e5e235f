"""Peak memory of preparing, and of reading batches, does not grow with the corpus.

What counts is memory of a process's own (RssAnon): pages of mapped files come and go as the machine likes. Each process
is held to its own peak, because whether two of them are at their peaks at one time is the scheduler's choice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)

PREPARE = """
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.config import PrepareConfig
prepare(PrepareConfig(sources=["big.fasta"], output="corpus", workers=2, memory_mb={memory_mb}))
"""
READ = """
from itertools import islice
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
for packing in ("concat", "crop", "bucket"):
    spec = CorpusSpec("corpus", "train", 512, packing, "causal", 0, batch_tokens=65536)
    for batch in islice(Loader(TrainingBatches(spec, batch_sequences=128, accumulate=1, rank=0, world=1), 1), {steps}):
        pass
from longseq_data.samples.streaming import StreamSpec
spec = StreamSpec(("big.fasta",), "train", 0.05, 0.05, 512, "concat", "causal", 0, shuffle_buffer=1000)
for batch in islice(Loader(TrainingBatches(spec, batch_sequences=128, accumulate=1, rank=0, world=1), 1), {steps}):
    pass
"""


def write_fasta(path: Path, megabytes: int) -> None:
    """About so many MB of proteins of 300 residues, no two alike."""
    rng = np.random.default_rng(megabytes)
    with path.open("wb") as out:
        for block in range(max(1, megabytes * 1_000_000 // 324 // 10_000)):
            rows = LETTERS[rng.integers(0, 20, (10_000, 300), dtype=np.uint8)]
            out.write(b"".join(b">p%d_%d TaxID=9606\n%s\n" % (block, i, row.tobytes()) for i, row in enumerate(rows)))


class Peak(NamedTuple):
    """The most bytes of its own that the process that was started ever had, and the most that a child of it had.

    A small corpus is prepared without children.
    """

    parent: int
    child: int

    def within(self, other: Peak, megabytes: int) -> bool:
        return all(mine < its + (megabytes << 20) for mine, its in zip(self, other, strict=True))


def peak(code: str, folder: Path) -> Peak:
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    most: Counter[int] = Counter()
    while process.poll() is None:
        # between vfork and exec a child shows its parent's command, and its parent's memory as its own
        own = command(process.pid)
        ours = [pid for pid in family(process.pid) if pid == process.pid or command(pid) != own]
        most |= Counter({pid: own_bytes(pid) for pid in ours})
        time.sleep(0.02)
    assert process.returncode == 0
    return Peak(most.pop(process.pid), max(most.values(), default=0))


def family(pid: int) -> list[int]:
    """The process and all that its threads have started, as far as they are there."""
    children = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(each for child in children for each in family(child))]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def prepare_peak(folder: Path, megabytes: int, memory_mb: int) -> Peak:
    folder.mkdir()
    write_fasta(folder / "big.fasta", megabytes)
    return peak(PREPARE.replace("{memory_mb}", str(memory_mb)), folder)


def read_peak(folder: Path, megabytes: int) -> Peak:
    steps = max(20, megabytes * 1_000_000 // 65536)  # a whole pass
    return peak(READ.replace("{steps}", str(steps)), folder)


def test_memory_of_preparing_does_not_grow_with_the_corpus(tmp_path):
    # both fill memory_mb; what is kept of the larger one would be 92 MiB and more, half of it in each worker
    small, large = prepare_peak(tmp_path / "small", 48, 64), prepare_peak(tmp_path / "large", 144, 64)
    assert small.child > 64 << 20, "the workers were not seen"
    assert large.within(small, 32), (small, large)


def test_memory_of_reading_does_not_grow_with_the_corpus(tmp_path):
    sizes = {"small": 3, "large": 24}
    for name, megabytes in sizes.items():
        prepare_peak(tmp_path / name, megabytes, 64)
    small, large = (read_peak(tmp_path / name, megabytes) for name, megabytes in sizes.items())
    assert large.within(small, 12), (small, large)


@pytest.mark.long
def test_memory_is_the_same_for_50_megabytes_and_2_gigabytes(tmp_path):
    sizes = {"small": 50, "large": 2000}
    prepared = {name: prepare_peak(tmp_path / name, megabytes, 256) for name, megabytes in sizes.items()}
    read = {name: read_peak(tmp_path / name, megabytes) for name, megabytes in sizes.items()}
    print({name: (prepared[name], read[name]) for name in sizes})
    # prepare uses its memory_mb, half of it in each worker, of which the small corpus needs less
    assert prepared["large"].within(prepared["small"], 128), prepared
    assert read["large"].within(read["small"], 30), read
