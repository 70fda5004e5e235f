"""Look at a prepared corpus, or at files to train on: counts, lengths, the first records."""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq_data.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CORPUS|FILE",
        help="the folder of a corpus; or files as data.train takes them: FASTA, UniProt .dat or XML, text, JSON Lines, "
        "Parquet, images: paths, globs, folders, URLs",
    )
    parser.add_argument("--column", help="field of a table with the text or image; default: text, or image")
    parser.add_argument("--tokenizer", default="auto", help="what the tokens are, as data.tokenizer; default: auto")
    parser.add_argument("--records", type=int, default=3, help="records to show (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from longseq.commands.data.progress import Bar
    from longseq_data.corpus.corpus import is_corpus
    from longseq_data.prepare import inspection
    from longseq_data.readers.formats import folder_format
    from longseq_data.readers.reading import Reading, agree
    from longseq_data.readers.sources import expand_sources

    def folder_of_fasta(name: str) -> bool:
        folder = user_path(name)
        return folder.is_dir() and folder_format(str(folder), "auto") == "fasta"

    show = max(0, args.records)
    if len(args.what) == 1 and (is_corpus(args.what[0]) or folder_of_fasta(args.what[0])):
        for line in inspection.corpus_lines(user_path(args.what[0]), show):
            print(line)
        return 0
    sources = expand_sources(args.what, "auto")
    read = Reading("auto", agree(sources, "auto", args.tokenizer), args.column)
    sizes = [Path(source).stat().st_size for source in sources if Path(source).is_file()]
    total = sum(sizes) if len(sizes) == len(sources) else None
    done = 0
    with Bar({"bytes": ("reading", "B")}) as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar("bytes", done, total)

        counts = inspection.count(read, sources, show, progress)
    for line in inspection.raw_lines(read, counts):
        print(line)
    return 0
