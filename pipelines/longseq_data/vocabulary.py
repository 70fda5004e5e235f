"""Token sets: what the ids of a stream mean, and which of them are special.

The protein alphabet is written out: the 29 tokens of Choromanski et al. (arXiv 2009.14794, appendix C.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.unsignedinteger]

# The 20 standard amino acids in alphabetical order, then B (D or N), O (pyrrolysine), U (selenocysteine),
# X (any) and Z (E or Q).
LETTERS = "ACDEFGHIKLMNPQRSTVWY" + "BOUXZ"
STANDARD = 20  # ids below are the standard amino acids
RESIDUES = len(LETTERS)  # 25; ids below are residues, from here on special tokens
X = LETTERS.index("X")
BOS, EOS, PAD, MASK = range(RESIDUES, RESIDUES + 4)  # 25, 26, 27, 28
VOCABULARY_SIZE = RESIDUES + 4  # 29

UNKNOWN = 255  # what TABLE gives for a character outside the alphabet: no token, map it or refuse it
IGNORE = -100  # a target that is not scored; the default ignore_index of torch's cross entropy

INFILL_MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")  # what tokenizers of code models call them

TOKENS = (*LETTERS, "<bos>", "<eos>", "<pad>", "<mask>")


@dataclass(frozen=True)
class Vocabulary:
    """A token set: ids [0, ordinary) stand for data, and the four special tokens have ids of their own above them."""

    name: str  # of BUILT_IN, or a tokenizer's file
    size: int  # all ids, special ones included
    bos: int
    eos: int
    pad: int
    mask: int
    ordinary: int  # ids below are ordinary tokens: masking may choose them, metrics count them
    replacements: int  # a masked position's random token comes from ids below this (20 for proteins)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest of uint8, uint16 and uint32 that holds every id."""
        return np.dtype(np.uint8 if self.size <= 1 << 8 else np.uint16 if self.size <= 1 << 16 else np.uint32)

    @property
    def unwritten(self) -> tuple[int, ...]:
        """Special tokens that no document has, and no model writes."""
        return self.bos, self.pad, self.mask

    @property
    def closed(self) -> bool:
        """Whether documents end with EOS; pictures all end alike."""
        return self.name != "pixels"

    @property
    def target_dtype(self) -> np.dtype[np.signedinteger]:
        """A signed type that holds every id and IGNORE."""
        return np.dtype(np.int16 if self.size <= 1 << 15 else np.int32)


@dataclass(frozen=True)
class InfillVocabulary(Vocabulary):
    """A vocabulary whose three last ids say where the parts of a document that is laid out for infilling begin."""

    prefix: int
    suffix: int
    middle: int

    @property
    def unwritten(self) -> tuple[int, ...]:
        return *super().unwritten, self.prefix, self.suffix, self.middle

    @staticmethod
    def of(tokens: Vocabulary) -> InfillVocabulary:
        """The same ids, and the three behind them."""
        names = {each.name: getattr(tokens, each.name) for each in fields(Vocabulary)}
        size = tokens.size
        return InfillVocabulary(**{**names, "size": size + 3}, prefix=size, suffix=size + 1, middle=size + 2)


PROTEIN = Vocabulary("protein", VOCABULARY_SIZE, BOS, EOS, PAD, MASK, ordinary=RESIDUES, replacements=STANDARD)
BYTES = Vocabulary("bytes", 260, bos=256, eos=257, pad=258, mask=259, ordinary=256, replacements=256)
PIXELS = Vocabulary("pixels", 260, bos=256, eos=257, pad=258, mask=259, ordinary=256, replacements=256)

# Bases, and N for any of them and for the letters of several (R, Y, ...). U is T in RNA.
BASES = "ACGTN"
DNA = Vocabulary("dna", 9, bos=5, eos=6, pad=7, mask=8, ordinary=5, replacements=4)

BUILT_IN = {each.name: each for each in (PROTEIN, DNA, BYTES, PIXELS)}

# Byte -> id. Lower case marks low-complexity regions (soft masking) and means the same residue.
TABLE = bytes(LETTERS.find(chr(byte).upper()) % 256 if byte < 128 else UNKNOWN for byte in range(256))
_BASE_OF = {byte: chr(byte).upper().replace("U", "T") for byte in range(128)}
DNA_TABLE = bytes(BASES.find(_BASE_OF.get(byte, "?")) % 256 for byte in range(256))

# Id -> letter, of residues.
TO_LETTERS = LETTERS.encode().ljust(256, b"X")


@dataclass(frozen=True)
class Alphabet:
    """Tokens that are one letter each."""

    vocabulary: Vocabulary
    letters: str
    other: str  # what letters outside of it are read as
    table: bytes  # byte -> id, UNKNOWN for those
    unit: str  # what a token is called, in the plural

    @property
    def tokens(self) -> tuple[str, ...]:
        """A name for each id; special tokens read <bos>, <eos>, <pad>, <mask>."""
        return (*self.letters, "<bos>", "<eos>", "<pad>", "<mask>")

    def decode(self, tokens: Iterable[int]) -> str:
        """IndexError for an id beyond the vocabulary."""
        names = self.tokens
        return "".join(names[token] for token in tokens)


PROTEINS = Alphabet(PROTEIN, LETTERS, "X", TABLE, "residues")
NUCLEIC_ACIDS = Alphabet(DNA, BASES, "N", DNA_TABLE, "bases")
ALPHABETS = {alphabet.vocabulary.name: alphabet for alphabet in (PROTEINS, NUCLEIC_ACIDS)}


def decode(tokens: Iterable[int]) -> str:
    """PROTEINS.decode."""
    return PROTEINS.decode(tokens)


def backwards(vocabulary: Vocabulary, marks: str, tokens: Tokens) -> Tokens:
    """A sample (n,) as it would be if its records had been read from their last token to their first.

    marks: "joined": records are joined by EOS, with a lone BOS at the most before the first; "documents": each is
    BOS ... EOS; "ends": BOS and EOS stand at the ends of the sample, where these are in it.
    """
    out = tokens[::-1].copy()
    begins, ends = out == vocabulary.bos, out == vocabulary.eos
    if marks == "ends":
        begins[:-1] = ends[1:] = False
    out[begins] = vocabulary.eos
    if marks != "joined":
        out[ends] = vocabulary.bos
    return out


COMPLEMENT = np.array([3, 2, 1, 0, 4], dtype=np.uint8)  # of bases


def reverse_complement(tokens: Tokens) -> Tokens:
    """The other strand of each stretch of bases; special tokens stay where they are. tokens: (n,), of DNA."""
    out = tokens.copy()
    special = np.flatnonzero(tokens >= DNA.ordinary)
    for start, stop in zip([0, *(special + 1).tolist()], [*special.tolist(), len(tokens)], strict=True):
        out[start:stop] = COMPLEMENT[tokens[start:stop][::-1]]
    return out
