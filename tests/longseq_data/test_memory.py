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
prepare(PrepareConfig(sources=["big.fasta"], output="corpus", workers=2, memory_mb={memory_mb}))
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


def prepare_peak(folder: Path, megabytes: int, memory_mb: int) -> int:
    folder.mkdir()
    write_fasta(folder / "big.fasta", megabytes)
    return peak(PREPARE.replace("{memory_mb}", str(memory_mb)), folder)


def read_peak(folder: Path, megabytes: int) -> int:
    steps = max(20, megabytes * 1_000_000 // 65536)  # a whole pass
    return peak(READ.replace("{steps}", str(steps)), folder)


def test_memory_of_preparing_does_not_grow_with_the_corpus(tmp_path):
    # both fill memory_mb; what is kept of the larger one would be 46 MiB and more
    small, large = prepare_peak(tmp_path / "small", 48, 64), prepare_peak(tmp_path / "large", 96, 64)
    assert large < small + (32 << 20), (small, large)


def test_memory_of_reading_does_not_grow_with_the_corpus(tmp_path):
    sizes = {"small": 3, "large": 24}
    for name, megabytes in sizes.items():
        prepare_peak(tmp_path / name, megabytes, 64)
    small, large = (read_peak(tmp_path / name, megabytes) for name, megabytes in sizes.items())
    assert large < small + (12 << 20), (small, large)


@pytest.mark.long
def test_memory_is_the_same_for_50_megabytes_and_2_gigabytes(tmp_path):
    sizes = {"small": 50, "large": 2000}
    prepared = {name: prepare_peak(tmp_path / name, megabytes, 256) for name, megabytes in sizes.items()}
    read = {name: read_peak(tmp_path / name, megabytes) for name, megabytes in sizes.items()}
    print({name: (prepared[name] >> 20, read[name] >> 20) for name in sizes})
    # prepare uses its memory_mb, of which the small corpus needs less
    assert prepared["large"] < prepared["small"] + (256 << 20), prepared
    assert read["large"] < read["small"] + (30 << 20), read
