"""The way through a kernel's machine code, on code that is short enough to count by hand."""

from __future__ import annotations

import pytest
from tests.gpu.sass import Program, constant_bank, matrix_flops

# for (i = ctaid.x; i < n; i += 4): two instructions of work; n is the argument at 0x210
LOOP = """
.text.kernel:
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   LDC R2, c[0x0][0x210] ;
        /*0020*/                   ISETP.GE.AND P0, PT, R0, R2, PT ;
        /*0030*/               @P0 EXIT ;
.L_x_0:
        /*0040*/                   LDG.E R8, desc[UR4][R6.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/                   VIADD R0, R0, 0x4 ;
        /*0070*/                   LOP3.LUT P1, RZ, R0, {mask}, RZ, 0xc0, !PT ;
        /*0080*/                   ISETP.LT.AND P0, PT, {left}, R2, PT ;
        /*0090*/               @P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""


def _run(left: str, n: int, program: int, mask: str = "0x1"):
    bank = constant_bank(90, [4], [n], (8, 1, 1), 128)
    return Program.parse(LOOP.format(left=left, mask=mask)).run(bank, (program, 0, 0))


@pytest.mark.parametrize(("n", "program", "turns"), [(8, 0, 2), (9, 0, 3), (9, 5, 1), (-1, 0, 0), (4, 4, 0)])
def test_a_loop_turns_as_often_as_its_bounds_say(n, program, turns):
    counts = _run("R0", n, program)
    assert counts["LDG.E"] == counts["HMMA.16816.F32.BF16"] == turns
    assert counts["EXIT"] == (1 if turns == 0 else 2)


def test_a_loop_that_hangs_on_memory_is_an_error():
    with pytest.raises(RuntimeError, match="how often a loop turns is not known"):
        _run("R8", 8, 0)


def test_arguments_lie_where_a_kernel_of_that_architecture_looks_for_them():
    bank = constant_bank(90, [8, 4, 8], [2**33 + 5, 7, 9], (3, 4, 5), 128)
    assert [bank[0x210 + at] for at in (0, 4, 8, 16, 20)] == [5, 2, 7, 9, 0]
    assert [bank[at] for at in (0x0, 0xC, 0x10, 0x14)] == [128, 3, 4, 5]
    assert constant_bank(80, [4], [7], (1, 1, 1), 32)[0x160] == 7
    assert constant_bank(100, [4], [7], (2, 1, 1), 32)[0x380] == 7


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("FFMA", 0),
    ],
)
def test_flops_of_a_matrix_instruction(name, flops):
    assert matrix_flops(name) == flops
