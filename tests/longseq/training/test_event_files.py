"""What a resume leaves in TensorBoard's files of the steps that it goes over again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from longseq.runs.event_files import drop_after


def write(folder: Path, number: int, after: int, last: int) -> Path:
    """The file of a start that began behind the checkpoint of step ``after``: two curves and a text up to ``last``."""
    with SummaryWriter(folder, purge_step=after + 1) as writer:
        for step in range(after + 1, last + 1):
            writer.add_scalar("train/loss", number + step / 100, step)
            if step % 5 == 0:
                writer.add_scalar("valid/loss", number + step / 100, step)
                writer.add_text("sample", f"of start {number}", step)
    written = max(folder.glob("events.out.tfevents.[!0]*"))
    return written.rename(folder / f"events.out.tfevents.{number:010d}")


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 4)) for point in events.Scalars(tag)]


@pytest.fixture
def three_starts(tmp_path: Path) -> Path:
    """The checkpoints were of steps 20 and 30; the third start has not begun."""
    write(tmp_path, 1, 0, 27)
    write(tmp_path, 2, 20, 34)
    return tmp_path


def test_tensorboard_warns_of_nothing_and_shows_each_step_once(three_starts: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        read(three_starts)
        assert "out of order event.step" in caplog.text  # what it is about
        caplog.clear()
        drop_after(three_starts, 30)
        write(three_starts, 3, 30, 40)
        events = read(three_starts)
        assert caplog.text == ""
    starts = {step: 1 if step <= 20 else 2 if step <= 30 else 3 for step in range(1, 41)}
    assert points(events, "train/loss") == [(step, round(starts[step] + step / 100, 4)) for step in starts]
    assert [step for step, _ in points(events, "valid/loss")] == list(range(5, 41, 5))
    assert [event.step for event in events.Tensors("sample/text_summary")] == list(range(5, 41, 5))


def test_files_without_an_event_too_many_are_left_alone(tmp_path: Path):
    path = write(tmp_path, 1, 0, 27)
    before = path.stat()
    drop_after(tmp_path, 27)
    assert path.stat() == before


@pytest.mark.parametrize("cut", [1, 5, 11, 13, 20])
def test_a_record_that_was_cut_by_a_kill_is_kept_and_harms_nothing(three_starts: Path, caplog, cut: int):
    path = three_starts / "events.out.tfevents.0000000002"
    whole = path.read_bytes()
    tail = whole[-40:][:cut]
    path.write_bytes(whole + (len(whole).to_bytes(8, "little") if cut == 13 else tail))
    drop_after(three_starts, 30)
    write(three_starts, 3, 30, 40)
    with caplog.at_level(logging.WARNING):
        assert [step for step, _ in points(read(three_starts), "train/loss")] == list(range(1, 41))
        assert "out of order" not in caplog.text


def test_what_is_behind_a_damaged_record_is_kept_byte_for_byte(tmp_path: Path):
    path = write(tmp_path, 1, 0, 27)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:] = b"\xff" * (len(content) - middle)
    path.write_bytes(content)
    shown = points(read(tmp_path), "train/loss")
    last = shown[-1][0]
    drop_after(tmp_path, last - 1)
    assert points(read(tmp_path), "train/loss") == shown[:-1]
    assert path.read_bytes().endswith(bytes(content[middle:]))


def test_a_rewriting_that_was_killed_leaves_nothing_that_tensorboard_reads(three_starts: Path):
    rest = three_starts / ".rewritten.0123abcd.partial"
    rest.write_bytes((three_starts / "events.out.tfevents.0000000001").read_bytes())
    drop_after(three_starts, 30)
    assert sorted(path.name[:10] for path in three_starts.iterdir()) == ["events.out"] * 2
