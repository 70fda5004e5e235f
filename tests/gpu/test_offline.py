"""Every launch of our Triton kernels, compiled for GPUs that are not here: make test-compiled.

By the release that is installed, which is the one that PyTorch for CUDA brings: its counts are held against
ceilings.json. And by the one in the folder LONGSEQ_TRITON, the newest.
"""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
import triton
from tests.gpu import offline

from longseq.attention.scan import CHUNK
from longseq.measure import flops

pytestmark = pytest.mark.compiled

TENSOR_MEMORY = 512  # columns
REGISTERS = 65_536  # of a multiprocessor
TOLERANCE = 0.02  # of a count of instructions, in either direction
MULTIPROCESSORS = 132  # of an H100 or H200
PINNED = triton.__version__  # by PyTorch, and in constraints.txt
NEWEST = os.environ.get("LONGSEQ_TRITON")
KNOWN = json.loads(offline.CEILINGS.read_text())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("decisive", None, ()), id="installed"),
        pytest.param(("every-kernel", NEWEST, ()), id="newest"),
        # A chip at a time, each with a result of its own: -k all-sm_90
        *(
            pytest.param(("all", None, (arch,)), id=f"all-sm_{arch}", marks=pytest.mark.long)
            for arch in offline.ALL_ARCHITECTURES
        ),
    ],
)
def rows(request) -> list[offline.Found]:
    cases, release, only = request.param
    if cases == "every-kernel" and release is None:
        pytest.skip("LONGSEQ_TRITON names no folder with the newest Triton: make test-compiled")
    return offline.measure(cases, release, only=only)


def _half(rows: list[offline.Found]) -> list[offline.Found]:
    chosen = [row for row in rows if "float16" in row.case]
    assert chosen
    return chosen


def test_every_launch_fits_its_chip(rows):
    """And needs no more than longseq.attention.backends.triton.launch.unsupported asks for."""
    from longseq.attention.backends.triton.launch import Chip, needed_memory

    for row in rows:
        chip = Chip(divmod(row.arch, 10), offline.SHARED_MEMORY[row.arch])
        width = int(re.search(r" d(\d+) ", row.case)[1])
        dtype = torch.float32 if "float32" in row.case else torch.bfloat16
        needed = needed_memory(row.case.startswith("window"), width, chip, dtype)
        assert needed.fits(chip), row
        assert row.shared <= needed.shared <= chip.shared_memory, row
        assert row.tensor_memory <= needed.tensor_memory <= TENSOR_MEMORY, row
        assert row.registers * row.threads <= REGISTERS, row


def test_16_bit_operands_are_multiplied_by_wgmma_at_least_64_wide(rows):
    for row in _half(rows):
        # At head_dim 128 dk and dv together need 8 warps; of 32 no matrix has 64 columns on every side.
        least = 32 if " d32 " in row.case or (" d128 " in row.case and row.kernel == "keys_vjp") else 64
        if row.arch == 90:
            for name in row.matrix:
                shape = re.fullmatch(r"HGMMA\.64x(\d+)x16\.F32(\.BF16)?", name)  # without: of fp16
                assert shape, f"{row.case}: {row.kernel} {name}"
                assert shape[2] or " float16 " in row.case, f"{row.case}: {row.kernel} {name}"
                assert int(shape[1]) >= least, f"{row.case}: {row.kernel} {name}"


def test_nothing_is_spilled_at_head_dim_64_and_little_at_128(rows):
    """What kernels of features spill elsewhere, with gates and with everything given, is in ceilings.json.

    The bars are of the release that PyTorch pins: newer ones lay registers out anew (3.9: 128 bytes in dk and dv).
    """
    if rows[0].triton != PINNED:
        return
    for row in _half(rows):
        narrow, plain = " d64 " in row.case, not {"hidden", "gate"} & set(row.case.split())
        if row.case.startswith("window") and row.arch in (80, 90):
            assert row.spilled <= (0 if narrow else 64 if plain else 128), row
        elif plain and " m256 " in row.case and (row.arch == 90 or (row.arch == 80 and narrow)):
            fp16 = 8 * (" float16 " in row.case)  # its features are converted besides
            assert row.spilled <= (fp16 if narrow else 72), row


def test_the_scan_issues_no_more_instructions_than_a_quarter_of_the_peak_allows(rows):
    """On sm_90, of one scheduler for 64 tokens of one head: then issuing takes 25 % of 790 TFLOP/s at least."""
    if 90 not in {row.arch for row in rows}:
        pytest.skip("the bar is one of sm_90")
    for where, most in (("forward", 9_000), ("backward", 20_000)):
        chosen = [row for row in rows if (row.case, row.arch, row.where) == (offline.Case("scan").name, 90, where)]
        assert 0 < sum(row.instructions for row in chosen) <= most


def test_another_length_compiles_nothing_again(rows):
    # Wide states of 512 features are not in memory for all sequences at once, and the last ones' rows of an odd length
    # begin at no multiple of 16 bytes: one more program.
    again = [row for row in _half(rows) if row.compiled_again > (" d128 bfloat16 m512 " in row.case)]
    assert again == []


def test_large_kernels_have_four_programs_a_multiprocessor(rows):
    for row in _half(rows):
        # Others add states up. Wide states of 512 features are in memory for 7 of 8 sequences, and then for the last.
        if row.arch == 90 and row.matrix and " d128 bfloat16 m512 " not in row.case:
            assert row.programs >= 4 * MULTIPROCESSORS, row


def test_matrix_instructions_do_at_least_the_flops_that_mfu_counts(rows):
    """So the share of the peak that a training shows is never more than what the matrix units did."""
    found = {row.case for row in rows}
    for case in offline.CASES["all"]:
        if case.name not in found:
            continue
        d, m = case.head_dim, case.features
        if case.operation == "window":
            near = case.reach - case.reach * (case.reach - 1) / (2 * offline.LENGTH)
            counted = flops.exact(d, d, near if case.causal else 2 * near - 1)
        else:
            counted = flops.favor(d, d, m, CHUNK if case.operation == "scan" else 0)
        for arch in {row.arch for row in rows if row.case == case.name} - {100}:  # whose instructions do not say
            done = sum(row.flops for row in rows if row.case == case.name and row.arch == arch)
            assert done >= counted.both.strict, f"{case.name} on sm_{arch}: {done} < {counted.both.strict}"


def test_instructions_and_spills_are_those_of_the_ceilings(rows):
    if rows[0].triton != KNOWN["triton"]:
        pytest.skip(f"the ceilings are those of Triton {KNOWN['triton']}")
    decisive = {(case.name, arch) for case in offline.CASES["decisive"] for arch in case.architectures}
    found = offline.ceilings([row for row in rows if (row.case, row.arch) in decisive])
    wrong = []
    for arch, kernels in found.items():
        for name, (instructions, spilled) in kernels.items():
            ceiling, most = KNOWN[arch][name]
            if abs(instructions - ceiling) > max(TOLERANCE * ceiling, 2) or spilled > most:
                wrong.append(
                    f"{arch} {name}: {instructions} instructions, {spilled} bytes, known are {ceiling}, {most}"
                )
    again = "python tests/gpu/offline.py --triton DIR --write, and say in the commit why"
    assert not wrong, "\n".join([f"Not as in {offline.CEILINGS.name} ({again}):", *wrong])
