"""What a download refuses, what it never overwrites, and what it says when it gives up."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import resource
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from downloads import CONTENT, OTHER, PATH, PROMISE, QUICK, assert_part, assert_whole, files
from longseq_data.errors import DataError
from longseq_data.fetch.download import ChangedError, MissingError, download, read_document
from longseq_data.fetch.partial import Promise
from uniprot_server import File, Mood, Server


def test_a_wrong_checksum_keeps_nothing_under_the_final_name(get, server: Server, tmp_path: Path):
    server.files[PATH] = File(OTHER)
    with pytest.raises(DataError) as caught:
        get()
    assert f"wrong checksum: its md5 is {hashlib.md5(OTHER).hexdigest()}, the release's metalink says" in str(
        caught.value
    )
    assert "nothing was kept" in str(caught.value)
    assert files(tmp_path) == []


def test_a_part_that_was_damaged_on_disk_is_found_out(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=100_000), Mood(status=403))
    with pytest.raises(DataError):
        get()
    with (tmp_path / "file.gz.part").open("r+b") as part:
        part.seek(5000)
        part.write(bytes(4096))
    with pytest.raises(DataError, match="wrong checksum"):
        get()
    get()
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        (Mood(status=404), r": not found on the server \(404 Not Found\); check the release and the mirror\.$"),
        (Mood(status=403), r": refused by the server \(403 Forbidden\); check the address, or name another mirror\.$"),
        (Mood(status=401), r": refused by the server \(401 Unauthorized\)"),
        (
            Mood(body=b"<html>Log in</html>", headers={"Content-Type": "text/html; charset=utf-8"}),
            r": the answer is a web page, not the file; a proxy or a login may be in the way",
        ),
        (Mood(status=302, headers={"Location": PATH}), None),
        (
            Mood(status=302, headers={"Location": "file:///etc/passwd"}),
            r": redirected in a circle, or away from HT",
        ),
        (Mood(status=302, headers={"Location": "ftp://example.org/x"}), r": redirected to ftp://example.org/x, which"),
    ],
)
def test_what_trying_again_cannot_mend_is_said_at_once(mood: Mood, message: str | None, get, server, tmp_path: Path):
    server.mood(PATH, mood)
    if message is None:  # a redirect is followed
        get()
        assert_whole(tmp_path)
        return
    with pytest.raises(DataError, match=message):
        get()
    assert len(server.asked) == 1
    assert files(tmp_path) == []


def test_a_redirect_without_end_is_said(get, server: Server):
    server.mood(PATH, *[Mood(status=301, headers={"Location": PATH})] * 20)
    with pytest.raises(DataError, match="redirected in a circle, or away"):
        get()


def test_a_redirect_keeps_the_range(get, server: Server, tmp_path: Path):
    server.files["/there.gz"] = File(CONTENT)
    moved = Mood(status=302, headers={"Location": "/there.gz"})
    server.mood(PATH, moved, moved)
    server.mood("/there.gz", Mood(cut_after=100_000))
    get()
    assert_whole(tmp_path)
    assert server.of("/there.gz")[1].range == "bytes=100000-"
    assert server.sent("/there.gz") == len(CONTENT)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_a_busy_or_broken_server_is_asked_again(status: int, get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(cut_after=100_000), Mood(status=status, headers={"Retry-After": "0"}))
    get()
    assert_whole(tmp_path)
    assert said[1].startswith(f"the server is busy or broken ({status} ")


def test_a_broken_server_is_given_up_in_the_end(get, server: Server, tmp_path: Path):
    server.mood(PATH, *[Mood(status=503)] * 3)
    with pytest.raises(DataError, match=r"busy or broken \(503 Service Unavailable\), 3 times in a row; check the"):
        get()
    assert files(tmp_path) == []


def test_nobody_at_the_address(get, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        with pytest.raises(DataError, match="the server refuses connections, 3 times in a row; check the connection"):
            get(url=f"http://127.0.0.1:{taken.getsockname()[1]}/file.gz")
    with pytest.raises(DataError, match=r"no connection \(.*\), 3 times in a row"):
        get(url="http://nobody.invalid/file.gz")
    assert files(tmp_path) == []


def test_a_file_that_is_there_is_checked_and_not_asked_for(get, server: Server, tmp_path: Path):
    get()
    assert get() == 0
    assert len(server.asked) == 1
    assert_whole(tmp_path)


@pytest.mark.parametrize("content", [OTHER, CONTENT + b"x", b""], ids=["content", "longer", "empty"])
def test_another_file_under_the_name_is_never_overwritten(content: bytes, get, server: Server, tmp_path: Path):
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.gz exists and is not the file of release 2024_02 .*; move it away, or"):
        get()
    assert (tmp_path / "file.gz").read_bytes() == content
    assert files(tmp_path) == ["file.gz"]


def test_a_second_process_is_told(get, server: Server, tmp_path: Path):
    part = tmp_path / "file.gz.part"
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"file\.gz\.part: another process is fetching this file; wait for it, or"):
            get()
    assert part.exists()  # it is the other's
    assert server.asked == []
    get()
    assert_whole(tmp_path)


def test_a_full_disk_is_said(get, server: Server, tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "file.gz.part").symlink_to("/dev/full")
    with pytest.raises(
        DataError,
        match=r"cannot be written \(No space left on device\); make room, .*\. 0 of 300,017 bytes",
    ):
        get()
    assert not (tmp_path / "file.gz").exists()


def test_more_than_the_disk_has_is_not_begun(get, server: Server, tmp_path: Path):
    with pytest.raises(DataError, match=r"more bytes are needed and .* are free; make room, or choose another folder"):
        get(Promise(1 << 60, "md5", "0" * 32, "x"))
    assert server.asked == []
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\); a part of this path is a file"):
        download(server.address + PATH, tmp_path / "file" / "x" / "file.gz", PROMISE, patience=QUICK)


def test_ctrl_c_keeps_the_part_and_says_how_to_go_on(get, server: Server, tmp_path: Path, said: list[str]):
    def interrupt(done: int, total: int) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(progress=interrupt)
    kept = (tmp_path / "file.gz.part").stat().st_size
    assert kept > 100_000
    assert_part(tmp_path, kept)
    assert said == [
        f"Stopped: {kept:,} of 300,017 bytes are kept in {tmp_path}/file.gz.part; run the same command again: it goes "
        f"on there."
    ]
    assert get() == len(CONTENT) - kept
    assert_whole(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_any_series_of_bad_days_ends_in_the_right_file(seed: int, get, server: Server, tmp_path: Path):
    rng = random.Random(seed)
    for _ in range(12):
        n = rng.randrange(60_000)
        server.mood(
            PATH,
            rng.choice(
                [
                    Mood(cut_after=n),
                    Mood(cut_after=n, chunked=True),
                    Mood(drop=True),
                    Mood(status=503),
                    Mood(cut_after=n, ignore_range=True),
                    Mood(cut_after=n, file=File(CONTENT, f'"{n}"')),
                    Mood(status=403),
                    Mood(headers={"Content-Range": "bytes 1-2/3"}, cut_after=10),
                ]
            ),
        )
    for _ in range(30):
        try:
            get()
        except (DataError, ChangedError):
            assert not (tmp_path / "file.gz").exists()
            continue
        break
    assert_whole(tmp_path)


@pytest.mark.parametrize("url", ["http://", "http://[x/", "http://a b/", "gopher://x/", "file:///etc/passwd", "x"])
def test_an_address_that_is_none(url: str, get, tmp_path: Path):
    with pytest.raises(DataError):
        get(url=url)
    assert files(tmp_path) == []


def test_a_document_is_read_with_the_same_patience(server: Server, said: list[str]):
    server.files["/x"] = File(b"abc" * 1000)
    server.mood("/x", Mood(status=503), Mood(cut_after=100))
    assert read_document(f"{server.address}/x", patience=QUICK, notice=said.append) == b"abc" * 1000
    assert len(said) == 2
    with pytest.raises(MissingError, match=r"/y: not found on the server \(404 Not Found\)"):
        read_document(f"{server.address}/y", patience=QUICK)
    server.mood("/x", Mood(trickle=0.05, piece=3), Mood(stall_after=100))
    read_document(f"{server.address}/x", patience=QUICK, notice=said.append)
    assert all(sentence.startswith("the server was silent for too long; ") for sentence in said[2:])
    server.mood("/x", *[Mood(cut_after=100)] * 3)
    with pytest.raises(DataError, match="the connection was cut; check the connection, or name another mirror"):
        read_document(f"{server.address}/x", patience=QUICK)


def test_a_document_without_end_is_not_read_into_memory(server: Server, monkeypatch: pytest.MonkeyPatch):
    from longseq_data.fetch import download as module

    monkeypatch.setattr(module, "MAX_DOCUMENT", 1000)
    with pytest.raises(DataError, match="more than 16 MiB"):
        read_document(server.address + PATH, patience=QUICK)


def test_no_descriptor_is_left_open(get, server: Server, tmp_path: Path):
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    server.mood(PATH, Mood(cut_after=10), Mood(status=403))
    with pytest.raises(DataError):
        get()
    get()
    get()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 1  # the server may have one left


def test_too_many_open_files_are_not_taken_for_the_network(get, server: Server, tmp_path: Path, said: list[str]):
    """Refused by the system itself, while a name is connected to; a wait would not help."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard[0], 256), hard[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        with pytest.raises(DataError) as caught:
            read_document(f"{server.address}{PATH}", patience=QUICK, notice=said.append)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)
    assert str(caught.value) == (
        f"{server.address}{PATH}: no connection can be made (Too many open files); this process has as many files open "
        "as it may; raise the limit (ulimit -n)."
    )
    assert said == []
    assert len(server.asked) == 0
