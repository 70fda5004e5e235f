"""`longseq data fetch` as a person types it, in real processes, from a server on this machine."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import LONGSEQ, Command, Ended, longseq
from uniprot_server import Mood, Server, serve

CONTENT = random.Random(1).randbytes(1_000_003)
FOLDER = "current_release/uniref/uniref50"
PATH = f"/{FOLDER}/uniref50.fasta.gz"
SLOW = Mood(trickle=0.05)  # 16 KiB, twenty times a second


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        server.put(FOLDER, {"uniref50.fasta.gz": CONTENT})
        yield server


def arguments(server: Server, *more: object) -> list[object]:
    return ["data", "fetch", "uniref50", "--mirror", server.address, "--to", "corpora", "--timeout", 5, *more]


def fetch(server: Server, folder: Path, *more: object, **settings: object) -> Ended:
    return longseq(*arguments(server, *more), folder=folder, **settings)


def wait_for(part: Path, size: int) -> None:
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < size:
        assert time.monotonic() < deadline, "no such part in time"
        time.sleep(0.01)


def test_a_file_is_fetched_and_the_last_lines_say_what_it_is(server: Server, tmp_path: Path):
    ended = fetch(server, tmp_path)
    assert ended.code == 0, ended.err
    first, second = ended.out.splitlines()
    assert re.fullmatch(
        r"corpora/uniref50\.fasta\.gz: release 2024_02, 1,000,003 bytes, md5 [0-9a-f]{32} as its metalink says", first
    )
    assert second == "next: longseq data prepare CONFIG sources='[corpora/uniref50.fasta.gz]'"
    assert ended.err.splitlines()[-1] == "uniref50: 1,000,003 of 1,000,003 bytes (100 %)"
    assert (tmp_path / "corpora/uniref50.fasta.gz").read_bytes() == CONTENT
    again = fetch(server, tmp_path)
    assert again.code == 0
    assert again.out.splitlines()[0] == f"{first}, was there"
    assert server.sent(PATH) == len(CONTENT)


def test_after_kill_9_the_next_process_asks_for_the_rest_only(server: Server, tmp_path: Path):
    server.mood(PATH, SLOW, SLOW)
    part = tmp_path / "corpora/uniref50.fasta.gz.part"
    kept = []
    for size in (100_000, 300_000):
        command = Command(*arguments(server), folder=tmp_path)
        wait_for(part, size)
        command.kill(command.process.pid)
        command.end()
        kept.append(part.stat().st_size)
        assert not part.with_suffix("").exists()
    ended = fetch(server, tmp_path)
    assert ended.code == 0, ended.err
    assert (tmp_path / "corpora/uniref50.fasta.gz").read_bytes() == CONTENT
    assert [asked.range for asked in server.of(PATH)] == [None, *(f"bytes={size}-" for size in kept)]
    assert server.of(PATH)[-1].sent == len(CONTENT) - kept[-1]
    assert not list(part.parent.glob("*.part*"))


def test_ctrl_c_says_how_to_go_on(server: Server, tmp_path: Path):
    server.mood(PATH, SLOW)
    part = tmp_path / "corpora/uniref50.fasta.gz.part"
    command = Command(*arguments(server), folder=tmp_path)
    wait_for(part, 50_000)
    command.interrupt()
    ended = command.end()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert re.search(
        r"^Stopped: [\d,]+ of 1,000,003 bytes are kept in corpora/uniref50\.fasta\.gz\.part; run the same command "
        r"again: it goes on there\.$",
        ended.err,
        re.MULTILINE,
    )
    kept = part.stat().st_size
    assert fetch(server, tmp_path).code == 0
    assert server.of(PATH)[-1].range == f"bytes={kept}-"


def test_of_two_processes_the_second_is_told(server: Server, tmp_path: Path):
    server.mood(PATH, SLOW)
    first = Command(*arguments(server), folder=tmp_path)
    wait_for(tmp_path / "corpora/uniref50.fasta.gz.part", 1)
    second = fetch(server, tmp_path)
    assert second.code == 1
    assert second.sentence.endswith(
        "uniref50.fasta.gz.part: another process is fetching this file; wait for it, or choose another folder."
    )
    assert first.end().code == 0
    assert (tmp_path / "corpora/uniref50.fasta.gz").read_bytes() == CONTENT


def test_a_limit_on_the_size_of_files_keeps_the_part(server: Server, tmp_path: Path):
    limited = fetch(server, tmp_path, inside=["bash", "-c", 'ulimit -f 256; exec "$@"', "limited"])  # KiB
    assert limited.code == 1
    assert limited.sentence.startswith("corpora/uniref50.fasta.gz.part: cannot be written (File too large); raise")
    assert "262,144 of 1,000,003 bytes are kept" in limited.sentence
    assert fetch(server, tmp_path).code == 0
    assert server.of(PATH)[-1].range == "bytes=262144-"
    assert (tmp_path / "corpora/uniref50.fasta.gz").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--format", "dat"], "uniref50 has no format 'dat'; it has fasta or xml."),
        (["--release", "2001_01"], "the previous ones are listed at"),
        (["--tries", "0"], "0 tries are none; give at least 1."),
        (["--timeout", "0"], "a timeout of 0 seconds: give more than 0 and less than a day."),
        (["--timeout", "nan"], "a timeout of nan seconds: give more than 0 and less than a day."),
        (["--mirror", "ftp.uniprot.org"], "mirror 'ftp.uniprot.org': neither uniprot, ebi or expasy nor the http(s)"),
    ],
)
def test_a_mistake_is_one_sentence(more: list[str], sentence: str, server: Server, tmp_path: Path):
    ended = fetch(server, tmp_path, *more)
    assert ended.code == 1
    assert sentence in ended.sentence


@pytest.mark.interfaces
def test_a_terminal_shows_a_bar(server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=300_000))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # lines, columns
    process = subprocess.Popen(
        [str(LONGSEQ), *map(str, arguments(server))],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"uniref50: 100%" in shown
    assert b"the connection was cut after 300,000 bytes; trying again in 1 s." in shown
