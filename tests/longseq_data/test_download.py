"""One file over HTTP, from a server that does what servers do on bad days: it comes whole, or goes on later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from downloads import CONTENT, OTHER, PATH, PROMISE, assert_part, assert_whole, files
from longseq_data.errors import DataError
from longseq_data.fetch.download import ChangedError
from longseq_data.fetch.partial import Promise
from uniprot_server import MONDAY, TUESDAY, File, Mood, Server


def test_a_file_comes_whole(get, server: Server, tmp_path: Path, said: list[str]):
    seen: list[tuple[int, int]] = []
    assert get(progress=lambda done, total: seen.append((done, total))) == len(CONTENT)
    assert_whole(tmp_path)
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert (len(server.asked), said) == (1, [])


def test_a_cut_connection_goes_on_where_it_stopped(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(cut_after=70_001), Mood(cut_after=0), Mood(drop=True), Mood(cut_after=100_000))
    get()
    assert_whole(tmp_path)
    assert [asked.range for asked in server.asked] == [None, *["bytes=70001-"] * 3, "bytes=170001-"]
    assert [asked.if_range for asked in server.asked] == [None, *['"1"'] * 4]
    assert server.sent(PATH) == len(CONTENT)
    assert said[0] == "the connection was cut after 70,001 bytes; trying again in 0 s."
    assert len(said) == 4


def test_tries_are_counted_anew_when_something_came(get, server: Server, tmp_path: Path):
    server.mood(PATH, *[Mood(cut_after=n) for n in (1, 0, 0, 1, 0, 0, 1, 0, 0)])
    get()
    assert_whole(tmp_path)


def test_silence_is_a_cut(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(stall_after=50_000), Mood(stall_after=0))
    get()
    assert_whole(tmp_path)
    assert server.sent(PATH) == len(CONTENT)
    assert said[0].startswith("the server was silent for too long after 50,000 bytes; trying again")


def test_a_trickle_is_silence(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(trickle=0.05, piece=3))
    get()
    assert_whole(tmp_path)
    assert "silent for too long" in said[0]


def test_a_server_that_never_answers_is_given_up_with_the_part_kept(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=70_000), *[Mood(cut_after=0)] * 3)
    with pytest.raises(DataError) as caught:
        get()
    assert str(caught.value) == (
        f"{server.address}{PATH}: the connection was cut, 3 times in a row; 70,000 of 300,017 bytes are kept in "
        f"{tmp_path}/file.gz.part; check the connection, or name another mirror, and run the same command again: it "
        f"goes on where it stopped."
    )
    assert_part(tmp_path, 70_000)
    assert get() == len(CONTENT) - 70_000
    assert_whole(tmp_path)


def test_another_process_goes_on_without_asking_for_what_is_there(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=123_457), Mood(status=403))
    with pytest.raises(DataError, match=r"refused by the server \(403 Forbidden\); check"):
        get()
    state = json.loads((tmp_path / "file.gz.part.json").read_text())
    assert state == {
        "size": 300_017,
        "algorithm": "md5",
        "checksum": PROMISE.checksum,
        "release": "2024_02",
        "conditions": {"url": server.address + PATH, "ETag": '"1"', "Last-Modified": MONDAY},
    }
    assert_part(tmp_path, 123_457)
    assert get() == len(CONTENT) - 123_457
    assert_whole(tmp_path)
    assert server.sent(PATH) == len(CONTENT)


def test_another_mirror_goes_on_with_the_part(get, server: Server, tmp_path: Path):
    server.files["/mirror.gz"] = File(CONTENT, etag='"else"', modified=TUESDAY)
    server.mood(PATH, Mood(cut_after=100_000), Mood(status=403))
    with pytest.raises(DataError):
        get()
    assert get(url=f"{server.address}/mirror.gz") == len(CONTENT) - 100_000
    assert server.of("/mirror.gz")[0].if_range is None
    assert_whole(tmp_path)


def test_a_whole_part_is_not_asked_for(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=100), Mood(status=403))
    with pytest.raises(DataError):
        get()
    (tmp_path / "file.gz.part").write_bytes(CONTENT)
    assert get() == 0
    assert len(server.asked) == 2
    assert_whole(tmp_path)


@pytest.mark.parametrize("state", [None, "", "{}", "[1]", '{"conditions": 3}', '{"conditions": {}, "size": 1}'])
def test_a_part_of_unknown_origin_is_not_used(state: str | None, get, tmp_path: Path, said: list[str]):
    (tmp_path / "file.gz.part").write_bytes(OTHER[:1000])
    if state is not None:
        (tmp_path / "file.gz.part.json").write_text(state)
    assert get() == len(CONTENT)
    assert_whole(tmp_path)
    assert said == [f"{tmp_path}/file.gz.part is no part of this file (release 2024_02); starting from the beginning."]


def test_a_part_of_another_release_is_not_used(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(cut_after=1000), Mood(status=403))
    with pytest.raises(DataError):
        get()
    server.files[PATH] = File(OTHER)
    promise = Promise(len(OTHER), "md5", hashlib.md5(OTHER).hexdigest(), "2024_03")
    assert get(promise) == len(OTHER)
    assert (tmp_path / "file.gz").read_bytes() == OTHER
    assert "is no part of this file (release 2024_03); starting from" in said[-1]


def test_a_server_without_ranges_starts_again(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(cut_after=100_000), Mood(ignore_range=True))
    get()
    assert_whole(tmp_path)
    assert said[-1].endswith(": the server cannot go on in the middle of a file; starting from the beginning.")


def test_a_server_without_ranges_that_always_cuts_is_given_up(get, server: Server, tmp_path: Path):
    server.mood(PATH, *[Mood(cut_after=100_000, ignore_range=True)] * 9)
    with pytest.raises(DataError, match="the connection was cut, 3 times in a row"):
        get()
    assert len(server.asked) == 4


def test_a_server_that_answers_another_range_starts_again(get, server: Server, tmp_path: Path):
    lie = {"Content-Range": f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.mood(PATH, Mood(cut_after=100_000), Mood(headers=lie))
    get()
    assert_whole(tmp_path)


def test_a_file_that_changes_on_the_way_is_reported_and_nothing_is_mixed(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=100_000), Mood(file=File(OTHER, '"2"', TUESDAY)))
    with pytest.raises(ChangedError, match="has changed"):
        get()
    assert files(tmp_path) == []


def test_servers_that_differ_in_their_tags_only_are_one(get, server: Server, tmp_path: Path, said: list[str]):
    server.mood(PATH, Mood(cut_after=100_000), Mood(file=File(CONTENT, '"node 2"')))
    get()
    assert_whole(tmp_path)
    assert [asked.if_range for asked in server.asked] == [None, '"1"', None]
    assert len(said) == 1  # the cut


@pytest.mark.parametrize(
    ("file", "condition"),
    [(File(CONTENT, 'W/"1"'), MONDAY), (File(CONTENT, None), MONDAY), (File(CONTENT, None, None), None)],
    ids=["weak tag", "no tag", "neither tag nor date"],
)
def test_a_resume_says_what_must_not_have_changed(file: File, condition: str, get, server: Server, tmp_path: Path):
    server.files[PATH] = file
    server.mood(PATH, Mood(cut_after=100_000))
    get()
    assert_whole(tmp_path)
    assert server.asked[1].if_range == condition
    assert server.sent(PATH) == len(CONTENT)


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_file_of_another_size_is_not_begun(length: int, get, server: Server, tmp_path: Path):
    server.files[PATH] = File((CONTENT + b"x")[:length])
    with pytest.raises(ChangedError, match=f"has {length:,} bytes, and the release's metalink says 300,017$"):
        get()
    assert files(tmp_path) == []


def test_a_part_longer_than_the_servers_file(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(cut_after=100_000), Mood(file=File(CONTENT[:50_000], '"1"', MONDAY)))
    with pytest.raises(ChangedError, match="is shorter than"):
        get()


def test_a_length_that_promises_more_than_comes_is_a_cut(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(body=CONTENT[:9000], headers={"Content-Length": str(len(CONTENT))}))
    get()
    assert_whole(tmp_path)
    assert server.asked[1].range == "bytes=9000-"


@pytest.mark.parametrize("chunked", [Mood(chunked=True), Mood(chunked=True, cut_after=99_999)], ids=["whole", "cut"])
def test_a_server_that_says_no_length(chunked: Mood, get, server: Server, tmp_path: Path):
    server.mood(PATH, chunked)
    get()
    assert_whole(tmp_path)
    assert server.sent(PATH) == len(CONTENT)


def test_a_server_that_sends_too_much_is_refused(get, server: Server, tmp_path: Path):
    server.mood(PATH, Mood(chunked=True, extra=b"more"))
    with pytest.raises(DataError, match=r"sends more than the 300,017 bytes that the .* says; nothing was kept; try"):
        get()
    assert files(tmp_path) == []
