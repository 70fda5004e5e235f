"""How many cores there are, also where the system does not say which of them are ours."""

from __future__ import annotations

import os

from longseq_data.cores import cores


def test_cores_are_those_that_are_left_or_all_where_nobody_says(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert cores() == 7
