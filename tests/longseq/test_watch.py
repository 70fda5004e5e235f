"""``longseq watch``: what the page says, what it reads, and how it behaves on a terminal."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from longseq.cli import main
from longseq.commands import watch
from longseq.commands.watch import Viewer, fitted
from longseq.launch.slurm.state import record_job
from longseq.runs import owner, starts
from longseq.runs.curves import LiveCurves
from longseq.runs.owner import Process, words_of
from longseq.runs.run import Run
from longseq.runs.starts import Progress

STEP = Progress(step=40, last_step=100, loss=2.5, tokens_per_second=12345.6, time=0)


def write_points(run: Run, curves: dict[str, dict[int, float]], start: int = 0, ending: str = "") -> Path:
    """As a start at step ``start`` would: a point of step s was written at second 1000 + 2 s."""
    with SummaryWriter(run.tensorboard_dir, purge_step=start + 1, filename_suffix=ending) as writer:
        for curve, points in curves.items():
            for step, value in points.items():
                writer.add_scalar(curve, value, step, walltime=1000 + 2 * step)
        return Path(writer.file_writer.event_writer._file_name)


CURVES = {
    "train/loss": {10: 5.0, 20: 4.0, 30: 3.0, 40: 2.5},
    "valid/loss": {20: 3.5, 40: 3.75},
    "machine/memory_gib": {40: 1.5},
    "machine/mfu": {40: 0.25},
    "time/slowest_rank": {40: 3.0},
    "time/slowest_ratio": {40: 1.25},
}


@pytest.fixture
def running(run: Run, publish: Callable[..., object]) -> Run:
    """A run that another process of this machine trains."""
    parent = os.getppid()
    run.begin(words_of(replace(Process.this(), pid=parent, ticks=owner._ticks(parent), user="me", host="here")))
    starts.note_progress(run.starts_dir, 1, replace(STEP, time=time.time() - 300))
    write_points(run, CURVES)
    publish(20)
    publish(40)
    os.utime(run.checkpoints()[-1].path, (time.time() - 1020,) * 2)
    run.logs_dir.mkdir()
    run.rank_log(0).write_text("step 30/100  loss 3.0  1 tokens/s  00:10 left\nlongseq: warning: slow\ndisk\x1b[2J\n")
    return run


@pytest.fixture
def viewer(running: Run) -> Viewer:
    viewer = Viewer(running)
    viewer.look()
    return viewer


def test_the_page_says_where_a_run_is(viewer, running):
    (left,) = [line for line in viewer.page() if line.startswith("left")]
    assert re.fullmatch(r"left      2 min at 0\.5 steps/s: until \w+ \d\d:\d\d, if nothing stops it", left)
    assert [line for line in viewer.page() if line != left] == [
        f"run       {running.path}",
        f"state     RUNNING: process {os.getppid()} of me on here",
        "step      40 of 100, loss 2.5000, 12,346 tokens/s; 5 min ago",
        "loss      train 2.5000 at step 40, valid 3.7500 at step 40, best valid 3.5000 at step 20",
        "ranks     1, on 1 node; the slowest is rank 3, 1.25 times the median's time",
        "memory    1.50 GiB, of the rank that uses most; 25.0% of the peak FLOP/s",
        "kept      checkpoints of step 20, 40; the newest 17 min ago",
        f"start 1   here process {os.getppid()}: to step 40",
        "",
        "longseq: warning: slow",
        "disk\x1b[2J",
    ]
    assert not viewer.over


def test_what_is_written_later_is_seen_at_the_next_look(viewer, running):
    starts.note_progress(running.starts_dir, 1, replace(STEP, step=50, loss=2.0, time=time.time()))
    with running.rank_log(0).open("a") as log:
        log.write("| 50% | step 50/100, 00:10 left\rlongseq: profile: there\n")
    (events,) = running.tensorboard_dir.iterdir()
    whole = write_points(running, {"train/loss": {50: 2.0}}, ending=".later")
    more = last_record(whole.read_bytes())
    whole.unlink()
    with events.open("ab") as file:
        file.write(more[:-5])
    viewer.look()
    assert viewer.page()[2].startswith("step      50 of 100, loss 2.0000, 12,346 tokens/s; ")
    assert viewer.page()[-1] == "longseq: profile: there"
    assert viewer.curves.newest("train/loss").step == 40  # its last record is half written
    with events.open("ab") as file:
        file.write(more[-5:])
    viewer.look()
    assert viewer.curves.newest("train/loss").value == 2.0


def last_record(events: bytes) -> bytes:
    """Of a file of events: lengths of 8 bytes tell where each begins."""
    begin, length = 0, 0
    while begin < len(events):
        length = int.from_bytes(events[begin : begin + 8], "little") + 16
        begin += length
    return events[-length:]


def test_a_resume_hides_the_points_that_it_writes_again(running):
    curves = LiveCurves()
    curves.look(running.tensorboard_dir)
    assert (curves.steps_per_second(), curves.newest("train/loss").step) == (0.5, 40)
    time.sleep(1.1)  # files of events are told apart by their second
    write_points(running, {"train/loss": {30: 3.25}}, start=20)
    curves.look()
    assert curves.newest("train/loss").step == 40  # it has not listed the folder
    curves.look(running.tensorboard_dir)
    assert {step: point.value for step, point in curves.points["train/loss"].items()} == {10: 5.0, 20: 4.0, 30: 3.25}
    assert curves.began == 20
    assert curves.steps_per_second() is None  # of this start there is one point


def test_pictures_are_passed_by_unread(running):
    time.sleep(1.1)
    with SummaryWriter(running.tensorboard_dir, purge_step=41) as writer:
        noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)  # 3 MB as a PNG, too
        writer.add_image("attention/layer00", noise, 50, dataformats="HWC")
        writer.add_scalar("train/loss", 1.5, 50)
    curves = LiveCurves()
    curves.look(running.tensorboard_dir)  # imports what reads events
    before, curves = _read_bytes(), LiveCurves()
    curves.look(running.tensorboard_dir)
    assert curves.newest("train/loss").value == 1.5
    assert sum(path.stat().st_size for path in running.tensorboard_dir.iterdir()) > 3_000_000
    assert _read_bytes() - before < 200_000


def _read_bytes() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


NOTED: list[tuple[str, str]] = []
NOTING: list[bool] = []


@cache
def note_events() -> None:
    """For good: an audit hook cannot be taken away."""

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if NOTING and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen"):
            NOTED.append((event, str(arguments[0])))

    sys.addaudithook(note)


@pytest.fixture
def noted() -> Iterator[list[tuple[str, str]]]:
    """Every file that is opened, folder that is listed and process that is started from now on."""
    note_events()
    NOTED.clear()
    NOTING.append(True)
    yield NOTED
    NOTING.clear()


def test_between_thorough_looks_one_small_file_is_read_and_nothing_listed(viewer, running, noted):
    for _ in range(20):
        viewer.look()
    assert noted == [("open", str(running.starts_dir / "00001.step"))] * 20
    viewer._asked -= watch._THOROUGH_SECONDS
    viewer.look()
    assert {event for event, _ in noted} == {"open", "os.listdir", "os.scandir"}


def test_looking_changes_nothing(viewer, running):
    before = {path: path.stat().st_mtime_ns for path in running.path.rglob("*")}
    other = Viewer(running)
    for _ in range(3):
        other.look()
        viewer.look()
    assert viewer.page()[1:3] == other.page()[1:3]
    assert {path: path.stat().st_mtime_ns for path in running.path.rglob("*")} == before


def test_a_file_system_that_is_away_is_said_and_waited_for(viewer, running, monkeypatch):
    before = viewer.page()
    starts.note_progress(running.starts_dir, 1, replace(STEP, step=60))
    read = starts.read_progress

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(starts, "read_progress", stale)
    for ago in (0, watch._THOROUGH_SECONDS):  # a quick look, and a thorough one
        viewer._asked -= ago
        viewer.look()
        first, *rest = viewer.page()
        assert re.fullmatch(r"warning   Stale file handle; all this is as of \d+ s ago", first)
        assert rest[:2] == before[:2]
        assert rest[2].startswith("step      40 of 100, ")  # as before
    monkeypatch.setattr(starts, "read_progress", read)
    viewer.look()
    assert viewer.page()[2].startswith("step      60 of 100, ")
    monkeypatch.setattr(starts, "read_progress", stale)
    with pytest.raises(OSError, match="Stale"):
        Viewer(running).look()


def test_slurm_is_asked_once_and_not_at_every_look(running, tmp_path, monkeypatch, noted):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho '12|RUNNING|None|1:02:03|n[1-2]|2026-01-01T00:00:00|me|12|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    record_job(running, "12", "longseq submit")
    starts.path_of(running.starts_dir, 1, "silent").write_text("n2: rank 3 (cuda:1) says nothing\n")
    viewer = Viewer(running)
    for _ in range(10):
        viewer.look()
    assert viewer.page()[1:3] == [
        "state     RUNNING: n2: rank 3 (cuda:1) says nothing",
        "job       12 on n[1-2], 1:02:03 left",
    ]
    assert [what for event, what in noted if event == "subprocess.Popen"] == ["squeue"]


def test_an_end_is_seen_at_the_next_look(viewer, running):
    starts.note_end(running.starts_dir, 1, "saved")
    viewer.look()
    assert viewer.over
    assert viewer.page()[1] == "state     ENDED: saved"
    assert f"Go on with:    {running.resume_command}" in viewer.page()
    assert not [line for line in viewer.page() if line.startswith("left")]
    running.mark_finished(100)
    viewer.look()
    assert viewer.over
    assert viewer.page()[1] == "state     FINISHED"


def test_a_run_that_was_never_started_has_a_page(run, capsys):
    assert main(["watch", str(run.path), "--once"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run       {run.path}",
        "state     ENDED",
        "ranks     1, on 1 node",
        "kept      no checkpoint yet",
        f"Go on with:    {run.resume_command}",
    ]


def test_bytes_that_a_disk_has_damaged_end_neither_verb(running, capsys):
    for what in ("start", "end"):
        starts.path_of(running.starts_dir, 1, what).write_bytes(b"crash\xff of it\n")
    (running.path / "STOPPED").write_bytes(b"too often\xff\n")
    for verb in ("watch", "status"):
        assert main([verb, str(running.path)]) == 0
        assert "start 1   crash\ufffd of it: to step 40, crash\ufffd of it" in capsys.readouterr().out


def test_where_there_is_no_terminal_the_page_is_printed_once(running, capsys, monkeypatch):
    for options in ([], ["--once"], ["dumb"]):
        if options == ["dumb"]:  # an editor's terminal: it would show the codes that move the cursor
            monkeypatch.setenv("TERM", options.pop())
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["watch", str(running.path), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == f"state     RUNNING: process {os.getppid()} of me on here"
        assert lines[-1] == "disk [2J"  # what would clear the screen is not passed on


@pytest.mark.parametrize("interval", ["0.5", "0", "-1", "nan", "x"])
def test_an_interval_is_a_second_or_more(run, capsys, interval):
    with pytest.raises(SystemExit):
        main(["watch", str(run.path), "--interval", interval])
    assert f"'{interval}' is not a number of seconds from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "columns"), [("abcdefgh", "abcde"), ("你好吗", "你好"), ("e\u0301" * 9, "e\u0301" * 5)]
)
def test_a_line_is_as_wide_as_the_terminal_at_the_most(text, columns):
    assert fitted(text, 5) == columns


def test_a_narrow_terminal_without_the_letters_shows_what_it_can(viewer, running, monkeypatch):
    with running.rank_log(0).open("a") as log:
        log.write("naïve 语言 ω\n")
    viewer.look()
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("LINES", "14")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", errors="replace"))
    watch._draw(viewer.page())
    text = written.getvalue().decode("latin-1")
    lines = re.sub(r"\x1b\[\d*[A-Za-z]", "", text).splitlines()
    assert "\x1b[2J" not in text
    assert len(lines) == 13
    assert max(map(len, lines)) == 24
    assert "step      40 of 100, los" in lines
    assert lines[-1] == "na\xefve ?? ?"


class Terminal:
    """A ``longseq watch`` on a terminal of its own."""

    def __init__(self, run: Run):
        self.end, theirs = pty.openpty()
        command = [sys.executable, "-m", "longseq.cli", "watch", str(run.path), "--interval", "1"]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(theirs)
        self.shown = b""

    def read_until(self, text: bytes) -> None:
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self.end, 4096)

    def ended(self) -> tuple[int, bytes]:
        """Its exit code, and all that it has shown."""
        code = self.process.wait(30)
        while True:
            try:
                block = os.read(self.end, 4096)
            except OSError:  # the other end is closed
                return code, self.shown
            self.shown += block


def test_two_follow_a_run_until_ctrl_c_and_until_its_end(running):
    first, second = Terminal(running), Terminal(running)
    for terminal in (first, second):
        terminal.read_until(b"step      40 of 100")
    starts.note_progress(running.starts_dir, 1, replace(STEP, step=41, time=time.time()))
    for terminal in (first, second):
        terminal.read_until(b"step      41 of 100")
    first.process.send_signal(signal.SIGINT)
    code, shown = first.ended()
    assert code == 130
    assert shown.endswith(b"\x1b[?25h")  # the cursor is back, and nothing is said
    running.mark_finished(100)
    starts.note_end(running.starts_dir, 1, "finished")
    code, shown = second.ended()
    assert code == 0
    assert b"state     FINISHED" in shown
    assert shown.endswith(b"\x1b[?25h")
