"""Hugging Face ``tokenizers`` files: their vocabulary, texts to ids and what each id stands for, and their training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError, one_line
from longseq_data.files import write_text
from longseq_data.os_errors import explained
from longseq_data.vocabulary import ALPHABETS, INFILL_MARKS, UNKNOWN, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Counts = npt.NDArray[np.int64]

# What tokenizers call the special tokens. Ours come first; `longseq data tokenizer` writes these.
SPECIAL_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "mask": ("<mask>", "[MASK]"),
}
# What the marks of infilling are called in an exported tokenizer; the second where it has a token of the first name.
INFILL_NAMES = tuple((mark, f"<longseq-{mark[5:]}") for mark in INFILL_MARKS)
SPECIAL = tuple(names[0] for names in SPECIAL_NAMES.values())


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a JSON file, without truncation, padding, or an eye for special tokens written in the text.

    Raises DataError for a file that is missing or no tokenizer.
    """
    # It warns of, and gives up, its threads when a loader's process is forked. Documents come one at a time anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such tokenizer file; train one with `longseq data tokenizer`, or correct its name."
        )
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"{path}: no tokenizer that Hugging Face tokenizers can read ({one_line(error)[:200]}); give a "
            "tokenizer.json."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=4)
def tokenizer_vocabulary(path: str) -> Vocabulary:
    """The tokenizer's ids, with those of BOS, EOS, PAD and MASK appended where it has none at its end.

    Special tokens among the ordinary ones (BERT's [PAD] has id 0) stay ids that no text contains.
    """
    tokenizer = load_tokenizer(path)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise DataError(f"{path}: this tokenizer has no tokens at all; train it first.")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names = {id_: name for name, id_ in ids.items()}
    known = {name for every in SPECIAL_NAMES.values() for name in every}
    size = max(ids.values()) + 1
    last = [names.get(size - len(INFILL_NAMES) + place) for place in range(len(INFILL_NAMES))]
    if all(name in special and name in marks for name, marks in zip(last, INFILL_NAMES, strict=True)):
        size -= len(last)  # of an exported model that fills in: they are behind its vocabulary
    ordinary = size
    while names.get(ordinary - 1) in special & known:
        ordinary -= 1
    found: dict[str, int] = {}
    for role, candidates in SPECIAL_NAMES.items():
        own = [ids[name] for name in candidates if ids.get(name, -1) >= ordinary]
        found[role] = own[0] if own else size
        size += not own
    return Vocabulary(path, size, **found, ordinary=ordinary, replacements=ordinary)


def ids_of(text: str, tokens: str, what: str) -> list[int]:
    """A text as ids, without special tokens. tokens: protein, dna, bytes or a tokenizer's file.

    Raises DataError for a letter that is no residue, naming it and its position, and for what is no text; ``what`` says
    whose.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what}: not UTF-8 from position {error.start + 1} on; write it in UTF-8.") from None
    if tokens in ALPHABETS:
        alphabet = ALPHABETS[tokens]
        ids = list(text.encode("ascii", "replace").translate(alphabet.table))
        if UNKNOWN in ids:
            at = ids.index(UNKNOWN)
            raise DataError(f"{what}: {text[at]!r} at position {at + 1} is not one of {alphabet.letters}; correct it.")
        return ids
    if tokens == "bytes":
        return list(text.encode())
    return load_tokenizer(tokens).encode(text, add_special_tokens=False).ids


def extents(text: str, path: str) -> tuple[Counts, Counts]:
    """Bytes and words before each token of a text, and in all: (tokens + 1,) each.

    What a tokenizer leaves out, white space mostly, counts to the token after it, and at the end to the last one: so
    every byte counts once.
    """
    offsets = load_tokenizer(path).encode(text, add_special_tokens=False).offsets
    data = text.encode()
    first_bytes = np.frombuffer(data, dtype=np.uint8) & 0xC0 != 0x80
    byte_of = np.append(np.flatnonzero(first_bytes), len(data))  # of each character, and the end
    ends = np.maximum.accumulate(np.array([0, *(end for _, end in offsets)], dtype=np.int64))
    n_bytes = byte_of[ends].astype(np.int64)
    n_bytes[-1] = len(data)
    return n_bytes, words_before(data)[n_bytes]


_ASCII_SPACE = np.array([chr(byte).isspace() and byte < 128 for byte in range(256)])
# The white space of str.split() beyond ASCII, as UTF-8.
_WIDE_SPACE = re.compile(rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80")


def words_before(text: bytes) -> npt.NDArray[np.int64]:
    """How many words begin before each byte, and in all: (len(text) + 1,). A word is what ``str.split()`` gives."""
    space = _ASCII_SPACE[np.frombuffer(text, dtype=np.uint8)]
    for wide in _WIDE_SPACE.finditer(text):
        space[wide.start() : wide.end()] = True
    begins = ~space
    begins[1:] &= space[:-1]
    return np.concatenate([[0], np.cumsum(begins, dtype=np.int64)])


def train_tokenizer(texts: Iterable[str], model: str, size: int, show_progress: bool = False) -> Tokenizer:
    """A tokenizer of at most ``size`` tokens, the four special ones included, trained on ``texts``.

    model: "unigram" (Kudo, arXiv 1804.10959; SentencePiece's, as in the paper's PG-19) or "bpe". Both work on bytes, so
    that every text can be written, and read back as it was; pieces do not reach over the white space between words.
    Training "bpe" is repeatable; "unigram" differs in the last digits of its scores from one time to the next.

    Raises DataError if the texts are too few for any token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = size - len(SPECIAL)
    empty, train = (models.BPE, trainers.BpeTrainer) if model == "bpe" else (models.Unigram, trainers.UnigramTrainer)
    tokenizer = Tokenizer(empty())
    trainer = train(vocab_size=pieces, initial_alphabet=alphabet, show_progress=show_progress)
    if model == "bpe":  # GPT-2's pattern: words, numbers and punctuation apart
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        # SentencePiece's: at spaces only. The trainer takes its first candidates from what different words have in
        # common: where punctuation is split off, the frequent " and " is like no other word, and is never a candidate.
        lines = pre_tokenizers.Split(Regex("\n"), "isolated")
        words = pre_tokenizers.Split(" ", "merged_with_next")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words, plain])
    tokenizer.decoder = decoders.ByteLevel()
    try:
        tokenizer.train_from_iterator(_chunks(texts), trainer)
    except DataError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"No {model} tokenizer of {size:,} tokens can be trained on these texts ({one_line(error)[:200]}); give "
            "more text, or ask for fewer tokens."
        ) from error
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the JSON file, whole or not at all.

    Raises DataError where that cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, tokenizer.to_str(pretty=True))
    except OSError as error:
        raise DataError(f"{explained(error, path, 'cannot be written')}.") from error


def _chunks(texts: Iterable[str], characters: int = 1 << 16) -> Iterator[str]:
    """The texts in pieces, cut at white space where there is any: the trainer holds many of what it is given."""
    for text in texts:
        start = 0
        while len(text) - start > characters:
            end = text.rfind(" ", start + characters // 2, start + characters)
            end = end if end > start else start + characters
            yield text[start:end]
            start = end
        yield text[start:]
