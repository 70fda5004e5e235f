"""Peak memory of preparing, and of reading batches, does not grow with the corpus.

What counts is memory of the process's own (RssAnon), of all its children together: pages of mapped files come and go as
the machine likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)

PREPARE = """
from longseq_data.prepare import prepare
from longseq_data.prepare_config import PrepareConfig
prepare(PrepareConfig(sources=["big.fasta"], output="corpus", workers=2, memory_mb=256))
"""
READ = """
from itertools import islice
from longseq_data.batches import Loader, TrainingBatches
from longseq_data.corpus_samples import CorpusSpec
for packing in ("concat", "crop", "bucket"):
    spec = CorpusSpec("corpus", "train", 512, packing, "causal", 0, batch_tokens=65536)
    for batch in islice(Loader(TrainingBatches(spec, batch_sequences=128, accumulate=1, rank=0, world=1), 1), {steps}):
        pass
from longseq_data.streaming import StreamSpec
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


def peak(code: str, folder: Path) -> int:
    """The most bytes of its own that a program and its children have together."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(own_bytes, family(process.pid))))
        time.sleep(0.02)
    assert process.returncode == 0
    return most


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def peaks(folder: Path, megabytes: int) -> dict[str, int]:
    folder.mkdir()
    write_fasta(folder / "big.fasta", megabytes)
    steps = max(20, megabytes * 1_000_000 // 65536)  # a whole pass
    return {
        "prepare": peak(PREPARE, folder),
        "read": peak(READ.replace("{steps}", str(steps)), folder),
    }


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    small, large = peaks(tmp_path / "small", 3), peaks(tmp_path / "large", 24)
    for what in small:
        # prepare uses its memory_mb, of which a small corpus needs less
        room = (256 if what == "prepare" else 12) << 20
        assert large[what] < small[what] + room, (what, small, large)


@pytest.mark.long
def test_memory_is_the_same_for_50_megabytes_and_2_gigabytes(tmp_path):
    small, large = peaks(tmp_path / "small", 50), peaks(tmp_path / "large", 2000)
    print({what: (small[what] >> 20, large[what] >> 20) for what in small})
    for what in small:
        room = (256 if what == "prepare" else 30) << 20
        assert large[what] < small[what] + room, (what, small, large)
