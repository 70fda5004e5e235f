"""Limits of memory, as the files of both versions of control groups have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.measure.control_group import left_to_the_group

NAMES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def group(folder: Path, version: int, limit: object, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {reclaimable}\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/job/step"), (1, "9:cpuset:/other\n4:memory,hugetlb:/job/step")])
def test_the_narrowest_limit_of_the_group_and_those_around_it_counts(tmp_path: Path, version: int, line: str) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text(f"{line}\n")
    top = tmp_path / "fs"
    root = top if version == 2 else top / "memory"
    unlimited = "max" if version == 2 else 9223372036854771712
    assert left_to_the_group(groups, top) == float("inf")
    group(root / "job" / "step", version, unlimited, 500, 100)
    assert left_to_the_group(groups, top) > 1e18
    group(root / "job", version, 1000, 700, 200)
    assert left_to_the_group(groups, top) == 500  # what is cached is given back
    group(root / "job" / "step", version, 800, 500, 100)
    assert left_to_the_group(groups, top) == 400
    group(root, version, 10, 50, 0)  # of a container, whose files lie at the top
    assert left_to_the_group(groups, top) == 0
    group(root, version, 10_000, 50, 0)
    group(root.parent, version, 1, 0, 0)  # outside
    assert left_to_the_group(groups, top) == 400


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert left_to_the_group(tmp_path / "none", tmp_path) == float("inf")
