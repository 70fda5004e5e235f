"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import pytest

from longseq.config_loading import load_config
from longseq.durations import duration_seconds
from longseq.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("2h30m", 9000), ("90s", 90), ("1d", 86400), ("1.5h", 5400), ("45", 45), ("0.5", 0.5), (" 1H ", 3600)),
        *(("2:30:00", 9000), ("1-12:00:00", 129600), ("0:00:01", 1)),
    ],
)
def test_times_are_read_as_they_are_written(text, seconds):
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2x", "2h30", "-5", "0", "0s", "1:2", "soon", "1e3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="time"):
        duration_seconds(text)


@pytest.mark.parametrize(("written", "seconds"), [("3600", 3600), ("2h30m", 9000), ("2:30:00", 9000), ("null", None)])
def test_a_time_limit_is_the_same_in_a_file_and_on_the_command_line(folder, written, seconds):
    train = "data: {train: proteins.fasta}\ntrainer: {time_limit: " + written + "}\n"
    (folder / "limit.yaml").write_text(train)
    assert load_config("limit.yaml").time_limit_seconds == seconds
    assert load_config("small.yaml", ["data.train=a", f"trainer.time_limit={written}"]).time_limit_seconds == seconds


def test_a_time_limit_that_is_none_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match=r"trainer\.time_limit=later: write a time as 2h30m"):
        load_config("small.yaml", ["data.train=a", "trainer.time_limit=later"])
