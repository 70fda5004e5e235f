"""Paths, globs and URLs."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longseq_data.errors import DataError
from longseq_data.ingest.cache import entry_of
from longseq_data.ingest.parse import parsed
from longseq_data.prepare.identity import identify
from longseq_data.readers.fasta import read_records
from longseq_data.readers.formats import Leaf, leaves
from longseq_data.readers.reading import FASTA as FASTA_READING
from longseq_data.readers.reading import Reading
from longseq_data.readers.sources import expand_sources

FASTA = ">a first\nMKV\nLA\n>b\nACD\n"


def contents(source: str) -> list[tuple[str, str, str, int]]:
    return [(r.identifier, r.description, r.sequence, r.line) for r in read_records(source)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_plain_gzipped_url_and_memory_give_the_same_records(write, http_address):
    plain = write("a.fasta", FASTA)
    zipped = write("b.fasta.gz", gzip.compress(FASTA.encode()))
    disguised = write("zipped_but_named.fasta", gzip.compress(FASTA.encode()))
    fsspec.filesystem("memory").pipe("/longseq/a.fasta", FASTA.encode())
    expected = [("a", "a first", "MKVLA", 1), ("b", "b", "ACD", 4)]
    urls = [f"{http_address}/a.fasta", f"{http_address}/b.fasta.gz", "memory://longseq/a.fasta", f"file://{plain}"]
    for source in [plain, zipped, disguised, *urls]:
        assert contents(source) == expected, source


def test_a_url_larger_than_every_buffer_is_read_to_its_end(write, http_address):
    text = "".join(f">r{i}\n{'ACDEFGHIKL' * 50}\n" for i in range(15_000))  # 7.6 MB
    write("large.fasta", text)
    assert sum(len(r.sequence) for r in read_records(f"{http_address}/large.fasta")) == 15_000 * 500


def test_globs_are_sorted_absolute_and_without_duplicates(write, tmp_path, monkeypatch):
    b, a = write("b.fasta", FASTA), write("a.fasta", FASTA)
    (tmp_path / "folder.fasta").mkdir()
    monkeypatch.chdir(tmp_path)
    assert expand_sources(["*.fasta"]) == [a, b]
    assert expand_sources(["b.fasta", "*.fasta", a]) == [b, a]
    assert expand_sources([str(tmp_path / "**" / "a.*")]) == [a]


def test_a_file_of_several_names_comes_once_by_the_first(write, tmp_path):
    a, b = write("a.fasta", FASTA), write("b.fasta", FASTA)
    (tmp_path / "soft.fasta").symlink_to(a)
    (tmp_path / "hard.fasta").hardlink_to(a)
    (tmp_path / "sub").mkdir()
    around = str(tmp_path / "sub" / ".." / "a.fasta")
    for first in (a, str(tmp_path / "soft.fasta"), str(tmp_path / "hard.fasta"), around, f"file://{a}"):
        assert expand_sources([first, a, str(tmp_path / "*.fasta"), around, f"file://{a}"]) == [first, b]


def test_a_local_url_is_not_opened(tmp_path):
    urls = [f"file://{tmp_path}/{name}.fasta" for name in ("none", "neither")]
    assert expand_sources(urls) == urls


def test_a_glob_in_a_working_directory_whose_name_looks_like_one(tmp_path, monkeypatch):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.fasta").write_text(FASTA)
    monkeypatch.chdir(tmp_path / "run[1]")
    assert expand_sources(["*.fasta"]) == [str(tmp_path / "run[1]" / "a.fasta")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "A file name is empty (''); remove it"),
        (" ", "A file name is empty (' '); remove it"),
        (["a"], "['a'] is no file name; several names go in one pair of brackets"),
        (None, "None is no file name; several"),
    ],
)
def test_what_is_no_name_gets_a_sentence(pattern: object, message: str):
    with pytest.raises(DataError) as caught:
        expand_sources([pattern])  # type: ignore[list-item]
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.fasta"), "${run}.fasta"], ids=["not UTF-8", "interpolation"])
def test_names_that_a_configuration_cannot_hold_are_refused(name: str, tmp_path):
    (tmp_path / name).write_text(FASTA)
    for pattern in (str(tmp_path / name), str(tmp_path / "*.fasta")):
        with pytest.raises(DataError, match=r"configuration .*; rename it\.$") as caught:
            expand_sources([pattern])
        str(caught.value).encode()  # can be printed


def test_a_file_whose_name_looks_like_a_glob_is_a_file(write):
    odd = write("a[1].fasta", FASTA)
    assert expand_sources([odd]) == [odd]


def test_the_home_folder_is_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    a = write("a.fasta", FASTA)
    assert expand_sources(["~/a.fasta", "~/*.fasta"]) == [a]


def test_globs_of_urls_use_the_filesystem(write, http_address):
    for name in ("x1.fa", "x2.fa", "y.fa"):
        fsspec.filesystem("memory").pipe(f"/globbed/{name}", FASTA.encode())
        write(name, FASTA)
    assert expand_sources(["memory://globbed/x*.fa"]) == ["memory:///globbed/x1.fa", "memory:///globbed/x2.fa"]
    assert expand_sources([f"{http_address}/x*.fa"]) == [f"{http_address}/x1.fa", f"{http_address}/x2.fa"]
    assert [r.identifier for r in read_records("memory:///globbed/x1.fa")] == ["a", "b"]


def test_a_query_and_an_ipv6_host_are_no_globs():
    urls = ["https://host/get?format=fasta", "http://[::1]:80/a.fasta"]
    assert expand_sources(urls) == urls


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.fasta", "missing.fasta does not exist (looked in {here}); correct the path."),
        ("*.nothing", "No file matches *.nothing (looked in {here}); correct the pattern."),
        ("sub", "sub is a directory; name its files, for example 'sub/*.fasta.gz'."),
        ("sub/", "sub/ is a directory; name its files, for example 'sub/*.fasta.gz'."),
        ("~nobody-of-that-name/a.fasta", "~nobody-of-that-name/a.fasta does not exist (looked in {here}); correct the"),
        ("/dev/null", "/dev/null is no regular file"),
        ("memory://no*.thing", "No file matches memory://no*.thing"),
        ("nonsense://a*b", "nonsense://a*b: unknown kind of URL"),
    ],
)
def test_sources_that_are_not_there(pattern: str, message: str, tmp_path: Path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        expand_sources([pattern])
    assert str(caught.value).startswith(message.format(here=tmp_path))


def test_an_address_that_the_server_does_not_know(http_address):
    with pytest.raises(DataError, match=r"/none\.fasta: not found; correct the address\.$"):
        list(read_records(f"{http_address}/none.fasta"))


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_wants_other_credentials(http_address, monkeypatch, code):
    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", lambda self: self.send_error(code))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_HEAD", lambda self: self.send_error(code))
    with pytest.raises(DataError, match=rf"/a\.fasta: cannot be read \(.*{code}.*\); check your credentials for it\.$"):
        list(read_records(f"{http_address}/a.fasta"))


def test_a_bucket_whose_plugin_finds_no_credentials(bucket, monkeypatch):
    class NoCredentialsError(Exception):  # botocore's, which is no OSError
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    for name in ("info", "glob", "_open"):
        monkeypatch.setattr(Bucket, name, refuse)
    for source in ("bucket://a/b.fasta", "bucket://a/*.fasta"):
        with pytest.raises(DataError) as caught:
            [list(read_records(each)) for each in expand_sources([source])]
        assert str(caught.value).endswith(
            "(NoCredentialsError: Unable to locate credentials); check your credentials for it."
        )


def test_a_server_that_does_not_answer():
    source = f"http://127.0.0.1:{free_port()}/a.fasta"
    with pytest.raises(DataError) as caught:
        list(read_records(source))
    message = str(caught.value)
    assert message.startswith(f"{source}: cannot be read (")
    assert message.endswith("check the address and the connection.")
    assert "\n" not in message


def test_kinds_of_urls_that_cannot_be_opened():
    with pytest.raises(DataError, match=r"^nonsense://a/b: unknown kind of URL .*; use a path"):
        list(read_records("nonsense://a/b"))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_bucket_says_what_to_install(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # also where it is installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for source in (f"{scheme}://bucket/a.fasta.gz", f"{scheme}://bucket/*.fasta.gz", f"{scheme}://bucket/a.parquet"):
        with pytest.raises(DataError) as caught:
            read(source)
        assert str(caught.value) == (
            f"{source}: this kind of URL needs a package that is missing: pip install {package}"
        )


def read(source: str) -> list[list[bytes]]:
    """The tokens of its records, block by block."""
    (leaf,) = leaves(*expand_sources([source]), "auto")
    reading = Reading("auto", "protein" if leaf.format == "fasta" else "bytes")
    return [block.ids(range(len(block))) for block in parsed(reading, leaf, strict=False)]


class Bucket(MemoryFileSystem):
    """What s3fs is to fsspec: files under a scheme of its own, with tags of their content and no local path."""

    protocol = "bucket"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def info(self, path: str, **options: object) -> dict[str, object]:
        found = super().info(path, **options)
        content = self.store.get(self._strip_protocol(path))
        return found if content is None else {**found, "ETag": hashlib.md5(content.getvalue()).hexdigest()}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("bucket://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "bucket", Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    return fsspec.filesystem("bucket")


TEXTS = ["one two\nthree", "four"]


def test_every_format_is_read_from_a_bucket(bucket, tmp_path):
    table, parquet = pyarrow.table({"text": TEXTS}), io.BytesIO()
    pq.write_table(table, parquet)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    files = {
        "a.fasta.gz": gzip.compress(FASTA.encode()),
        "a.parquet": parquet.getvalue(),
        "a.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
        "a.txt": TEXTS[0].encode(),
    }
    for name, content in files.items():
        bucket.pipe(f"/data/{name}", content)
        (tmp_path / name).write_bytes(content)
    assert expand_sources(["bucket://data/a.*"]) == sorted(f"bucket:///data/{name}" for name in files)
    for name in files:
        assert read(f"bucket://data/{name}") == read(str(tmp_path / name)) != []


def test_a_files_tag_in_a_bucket_tells_its_content(bucket, tmp_path):
    leaf = Leaf("bucket://data/a.fasta", "fasta")
    assert entry_of(tmp_path, FASTA_READING, leaf, False) is None  # it is not there
    places = []
    for content in (FASTA, FASTA + ">c\nMK\n", FASTA):
        bucket.pipe("/data/a.fasta", content.encode())
        places.append(entry_of(tmp_path, FASTA_READING, leaf, False))
    assert places[0] == places[2] != places[1]
    before = identify("bucket://data/a.fasta")
    bucket.pipe("/data/a.fasta", (FASTA + ">c\nMK\n").encode())
    assert before.stamp is not None
    assert identify("bucket://data/a.fasta").stamp not in (None, before.stamp)


@contextmanager
def server_of(size: int, *parts: bytes) -> Iterator[str]:
    """The address of a file of ``size`` bytes, of which a server sends these parts, one after another."""

    def serve(listener: socket.socket) -> None:
        for _ in range(2):  # the question for the size, then the download
            connection, _ = listener.accept()
            request = connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
            for part in parts if request.startswith(b"GET") else ():
                connection.sendall(part)
                time.sleep(0.1)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.fasta"


def test_a_download_cut_short_is_no_end_of_file():
    wanted = r"a\.fasta(, after line 5)?: cannot be read \(.*received 24 of 1000 bytes"
    with server_of(1000, b">a\nACDEF\n>b\nACDEF\n>c\nACD") as address, pytest.raises(DataError, match=wanted):
        list(read_records(address))


def test_a_server_may_begin_with_a_single_byte():
    stored = gzip.compress(FASTA.encode())
    with server_of(len(stored), stored[:1], stored[1:]) as address:
        assert [record.identifier for record in read_records(address)] == ["a", "b"]


def test_gzip_within_gzip_is_read_through_and_its_end_is_known(write) -> None:
    text = "".join(f">r{i}\n{'ACDEFGHIKL' * (i % 9 + 1)}\n" for i in range(20_000))
    twice = gzip.compress(gzip.compress(text.encode()))
    plain = [(record.identifier, record.sequence) for record in read_records(write("a.fasta", text))]
    assert [(record.identifier, record.sequence) for record in read_records(write("a.fasta.gz.gz", twice))] == plain
    cut = gzip.compress(gzip.compress(text.encode())[:-9])
    with pytest.raises(DataError, match="the gzip data ends too early"):
        list(read_records(write("cut.fasta.gz", cut)))


PACKED = {"zst": lambda text: pyarrow.compress(text, "zstd", asbytes=True), "xz": lzma.compress, "bz2": bz2.compress}
TEXT = "".join(f">r{i} é\n{'ACDEFGHIKL' * (i % 9 + 1)}\n" for i in range(20_000)).encode()


@pytest.mark.parametrize("kind", PACKED)
def test_zstd_xz_and_bzip2_are_read_whatever_their_names(write, http_address, kind) -> None:
    expected = contents(write("plain.fasta", TEXT))
    half = TEXT.index(b">r9000 ")
    members = PACKED[kind](TEXT[:half]) + PACKED[kind](TEXT[half:])
    assert contents(write("a.fasta", PACKED[kind](TEXT))) == expected
    assert contents(write(f"b.fasta.{kind}", members)) == expected
    assert contents(f"{http_address}/b.fasta.{kind}") == expected


@pytest.mark.parametrize("kind", PACKED)
def test_cut_and_damaged_packed_files_are_said_after_the_records_before(write, kind) -> None:
    packed = PACKED[kind](random.Random(1).randbytes(3_000_000).hex().upper().encode().translate(LETTERS_ALONE))
    packed = PACKED[kind](b">a\nACD\n>b\n") + packed
    for content, sentence in (
        (packed[:-4], "ends too early, so the file is truncated"),
        (packed[: len(packed) // 2] + b"\0" * 99 + packed[len(packed) // 2 + 99 :], "is damaged"),
    ):
        found = []
        with pytest.raises(DataError, match=rf"a\.fasta, after line [23]: the .*{sentence}"):
            found.extend(record.identifier for record in read_records(write("a.fasta", content)))
        assert found in ([], ["a"])


def test_packed_texts_of_a_folder_are_its_files(write, tmp_path) -> None:
    for name in ("a.txt.zst", "b.TXT.xz", "c.txt.bz2", "d.txt.bgz", "e.txt", "f.bin.xz"):
        write(name, b"x")
    found = [Path(leaf.source).name for leaf in leaves(str(tmp_path), "auto")]
    assert found == ["a.txt.zst", "b.TXT.xz", "c.txt.bz2", "d.txt.bgz", "e.txt"]


LETTERS_ALONE = bytes.maketrans(b"0123456789", b"ACDEFGHIKL")


def thrice(content: bytes) -> bytes:
    """Compressed, without the time in it: parameters of tests have the same names in every process."""
    for _ in range(3):
        content = gzip.compress(content, mtime=0)
    return content


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (thrice(b">a\nMK\n"), "gzip-compressed three times"),
        (bz2.compress(bz2.compress(b">a\nMK\n")), "bzip2-compressed twice"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
        (b"PAR1\x15\x00", "a Parquet file"),
        (b"\x1f\x9d\x90", "compress-compressed"),
        (b"a.fasta".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    ],
)
def test_what_cannot_be_read_is_named(write, content: bytes, name: str) -> None:
    with pytest.raises(DataError, match=f"a.fasta is {name}"):
        list(read_records(write("a.fasta", content)))
