"""What verbs print with --json is JSON to every program."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import longseq
from longseq.commands.score import _json
from longseq.evaluation.score import SequenceScore
from longseq.printed import as_json


def test_what_json_has_not_becomes_null_or_text():
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": Path("x/y"), "d": {"e": 0.1}, "f": None}
    read = json.loads(as_json(value), parse_constant=pytest.fail)
    assert read == {"a": None, "b": [None, [1.5, None]], "c": "x/y", "d": {"e": 0.1}, "f": None}


def test_a_record_without_residues_has_no_mean():
    text = "".join(_json([SequenceScore("empty", 0, 0.0, pseudo=True), SequenceScore("b", 2, -3.0, pseudo=True)]))
    read = json.loads(text, parse_constant=pytest.fail)
    assert [row["mean"] for row in read] == [None, -1.5]


def test_every_verb_prints_by_that_function():
    commands = Path(longseq.__file__).parent / "commands"
    wrong = [path.name for path in commands.rglob("*.py") if re.search(r"print\(json\.dumps", path.read_text())]
    assert wrong == []
