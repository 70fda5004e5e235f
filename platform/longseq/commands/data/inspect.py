"""Look at a prepared corpus, or at sequence files that may become one: counts, lengths, the first records."""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq_data.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="+", help="the folder of a corpus; or FASTA, UniProt .dat or XML: paths, globs, URLs"
    )
    parser.add_argument("--records", type=int, default=3, help="records to show (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from longseq.commands.data.progress import Bar
    from longseq_data import inspection
    from longseq_data.sources import expand_sources

    show = max(0, args.records)
    if len(args.what) == 1 and user_path(args.what[0]).is_dir():
        for line in inspection.corpus_lines(user_path(args.what[0]), show):
            print(line)
        return 0
    sources = expand_sources(args.what)
    sizes = [Path(source).stat().st_size for source in sources if Path(source).is_file()]
    total = sum(sizes) if len(sizes) == len(sources) else None
    done = 0
    with Bar({"bytes": ("reading", "B")}) as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar("bytes", done, total)

        counts = inspection.count(sources, show, progress)
    for line in inspection.raw_lines(sources, counts):
        print(line)
    return 0
