"""Train a tokenizer on texts and write it as a Hugging Face tokenizers file, to be named in data.tokenizer.

    longseq data tokenizer pg19.json books/ --model unigram --size 32768

Sources are those of data.train: files of text, JSON Lines or Parquet, plain or gzipped, globs, folders, URLs, and
hub:OWNER/NAME. The tokenizer works on bytes: it writes every text without unknown tokens, and reads back what was
written. <bos>, <eos>, <pad> and <mask> are the last four of its --size tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import ConfigError
from longseq_data.readers.formats import FORMATS, format_of

if TYPE_CHECKING:
    from longseq_data.readers.reading import Reading

_TEXTS = ("auto", *(name for name in FORMATS if name not in ("fasta", "images")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument("sources", nargs="+", help="texts to train on")
    parser.add_argument(
        "--model", choices=("unigram", "bpe"), default="unigram", help="default: %(default)s, as SentencePiece's"
    )
    parser.add_argument("--size", type=int, default=32_768, help="tokens, special ones included (default: %(default)s)")
    parser.add_argument("--format", choices=_TEXTS, default="auto", help="of the sources (default: by their names)")
    parser.add_argument("--column", help="field of a table with the text (default: text)")
    parser.add_argument(
        "--megabytes", type=int, default=100, help="read at most so much text, in the sources' order (default: 100)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    least = 256 + 4 + 1
    if args.size < least:
        raise ConfigError(f"--size {args.size}: 256 bytes and 4 special tokens leave no room; take {least} or more.")
    if args.megabytes < 1:
        raise ConfigError(f"--megabytes {args.megabytes}: take 1 or more.")
    if args.file.suffix != ".json":
        raise ConfigError(f"{args.file}: a tokenizer's file ends in .json; name it so.")
    if args.file.exists() and not args.overwrite:
        raise ConfigError(f"{args.file} exists already: choose another name, or replace it with --overwrite.")

    from longseq_data.readers.reading import Reading
    from longseq_data.readers.sources import expand_sources
    from longseq_data.tokenization import save_tokenizer, train_tokenizer

    sources = expand_sources(args.sources, args.format)
    for source in sources:
        kind = format_of(source, args.format)
        if kind not in _TEXTS:
            raise ConfigError(
                f"{source}: taken for {kind}, and a tokenizer learns from text; if it is text, say --format text."
            )
    read = _Texts(Reading(args.format, "bytes", args.column), sources, args.megabytes * 10**6)
    tokenizer = train_tokenizer(read, args.model, args.size, show_progress=sys.stderr.isatty())
    save_tokenizer(tokenizer, args.file)
    size = tokenizer.get_vocab_size()
    print(f"{args.file}: {size:,} tokens ({args.model}) from {read.documents:,} documents, {read.bytes:,} bytes")
    if size < args.size:
        print(
            f"longseq: warning: these texts give no more than {size:,} of {args.size:,} tokens: give more text.",
            file=sys.stderr,
        )
    return 0


class _Texts:
    """The characters of the sources' documents, and a count of what was read."""

    def __init__(self, reading: Reading, sources: list[str], most: int):
        self.reading, self.sources, self.most = reading, sources, most
        self.documents = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        from longseq_data.readers.documents import decoded

        for leaf in self.reading.leaves(self.sources):
            for text in self.reading.texts(leaf, strict=False):
                self.documents += 1
                self.bytes += len(text.data)
                yield decoded(text, strict=False)
                if self.bytes >= self.most:
                    return
