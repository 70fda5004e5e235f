"""Token blocks: some records of one source as Arrow, memory-mapped where they lie in a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longseq_data.readers.documents import Extent
from longseq_data.splits import identifier_places, sequence_places
from longseq_data.tokenization import extents, words_before
from longseq_data.vocabulary import ALPHABETS, Tokens, Vocabulary

FORMAT = 2  # of the files; counted up when what they hold, or how it is made, changes
FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 21  # of tokens: the first blocks are small, so that training begins early
MOST_RECORDS = 1 << 16
_PLACES = {"id": "place", "sequence": "sequence_place"}  # columns by what decides a split

Integers = npt.NDArray[np.int64]


class Records(NamedTuple):
    """Some records on their way into a block, one entry each."""

    named: list[bytes] | None  # None: the first words of the headers
    tokens: list[bytes]  # ids in the dtype of ``stored_dtype``
    held: list[int] | None = None  # what they count for in a shuffle buffer; None: their tokens' bytes
    texts: list[bytes] | None = None  # what a tokenizer read
    headers: list[bytes] | None = None  # of FASTA and UniProt's formats; a block does not keep them

    @property
    def identifiers(self) -> list[bytes]:
        if self.named is not None:
            return self.named
        return [header.split(None, 1)[0] for header in self.headers or ()]

    def some(self, begin: int, end: int) -> Records:
        if begin == 0 and end == len(self.tokens):
            return self
        here = slice(begin, end)
        named, texts, headers = (each and each[here] for each in (self.named, self.texts, self.headers))
        return Records(named, self.tokens[here], self.held and self.held[here], texts, headers)


@dataclass(frozen=True)
class Block:
    """The tokens of its records one after another: record r has [offsets[r], offsets[r + 1])."""

    made: tuple[Tokens, Sequence[bytes]] | list[Records]  # tokens and identifiers, joined where somebody asks
    offsets: Integers
    held: Integers
    texts: Sequence[bytes] | None
    dtype: np.dtype[np.unsignedinteger]  # of its tokens
    stored_places: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what is worth a warning
    unknown: Mapping[str, int] = field(default_factory=dict)  # letters outside the alphabet, about those of its records
    mapped: bool = False  # lies in a file: a view of it holds no memory
    residues: bool = False  # of sequences, whose splits may go by their tokens

    def __len__(self) -> int:
        return len(self.held)

    def places(self, by: str) -> npt.NDArray[np.float64]:
        """In [0, 1), of each record: what decides its split. by: "id" or "sequence", see splits.SplitRule."""
        if by in self.stored_places:
            return self.stored_places[by]
        return identifier_places(self.identifiers) if by == "id" else sequence_places(self.ids(range(len(self))))

    @property
    def lengths(self) -> Integers:
        return np.diff(self.offsets)

    @cached_property
    def tokens(self) -> Tokens:
        if isinstance(self.made, tuple):
            return self.made[0]
        return np.frombuffer(b"".join(self._pieces), self.dtype)

    @cached_property
    def _pieces(self) -> list[bytes]:
        return list(chain.from_iterable(part.tokens for part in self.made))  # type: ignore[union-attr]

    @cached_property
    def identifiers(self) -> Sequence[bytes]:
        if isinstance(self.made, tuple):
            return self.made[1]
        return [name for part in self.made for name in part.identifiers]

    def view(self, row: int) -> Tokens:
        """The tokens of a record where they are mapped, or alone in their block; else a copy, that it may go."""
        tokens = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        return tokens if self.mapped or len(self) == 1 else tokens.copy()

    def ids(self, rows: Sequence[int]) -> list[bytes]:
        """The tokens of some records, as bytes of their own."""
        if not isinstance(self.made, tuple):
            # faster than a loop, but it gives a single one as it is
            return list(itemgetter(*rows)(self._pieces)) if len(rows) > 1 else [self._pieces[row] for row in rows]
        data, size = memoryview(self.tokens).cast("B"), self.tokens.itemsize  # type: ignore[arg-type]
        where = np.asarray(rows, dtype=np.int64)
        begins, ends = (self.offsets[where] * size).tolist(), (self.offsets[where + 1] * size).tolist()
        return [bytes(data[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def spilled(self) -> Block:
        """The same with its tokens in a nameless file: buffers count pictures by their names, and hold many."""
        with tempfile.TemporaryFile() as file:
            file.write(self.tokens.tobytes())
            file.flush()
            mapped = np.memmap(file, self.tokens.dtype, "r"), self.identifiers
            return replace(self, made=mapped, mapped=True)

    def document(self, row: int, source: str, vocabulary: Vocabulary) -> BlockDocument:
        text = None if self.texts is None else bytes(self.texts[row])
        name, held = bytes(self.identifiers[row]), int(self.held[row])
        return BlockDocument(name, source, self.view(row), held, vocabulary, text)


@dataclass(slots=True, eq=False)
class BlockDocument:
    """A record of a block. See documents.Document."""

    name: bytes
    source: str
    tokens: Tokens
    held: int
    vocabulary: Vocabulary
    text: bytes | None = field(default=None, repr=False)
    line: int = 0  # nobody asks for it once a record has been read
    _before: tuple[Integers, Integers] | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockDocument):
            return NotImplemented
        return (self.name, self.source) == (other.name, other.source) and np.array_equal(self.tokens, other.tokens)

    @property
    def identifier(self) -> str:
        return self.name.decode("utf-8", "surrogateescape")

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def closed(self) -> bool:
        return self.vocabulary.closed

    def encode(self, start: int, stop: int | None) -> Tokens:
        return self.tokens[start:stop].astype(self.vocabulary.dtype, copy=False)

    def measure(self, start: int, stop: int) -> Extent:
        """What the tokens [start, stop) stand for."""
        if self.vocabulary.name == "pixels":
            return Extent(stop - start, 0)
        if self._before is None:
            self._before = self._counted()
        n_bytes, n_words = self._before
        return Extent(int(n_bytes[stop] - n_bytes[start]), int(n_words[stop] - n_words[start]))

    def _counted(self) -> tuple[Integers, Integers]:
        if self.text is None:
            return np.arange(len(self.tokens) + 1), words_before(self.tokens.tobytes())
        return extents(self.text.decode(errors="replace"), self.vocabulary.name)


def stored_dtype(vocabulary: Vocabulary) -> np.dtype[np.unsignedinteger]:
    """The smallest type of the ordinary tokens: blocks hold no others."""
    ordinary = vocabulary.ordinary
    return np.dtype(np.uint8 if ordinary <= 1 << 8 else np.uint16 if ordinary <= 1 << 16 else np.uint32)


class Builder:
    """Cuts records into blocks. Where they are cut depends on the records alone, not on how many come at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._dtype = stored_dtype(vocabulary)
        self._residues = vocabulary.name in ALPHABETS
        self._made = 0
        self._parts: list[Records] = []
        self._sizes: list[Integers] = []  # bytes of each record
        self._bytes = self._records = 0
        self.notes: list[str] = []
        self.unknown: Counter[str] = Counter()

    def add(self, records: Records) -> Iterator[Block]:
        """The blocks that are full with these."""
        begin, count = 0, len(records.tokens)
        sizes = np.fromiter(map(len, records.tokens), np.int64, count)
        ends = np.cumsum(sizes)
        while begin < count:
            # up to the record with which the block is full
            before = int(ends[begin - 1]) if begin else 0
            full = int(np.searchsorted(ends, before + self._limit - self._bytes)) + 1
            end = max(min(full, begin + MOST_RECORDS - self._records, count), begin + 1)
            self._parts.append(records.some(begin, end))
            self._sizes.append(sizes[begin:end])
            self._bytes += int(ends[end - 1]) - before
            self._records += end - begin
            begin = end
            if self._bytes >= self._limit or self._records >= MOST_RECORDS:
                yield self._block()

    def rest(self) -> Iterator[Block]:
        """What is left, as a block."""
        if self._records or self.notes:
            yield self._block()

    @property
    def _limit(self) -> int:
        return min(FIRST_BYTES << min(self._made, 10), MOST_BYTES)

    def _block(self) -> Block:
        parts = self._parts
        sizes = np.concatenate([np.zeros(0, np.int64), *self._sizes])
        held = [size if part.held is None else part.held for part, size in zip(parts, self._sizes, strict=True)]
        texts = [text for part in parts for text in part.texts or ()] if parts and parts[0].texts is not None else None
        block = Block(
            parts,
            np.concatenate([[0], np.cumsum(sizes // self._dtype.itemsize)]),
            np.concatenate([np.zeros(0, np.int64), *held]).astype(np.int64, copy=False),
            texts,
            self._dtype,
            notes=tuple(self.notes),
            unknown=dict(self.unknown),
            residues=self._residues,
        )
        self._made += 1
        self._parts, self._sizes, self._bytes, self._records, self.notes = [], [], 0, 0, []
        self.unknown.clear()
        return block


def write_block(block: Block, path: Path) -> None:
    """One Arrow IPC file of one batch. Raises OSError."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path), "wb") as file:
            _write(block, file)
    except OSError as error:
        raise _with_its_file(error, path) from None


def written(block: Block) -> memoryview:
    """The content of the file that write_block makes."""
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    _write(block, stream)
    return memoryview(stream.getvalue())


def _write(block: Block, file: object) -> None:
    import pyarrow as pa

    binary = pa.large_binary()
    columns = {
        "id": pa.array(block.identifiers, binary),
        **{_PLACES[by]: pa.array(block.places(by)) for by in (_PLACES if block.residues else ("id",))},
        "held": pa.array(block.held),
        "tokens": pa.LargeListArray.from_arrays(pa.array(block.offsets), pa.array(block.tokens)),
    }
    if block.texts is not None:
        columns["text"] = pa.array(block.texts, binary)
    batch = pa.record_batch(columns, metadata={"longseq": json.dumps({"notes": block.notes, "unknown": block.unknown})})
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


class BadBlockError(Exception):
    """A file that is none of write_block."""


def open_block(path: Path, mapped: bool = True) -> Block:
    """A block of write_block. Its tokens are not looked at. Raises OSError, or BadBlockError for what is none.

    mapped: it stays where it lies; else it is read, and its file may go.
    """
    import pyarrow as pa

    try:
        with pa.ipc.open_file(pa.memory_map(str(path)) if mapped else pa.py_buffer(path.read_bytes())) as reader:
            batch = reader.get_batch(0)
            said = json.loads(reader.schema.metadata[b"longseq"])
        batch.validate()
        tokens = batch.column("tokens")
        return Block(
            (tokens.values.to_numpy(), _Bytes(batch.column("id"))),
            tokens.offsets.to_numpy(),
            batch.column("held").to_numpy(),
            _Bytes(batch.column("text")) if "text" in batch.schema.names else None,
            np.dtype(tokens.type.value_type.to_pandas_dtype()),
            {by: batch.column(name).to_numpy() for by, name in _PLACES.items() if name in batch.schema.names},
            tuple(said["notes"]),
            dict(said["unknown"]),
            mapped=mapped,
        )
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise _with_its_file(error, path) from None
        raise BadBlockError(f"{path}: {error}") from error  # cut off, or another program's


def _with_its_file(error: OSError, path: Path) -> OSError:
    """Arrow's has the file in its words alone."""
    return OSError(error.errno, os.strerror(error.errno), str(path)) if error.errno else error


class _Bytes(Sequence[bytes]):
    """A column of Arrow's as Python's bytes, each made when it is asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row):  # type: ignore[no-untyped-def]
        return self._column[row].as_py()
