"""How sources become documents: the formats and the tokens that go together, and the readers behind them."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from longseq_data.errors import DataError
from longseq_data.files import sha256_of
from longseq_data.vocabulary import ALPHABETS, BUILT_IN, Tokens, Vocabulary

from .documents import DocumentEncoder, Text, tokenise
from .fasta import Encoder, Record
from .formats import Leaf, format_of, leaves
from .images import ImageDocument, read_images
from .sources import Watch, open_binary

TOKENS = tuple(BUILT_IN)  # and a tokenizer's file

# format: the tokens it can be read as, its own first. "file" stands for a tokenizer's file.
READ_AS: dict[str, tuple[str, ...]] = {
    "fasta": ("protein", "dna"),
    "text": ("bytes", "file"),
    "lines": ("bytes", "file", "protein", "dna"),
    "jsonl": ("bytes", "file", "protein", "dna"),
    "parquet": ("bytes", "file", "protein", "dna", "pixels"),
    "hub": ("bytes", "file", "protein", "dna", "pixels"),
    "images": ("pixels",),
}
TABLES = ("jsonl", "parquet", "hub")  # which have columns

PART_BYTES = 1 << 20

LOOK = 64  # files whose beginning is looked at, in case their names say what they are not

# How FASTA begins, a line of letters alone below a name, and UniProt's text format.
_SEQUENCES = re.compile(
    rb"(\xef\xbb\xbf)?\s*(>\S[^\r\n]*[\r\n]+([A-Z*.-]{5,}|[a-z*.-]{5,})\s*?([\r\n]|$)|ID   \S+ +(Rev|Unrev)iewed;)"
)

Raw = Text | ImageDocument


@dataclass(frozen=True)
class Reading:
    """Everything that decides which documents the sources hold."""

    format: str = "fasta"  # one of formats.FORMATS, or "auto": by each source's name
    tokens: str = "protein"  # one of TOKENS, or the path of a tokenizer's file
    column: str | None = None  # of a table; None: "text", and "image" with pixels
    image_size: int = 64  # pixels on each side
    part_bytes: int = PART_BYTES  # a longer text is several documents

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Raises DataError for a tokenizer's file that cannot be read."""
        if self.tokens in BUILT_IN:
            return BUILT_IN[self.tokens]
        from longseq_data.tokenization import tokenizer_vocabulary

        return tokenizer_vocabulary(self.tokens)

    @cached_property
    def kept_name(self) -> str:
        """What the tokens are called where their tokenizer's file has been copied to: the same for the same content."""
        return f"tokenizer-{sha256_of(Path(self.tokens))[:16]}.json" if self.written else self.tokens

    @property
    def has_residues(self) -> bool:
        """Whether the documents are sequences of residues, and not texts or pictures."""
        return self.tokens in ALPHABETS

    def leaves(self, sources: Iterable[str]) -> list[Leaf]:
        """What the sources consist of, folders opened up, in their order."""
        return [leaf for source in sources for leaf in leaves(source, self.format)]

    def mistaken(self, leaves: Iterable[Leaf]) -> str | None:
        """A sentence about a file that is read as text for its name alone, and holds sequences.

        Looks at the beginning of the first LOOK of them. Raises DataError for one that cannot be read.
        """
        texts = (leaf.source for leaf in leaves if leaf.format == "text" and self.format == "auto")
        for source in islice(texts, LOOK):
            with open_binary(source, "text") as handle:
                if _SEQUENCES.match(handle.peek(4096)):
                    return (
                        f"{source} looks like FASTA or UniProt's format, and its name makes it text, read byte by "
                        "byte: set data.format=fasta, or data.format=text if that is meant."
                    )
        return None

    def encoder(self, strict: bool, tell: Callable[[str], object] | None = None) -> DocumentEncoder:
        alphabet = ALPHABETS.get(self.tokens)
        return DocumentEncoder(self.vocabulary) if alphabet is None else Encoder(strict, tell, alphabet)

    @property
    def written(self) -> bool:
        """Whether the tokens are a tokenizer's: what they stand for shows in the text alone."""
        return self.tokens not in TOKENS

    def raw(self, leaf: Leaf, strict: bool, watch: Watch | None = None) -> Iterator[Raw]:
        """The texts, or pictures, of one leaf that is no FASTA.

        strict: refuse text that is not UTF-8. watch: see sources.open_binary. Raises DataError, one sentence with file
        and line or row, for what cannot be read.
        """
        return self._images(leaf) if self.tokens == "pixels" else self.texts(leaf, strict, watch)

    def tokens_of(self, raw: Raw, leaf: Leaf, encoder: DocumentEncoder, strict: bool) -> Tokens:
        """A text, or picture, as its ordinary tokens; raises as ``raw``."""
        if isinstance(raw, ImageDocument):
            return raw.tokens()
        if self.tokens == "bytes":
            return np.frombuffer(raw.data, dtype=np.uint8)
        if self.has_residues:
            return encoder.encode(_protein(raw, "rows" if leaf.format in ("parquet", "hub") else "lines"))
        return tokenise(raw, self.tokens, strict)

    def texts(self, leaf: Leaf, strict: bool, watch: Watch | None = None) -> Iterator[Text]:
        """The texts of one leaf before they are tokenised."""
        column = self.column or "text"
        if leaf.format in ("parquet", "hub"):
            from .tables import read_hub, read_parquet

            read = read_parquet if leaf.format == "parquet" else read_hub
            return read(leaf.source, column, self.part_bytes, strict)
        from .text import read_jsonl, read_lines, read_text

        if leaf.format == "jsonl":
            return read_jsonl(leaf.source, column, self.part_bytes, strict, watch)
        return (read_text if leaf.format == "text" else read_lines)(leaf.source, self.part_bytes, watch)

    def _images(self, leaf: Leaf) -> Generator[ImageDocument, None, None]:
        from .tables import read_hub_images, read_parquet_images

        if leaf.format == "images":
            yield from read_images(leaf.source, self.image_size)
        else:
            read = read_parquet_images if leaf.format == "parquet" else read_hub_images
            yield from read(leaf.source, self.column or "image", self.image_size)


