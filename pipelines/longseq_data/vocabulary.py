"""The 29 tokens of protein language modelling (Choromanski et al., arXiv 2009.14794, appendix C.1)."""

from __future__ import annotations

from collections.abc import Iterable

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

TOKENS = (*LETTERS, "<bos>", "<eos>", "<pad>", "<mask>")

# Byte -> id. Lower case marks low-complexity regions (soft masking) and means the same residue.
TABLE = bytes(LETTERS.find(chr(byte).upper()) % 256 if byte < 128 else UNKNOWN for byte in range(256))


def decode(tokens: Iterable[int]) -> str:
    """Letters of residue ids; special tokens read <bos>, <eos>, <pad>, <mask>. IndexError for an id beyond 28."""
    return "".join(TOKENS[token] for token in tokens)
