"""The benchmark of features that fit the queries and keys: closed forms met, and the order the theory gives."""

from __future__ import annotations

from longseq.benchmarks.sharper import INPUTS, MAPS, measure_sharpness, table


def test_every_map_meets_its_closed_form_and_sharper_ones_vary_less():
    found = measure_sharpness(draws=1000, length=256, repeats=3, seed=1)
    assert len(found) == len(INPUTS) * 3 * len(MAPS)
    by = {(one.inputs, one.std, one.kernel): one for one in found}
    for one in found:
        assert one.worst < 5, one
        assert abs(one.measured - one.formula) < 0.02, one
        assert f"{one.formula:.4f}" in table(found)
    for inputs in INPUTS:
        for std in (0.5, 1.0, 2.0):
            plain, oprf, sderf, aderf = (by[inputs, std, kernel].formula for kernel in MAPS[:4])
            assert aderf < sderf + 0.1
            assert sderf < oprf + 0.1
            assert oprf < plain
    uneven = {kernel: by["uneven", 1.0, kernel] for kernel in MAPS}
    assert uneven["aderf"].formula < 0.5 * uneven["oprf"].formula
    assert uneven["aderf"].matrix < 0.5 * uneven["softmax"].matrix
