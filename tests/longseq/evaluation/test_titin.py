"""Long records through `longseq score`: 65,536 tokens against one pass in float64, and the peak of longer ones.

Run it with -s: it prints the figures of every kind of model that is read in tiles.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from longseq.evaluation.likelihood import causal, pseudo
from longseq.evaluation.records import record_of
from longseq.trained_model import find
from longseq_data.vocabulary import MASK, PROTEIN

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

LENGTH, TITIN, MILLION = 65_534, 34_350, 1_000_000  # with BOS and EOS the first is 65,536 tokens
KINDS = {
    f"{objective}, {what}": [f"model.objective={objective}", *options]
    for objective in ("causal", "masked")
    for what, options in {
        "softmax": [],
        "convolutions": ["model.block=modern"],
        "kernel gelu": ["attention.kernel=gelu"],
        "window": ["attention.window=64", "attention.learned_share=true"],
        "decay": ["attention.learned_decay=true", "model.block=modern"],
        "gates, window": ["attention.forget_gate=true", "attention.window=64"],
        "scaled masks": ["model.mask_scaling=true"],
    }.items()
}
PEAK = "import re, sys; from longseq.cli import main; code = main(sys.argv[1:]);" + (
    "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(code)"
)


def letters(length: int) -> str:
    return "".join(random.Random(5).choices("ACDEFGHIKLMNPQRSTVWY", k=length))


@pytest.fixture
def run(trained, request):
    return trained("one", *KINDS[request.param])


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_65536_tokens_in_tiles_equal_one_pass_in_float64(run, capsys, request):
    source = find(run)
    row = record_of(source, "one", letters(LENGTH), "a record").row
    assert len(row) == 65_536
    found = causal(source.load(), PROTEIN, [row])[0] if source.causal else pseudo(source.load(), PROTEIN, row, 2)
    whole, tokens = find(run, ["model.sequence_tile=0"]).load().double(), torch.from_numpy(row.astype(np.int64))
    wanted = 0.0
    with torch.inference_mode():
        if source.causal:
            wanted = float(whole(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None]).sum())
        for turn in range(0 if source.causal else 2):
            places = torch.arange(1 + turn, LENGTH + 1, 2)
            logits = whole(tokens.index_fill(0, places, MASK)[None])[0, places]
            wanted += float(logits.log_softmax(-1).gather(1, tokens[places, None]).sum())
    with capsys.disabled():
        print(
            f"\n{request.node.callspec.id}: {found:.6f} in tiles, {wanted:.6f} at once, {abs(found / wanted - 1):.1e}"
        )
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_the_peak_of_score_does_not_grow_with_the_record(run, folder, capsys, request):
    peaks = {}
    for length in (LENGTH, TITIN, MILLION):
        (folder / "one.fasta").write_text(f">one\n{letters(length)}\n")
        passes = ["--passes", "1"] * (not find(run).causal)
        command = [sys.executable, "-c", PEAK, "score", str(run), "one.fasta", *passes]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.returncode == 0, ended.stderr
        assert re.search(rf"\bone\t{length}\t-\d", ended.stdout)
        peaks[length] = int(ended.stderr.split()[-1]) / 1024
    said = ", ".join(f"{length:,} residues {peak:.0f} MiB" for length, peak in peaks.items())
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: {said}")
    assert max(peaks.values()) <= 1.1 * peaks[LENGTH]
