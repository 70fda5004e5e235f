"""Documents: what a source is made of. Their lengths are known early, their tokens are made when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np

from longseq_data.errors import DataError
from longseq_data.tokenization import load_tokenizer, tokenizer_vocabulary
from longseq_data.vocabulary import Tokens, Vocabulary


class Document(Protocol):
    """A protein, a text or an image: ``length`` ordinary tokens.

    In a stream, BOS comes before them, and EOS after them where the document is ``closed``.
    """

    @property
    def identifier(self) -> str: ...  # decides the split

    @property
    def source(self) -> str: ...

    @property
    def line(self) -> int: ...  # where it begins, counted from 1; of tables the row

    @property
    def length(self) -> int: ...

    @property
    def closed(self) -> bool: ...

    @property
    def held(self) -> int: ...  # bytes of memory, about


class Extent(NamedTuple):
    """How much data tokens stand for."""

    bytes: int  # of UTF-8 text; of an image the colour values
    words: int  # those that begin in it; separated by white space

    def plus(self, other: Extent) -> Extent:
        return Extent(self.bytes + other.bytes, self.words + other.words)


class DocumentEncoder:
    """Gives the tokens of documents that can encode themselves; see fasta.Encoder for proteins."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos: Tokens = np.array([vocabulary.bos], dtype=vocabulary.dtype)
        self.eos: Tokens = np.array([vocabulary.eos], dtype=vocabulary.dtype)

    def encode(self, document: Document, start: int = 0, stop: int | None = None) -> Tokens:
        """Ids of the ordinary tokens [start, stop), in the vocabulary's dtype."""
        return cast(SelfEncoding, document).encode(start, stop)

    def measure(self, document: Document, start: int, stop: int) -> Extent:
        """What the ordinary tokens [start, stop) stand for."""
        return cast(SelfEncoding, document).measure(start, stop)


class SelfEncoding(Document, Protocol):
    """A document that knows its tokens."""

    def encode(self, start: int, stop: int | None) -> Tokens: ...

    def measure(self, start: int, stop: int) -> Extent: ...


@dataclass(frozen=True, slots=True)
class Text:
    """A text as its file has it, before any tokenizer."""

    identifier: str
    source: str
    line: int
    data: bytes  # UTF-8, or what should be


def tokenise(text: Text, path: str, strict: bool) -> Tokens:
    """A text as ids."""
    # "fast" leaves out where in the text each token stands, which takes half of the time
    (encoding,) = load_tokenizer(path).encode_batch_fast([decoded(text, strict)], add_special_tokens=False)
    return np.array(encoding.ids, dtype=tokenizer_vocabulary(path).dtype)


def decoded(text: Text, strict: bool) -> str:
    """The text's characters; a byte that is not UTF-8 reads as U+FFFD, or is refused where ``strict``."""
    try:
        return text.data.decode()
    except UnicodeDecodeError as error:
        if strict:
            line = text.line + text.data.count(b"\n", 0, error.start)
            raise DataError(
                f"{text.source}, line {line}: byte 0x{text.data[error.start]:02x} is not UTF-8; convert the file, or "
                "set data.strict=false, which reads it as U+FFFD."
            ) from None
        return text.data.decode(errors="replace")