FASTA = Reading()


def agree(sources: Sequence[str], format: str, tokens: str) -> str:
    """The tokens that all ``sources`` can be read as: ``tokens`` itself, or for "auto" those of their format.

    Raises DataError where they do not go together.
    """
    kinds = {format_of(source, format): source for source in reversed(sources)}
    if tokens == "auto":
        own = {READ_AS[kind][0]: source for kind, source in kinds.items()}
        if len(own) > 1:
            examples = ", ".join(f"{source} as {name}" for name, source in sorted(own.items()))
            raise DataError(
                f"One model cannot read {examples}; train on one of them, or say what they are in data.format."
            )
        return next(iter(own), "protein")
    for kind, source in kinds.items():
        refusal = disagreement(kind, tokens)
        if refusal:
            raise DataError(f"{source}: {refusal}")
    return tokens


def disagreement(format: str, tokens: str) -> str | None:
    """Why a format cannot be read as ``tokens``, as the rest of a sentence; None: it can."""
    able = READ_AS[format]
    if (tokens if tokens in TOKENS else "file") in able:
        return None
    names = ", ".join("a tokenizer's file" if name == "file" else name for name in able)
    return f"data.format={format} cannot be read as data.tokenizer={tokens}; choose from {names}."


def nothing_in(leaf: Leaf) -> DataError:
    return DataError(f"{leaf.source}: nothing but white space in it; give text, or remove it from the list.")


def _protein(text: Text, counted: str) -> Record:
    """A sequence that stands in a table. Letters outside the alphabet pass, as in FASTA: Encoder deals with them."""
    sequence = b"".join(text.data.split()).removesuffix(b"*")
    if not all(32 < byte < 127 for byte in set(sequence)):
        place = f"{text.source}, {counted.removesuffix('s')} {text.line}"
        raise DataError(
            f"{place}: a character in a sequence that is no ASCII letter; correct it, or name another column."
        )
    return Record(text.identifier, text.identifier, sequence.decode("ascii"), text.source, text.line, counted)  # type: ignore[arg-type]
