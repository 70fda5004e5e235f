"""Plain text, a document a line, JSON Lines: what is read, in bounded memory, and how what does not fit is refused."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc

import pytest

from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.readers.documents import Text
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.text import parts, read_jsonl, read_lines, read_text
from longseq_data.vocabulary import decode
from real_files import folder_of

BOOK = "".join(f"Line {i} of the book, naïve and 日本語.\n" + "\n" * (i % 3 == 0) for i in range(200)).encode()


CUT = gzip.compress("".join(f"{random.Random(i).random()}\n" for i in range(60_000)).encode(), mtime=0)[:-900]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def records(reading: Reading, source: str, format: str, strict: bool = False) -> list[tuple[str, bytes]]:
    blocks = parsed(reading, Leaf(source, format), strict=strict)
    return [(block.identifiers[row].decode(), block.ids([row])[0]) for block in blocks for row in range(len(block))]


@pytest.mark.parametrize("content", [BOOK, gzip.compress(BOOK)], ids=["plain", "gzipped"])
def test_a_file_is_one_document_byte_for_byte(content, write):
    source = write("book.txt", content)
    (text,) = read_text(source, 1 << 20)
    assert (text.identifier, text.source, text.line, text.data) == ("book.txt", source, 1, BOOK)


@pytest.mark.parametrize("part_bytes", [64, 100, 1000, len(BOOK) - 1, len(BOOK), len(BOOK) + 1])
def test_a_long_file_comes_in_parts_that_are_lines_and_together_the_file(part_bytes, write):
    texts = list(read_text(write("book.txt", BOOK), part_bytes))
    assert b"".join(text.data for text in texts) == BOOK
    assert len(texts) >= len(BOOK) // part_bytes
    for number, text in enumerate(texts):
        assert len(text.data) <= part_bytes
        assert text.identifier == ("book.txt" if number == 0 else f"book.txt#{number}")
        assert text.data.endswith(b"\n")
        assert BOOK.split(b"\n")[text.line - 1] == text.data.split(b"\n")[0]


def test_without_lines_parts_end_after_words_and_without_words_between_characters():
    words = ("word " * 100).encode()
    assert {text.data[-5:] for text in parts(Text("a", "a", 1, words), 64)} == {b"word "}
    assert next(text.data.decode() for text in parts(Text("a", "a", 1, ("é" * 100).encode()), 65)) == "é" * 32
    assert b"".join(text.data for text in parts(Text("a", "a", 1, b"\x80" * 200), 64)) == b"\x80" * 200  # no UTF-8


def test_a_huge_file_is_never_in_memory(tmp_path):
    path = tmp_path / "huge.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(BOOK * 100)  # 0.8 MB
    tracemalloc.start()
    size = sum(len(text.data) for text in read_text(str(path), 1 << 18))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 64 * 100 * len(BOOK)
    assert peak < 4 << 20


def test_a_byte_order_mark_is_no_text(write):
    assert [text.data for text in read_text(write("a.txt", b"\xef\xbb\xbfabc\n"), 100)] == [b"abc\n"]
    assert [text.data for text in read_lines(write("b.txt", b"\xef\xbb\xbfabc\n"), 100)] == [b"abc"]
    assert [text.data for text in read_jsonl(write("c.jsonl", b'\xef\xbb\xbf{"text": "abc"}'), "text", 100, False)]


def test_lines_are_documents_and_blank_ones_none(write):
    source = write("a.txt", b"one\r\n\n  \ntwo three\nfour")
    found = [(text.identifier, text.line, text.data) for text in read_lines(source, 100)]
    assert found == [("a.txt:1", 1, b"one"), ("a.txt:4", 4, b"two three"), ("a.txt:5", 5, b"four")]


def test_json_lines_give_their_field_and_their_own_id(write):
    rows = [{"text": "one"}, {"text": "zwölf", "id": "x1"}, {"text": ""}, {"text": None}, {"text": "q", "id": 7}]
    source = write("a.jsonl", jsonl(*rows[:2]) + b"\n" + jsonl(*rows[2:]))
    found = [(text.identifier, text.line, text.data) for text in read_jsonl(source, "text", 100, False)]
    assert found == [("a.jsonl:1", 1, b"one"), ("x1", 2, "zwölf".encode()), ("7", 6, b"q")]


def test_half_a_surrogate_pair_is_a_question_mark_or_refused(write):
    source = write("a.jsonl", b'{"text": "ok"}\n{"text": "a\\ud800b"}\n')
    assert [text.data for text in read_jsonl(source, "text", 100, False)] == [b"ok", b"a?b"]
    with pytest.raises(DataError, match=r"line 2: 'text' holds half a surrogate pair"):
        list(read_jsonl(source, "text", 100, True))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; give a file with JSON Lines"),
        (jsonl({"text": "a"}) + b"{nonsense\n", r"line 2: this is no JSON \(JSONDecodeError"),
        (jsonl({"text": "a"}) + b'{"text": "\xff"}\n', r"line 2: this is no JSON \(UnicodeDecodeError"),
        (jsonl({"text": "a"}) + b"[" * 100_000 + b"\n", "line 2: this is no JSON"),
        (b"9" * 5000, "line 1: this is no JSON"),
        (jsonl([{"text": "a"}]), "line 1: an array, where JSON Lines has one object a line"),
        (jsonl("text"), "line 1: a bare value"),
        (jsonl({"text": "a"}, {"test": "b", "n": 1}), r"line 2: there is no 'text' \(data.column\) among test, n; did"),
        (jsonl({}), "line 1: there is no 'text' .* among no field at all; name one"),
        (jsonl({"text": 5}), "line 1: 'text' holds a number and no text"),
        (jsonl({"text": ["a"]}), "line 1: 'text' holds a list"),
        (jsonl({"text": " "}), "nothing but white space in it"),
        (b"PK\x03\x04abc", "is a zip archive, not JSON Lines"),
        (b"a\0b", "is a binary file, not JSON Lines"),
        (gzip.compress(jsonl({"text": "abc" * 999}), mtime=0)[:40], "the gzip data ends too early"),
    ],
)
def test_bad_json_lines_are_refused_with_file_and_line(content, sentence, write):
    source = write("a.jsonl", content)
    with pytest.raises(DataError, match=sentence) as caught:
        records(Reading("jsonl", "bytes"), source, "jsonl")
    assert str(caught.value).startswith(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "content", "sentence"),
    [
        ("text", b"", "is empty; give a file with text"),
        ("text", b" \n\t\n", "nothing but white space"),
        ("lines", b" \n\t\n", "nothing but white space"),
        ("text", "text".encode("utf-16"), r"is UTF-16 text, not plain text; convert it to plain \(UTF-8\)"),
        ("text", b"a\0", "is a binary file"),
        ("text", gzip.compress(BOOK, mtime=0)[:-9], "the gzip data ends too early"),
        ("text", CUT, r"after line [1-9]\d*: the gzip data ends too early"),
        ("lines", CUT, r"after line [1-9]\d+: the gzip data ends too early"),
    ],
)
def test_bad_text_is_refused_with_one_sentence(format, content, sentence, write):
    source = write("a.txt", content)
    with pytest.raises(DataError, match=sentence) as caught:
        records(Reading(format, "bytes"), source, format)
    assert str(caught.value).startswith(source)


def test_a_line_without_end_is_no_line(write, monkeypatch):
    monkeypatch.setattr("longseq_data.readers.text.LINE_LIMIT", 1 << 20)
    source = write("a.txt", b"a\n" + b"b" * (3 << 20))
    with pytest.raises(DataError, match=r"line 2: longer than 1 MiB, so this is no text"):
        list(read_lines(source, 100))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(DataError, match="not found"):
        list(read_text(str(tmp_path / "none.txt"), 100))


def test_text_by_url_is_the_file(write, http_address):
    write("book.txt.gz", gzip.compress(BOOK))
    (text,) = read_text(f"{http_address}/book.txt.gz", 1 << 20)
    assert (text.identifier, text.data) == ("book.txt.gz", BOOK)


def test_proteins_may_stand_in_a_table(write):
    source = write("a.jsonl", jsonl({"sequence": "MKV laj*", "id": "p"}, {"sequence": "M K V"}))
    reading = Reading("jsonl", "protein", column="sequence")
    first, second = records(reading, source, "jsonl")
    assert (first[0], decode(first[1]), decode(second[1])) == ("p", "MKVLAX", "MKV")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: character 'j' in record 'p' is not one of"):
        records(reading, source, "jsonl", strict=True)
    with pytest.raises(DataError, match="line 1: a character in a sequence that is no ASCII letter"):
        records(reading, write("b.jsonl", jsonl({"sequence": "MKÄ"})), "jsonl")


@pytest.mark.skipif(not folder_of("text").is_dir(), reason="no real texts here: set LONGSEQ_TEXT")
def test_real_books_are_their_bytes():
    paths = sorted(folder_of("text").glob("*.txt"))
    assert paths
    for path in paths:
        assert b"".join(text.data for text in read_text(str(path), 50_000)) == path.read_bytes().removeprefix(
            b"\xef\xbb\xbf"
        )


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "\x1b[2J", "a\u2028b"])
def test_strange_names_do_not_break_a_sentence_or_the_split(name, write):
    source = write("a.jsonl", json.dumps({"text": "x", "id": name}))
    (text,) = read_jsonl(source, "text", 100, False)
    assert text.identifier.isprintable()
    assert text.identifier.encode()
    with pytest.raises(DataError, match="there is no 'text'") as caught:
        list(read_jsonl(write("b.jsonl", json.dumps({name: "x"})), "text", 100, False))
    assert str(caught.value).isprintable()
