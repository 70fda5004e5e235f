"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import pytest

from longseq.config.durations import duration_seconds
from longseq.config.loading import load_config
from longseq.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("2h30m", 9000), ("90s", 90), ("1d", 86400), ("1.5h", 5400), ("1.5s", 1.5), (" 1H ", 3600)),
        *(("2:30:00", 9000), ("1-12:00:00", 129600), ("0:00:01", 1), ("90:30", 5430), ("2:5", 125)),
        *(("1-12", 129600), ("1-12:30", 131400), ("1-12:30:15", 131415), ("0-2", 7200), ("00:30", 30)),
    ],
)
def test_times_are_read_as_they_are_written(text, seconds):
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2x", "2h30", "-5", "0", "0s", "0:00", "1-", "1-2-3", "1:2:3:4", "soon"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="time"):
        duration_seconds(text)


@pytest.mark.parametrize("text", ["1440", "45", "0.5"])
def test_a_number_alone_is_refused_as_minutes_or_seconds(text):
    with pytest.raises(ValueError, match=f"write {text}m or {text}s"):
        duration_seconds(text)


@pytest.mark.parametrize(
    ("written", "seconds"), [("2h30m", 9000), ("2:30:00", 9000), ("90:30", 5430), ("1-12", 129600), ("null", None)]
)
def test_a_time_limit_is_the_same_in_a_file_and_on_the_command_line(folder, written, seconds):
    train = "data: {train: proteins.fasta}\ntrainer: {time_limit: " + written + "}\n"
    (folder / "limit.yaml").write_text(train)
    assert load_config("limit.yaml").time_limit_seconds == seconds
    assert load_config("small.yaml", ["data.train=a", f"trainer.time_limit={written}"]).time_limit_seconds == seconds


def test_a_time_limit_that_is_none_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match=r"trainer\.time_limit=later: write a time as 2h30m"):
        load_config("small.yaml", ["data.train=a", "trainer.time_limit=later"])


def test_a_run_of_before_keeps_its_seconds(folder):
    (folder / "limit.yaml").write_text("data: {train: proteins.fasta}\ntrainer: {time_limit: '5400'}\n")
    with pytest.raises(ConfigError, match=r"trainer\.time_limit=5400: .* write 5400m or 5400s"):
        load_config("limit.yaml")
    assert load_config("limit.yaml", resolved=True).time_limit_seconds == 5400
    with pytest.raises(ConfigError, match="write 60m or 60s"):
        load_config("limit.yaml", ["trainer.time_limit=60"], resolved=True)
