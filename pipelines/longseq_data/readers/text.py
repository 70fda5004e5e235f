"""Texts: plain files, a document a line, JSON Lines. Streamed: memory holds one document, and never a long file."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from difflib import get_close_matches
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from longseq_data.errors import DataError, in_line, one_line

from .documents import Text
from .sources import URL, Watch, open_binary, reading_error

BOM = b"\xef\xbb\xbf"
LINE_LIMIT = 1 << 26  # bytes of one line: more is no line but another format


def read_text(source: str, part_bytes: int, watch: Watch | None = None) -> Generator[Text, None, None]:
    """A file as one document, or as parts of at most ``part_bytes`` where it is longer (see parts)."""
    name, line = short_name(source), 1
    rest, ended, number = b"", False, 0
    with open_binary(source, "text", watch) as handle:
        while not ended:
            try:
                # a byte more than a part tells whether there is a part after it
                data = rest + handle.read(part_bytes + 1 - len(rest))
            except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
                raise reading_error(source, line, error) from error
            ended = len(data) <= part_bytes
            end = len(data) if ended else _cut(data, part_bytes)
            begin = len(BOM) if number == 0 and data.startswith(BOM) else 0
            if not data[begin:end].isspace():
                yield Text(_numbered(name, number), source, line, data[begin:end])
            line += data.count(b"\n", 0, end)
            rest, number = data[end:], number + 1


def read_lines(source: str, part_bytes: int, watch: Watch | None = None) -> Generator[Text, None, None]:
    """Every line that is not blank as a document."""
    name = short_name(source)
    for number, line in _lines(source, "text", watch):
        yield from parts(Text(f"{name}:{number}", source, number, line), part_bytes)


def read_jsonl(
    source: str, column: str, part_bytes: int, strict: bool, watch: Watch | None = None
) -> Generator[Text, None, None]:
    """The field ``column`` of every line's object as a document; a field ``id`` is its identifier.

    Raises DataError with the line for what is no JSON object, or has no such text.
    """
    name = short_name(source)
    for number, line in _lines(source, "JSON Lines", watch):
        place = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: this is no JSON ({one_line(error)[:150]}); write one object a line, or correct it."
            ) from None
        if not isinstance(row, dict):
            what = "an array" if isinstance(row, list) else "a bare value"
            raise DataError(f'{place}: {what}, where JSON Lines has one object a line, such as {{"{column}": "..."}}.')
        data = text_field(row, column, place, strict)
        yield from parts(Text(identifier_of(row, f"{name}:{number}"), source, number, data), part_bytes)


def text_field(row: dict[str, object], column: str, place: str, strict: bool) -> bytes:
    """The text of a row as UTF-8; empty where it is null. ``place`` begins the errors' sentences."""
    if column not in row:
        raise missing_column(place, column, list(row))
    value = row[column]
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{place}: '{column}' holds {_kind(value)} and no text; name the field with the text in data.column."
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        if strict:
            raise DataError(
                f"{place}: '{column}' holds half a surrogate pair ({value[error.start]!a}), which is no character; "
                "correct it, or set data.strict=false, which reads it as '?'."
            ) from None
        return value.encode(errors="replace")


def missing_column(place: str, column: str, columns: list[str]) -> DataError:
    """The sentence for a row or a table without ``column``."""
    columns = [in_line(str(name)) for name in columns]
    near = get_close_matches(column, columns, n=1)
    shown = ", ".join(name[:40] for name in columns[:8]) or "no field at all"
    more = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
    hint = f"; did you mean {near[0]}?" if near else "; name one of them."
    return DataError(f"{place}: there is no '{column}' (data.column) among {shown}{more}{hint}")


def identifier_of(row: dict[str, object], otherwise: str) -> str:
    """A row's own ``id`` where it has one: it decides the split, whatever file the row comes in."""
    own = row.get("id")
    return (in_line(str(own)) if isinstance(own, (str, int)) else "") or otherwise


def parts(text: Text, part_bytes: int) -> Iterator[Text]:
    """The text in parts of at most ``part_bytes``, cut after a line, else after a space, else between characters.

    The first part keeps the identifier, the others get #1, #2, ... White space alone gives nothing.
    """
    data, number, line = text.data, 0, text.line
    if len(data) <= part_bytes:
        if data and not data.isspace():
            yield text
        return
    start = 0
    while start < len(data):
        end = start + _cut(data[start : start + part_bytes + 1], part_bytes)
        yield Text(_numbered(text.identifier, number), text.source, line, data[start:end])
        start, number = end, number + 1


def short_name(source: str) -> str:
    """The last part of a path or URL: identifiers should not depend on where a corpus lies."""
    path = urlsplit(source).path if URL.match(source) else source
    return PurePosixPath(path).name or source


def _numbered(name: str, number: int) -> str:
    return f"{name}#{number}" if number else name


def _cut(data: bytes, most: int) -> int:
    """Where to end a part of at most ``most`` bytes; everything where that is all."""
    if len(data) <= most:
        return len(data)
    for mark in (b"\n", b" "):
        end = data.rfind(mark, most // 2, most) + 1
        if end:
            return end
    end = most
    while end > max(most - 4, 1) and data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _lines(source: str, kind: str, watch: Watch | None) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1, without their ends."""
    number = 0
    with open_binary(source, kind, watch) as handle:
        try:
            while line := handle.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(
                        f"{source}, line {number}: longer than {LINE_LIMIT >> 20} MiB, so this is no {kind}; "
                        "name another data.format."
                    )
                line = (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")
                if line and not line.isspace():
                    yield number, line
        except DataError:
            raise
        except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
            raise reading_error(source, number, error) from error


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
