"""Get a data set of UniProt: UniRef clusters or the Knowledgebase.

What is cut goes on where it stopped, after Ctrl-C and a crash too: type the same command again. The file gets its name
once its size and checksum are those of the release's metalink. The current release comes as one file; a previous one
(--release 2024_01) is a .tar.gz of several files, and the command to unpack it is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY = 30.0  # seconds between two lines where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from longseq_data.fetch.releases import DATASETS, MIRRORS

    parser.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--release", default="current", help="such as 2024_01 (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--mirror", default="uniprot", help=f"{', '.join(MIRRORS)} or an address (default: %(default)s)"
    )
    parser.add_argument("--format", choices=("fasta", "dat", "xml"), help="default: fasta; dat: UniProtKB only")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of silence, until it connects anew (default: 60)",
    )
    parser.add_argument(
        "--tries", type=int, default=8, help="in a row that bring nothing, until it gives up (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from longseq_data.fetch.download import Patience
    from longseq_data.fetch.releases import fetch

    with Display(args.name) as display:
        fetched = fetch(
            args.name,
            args.to,
            release=args.release,
            file_format=args.format,
            mirror=args.mirror,
            patience=Patience(timeout=args.timeout, tries=args.tries),
            progress=display.progress,
            notice=display.notice,
        )
    there = "" if fetched.transferred else ", was there"
    print(
        f"{fetched.path}: release {fetched.release or 'unknown'}, {fetched.size:,} bytes, {fetched.algorithm} "
        f"{fetched.checksum} as its metalink says{there}"
    )
    if fetched.unpack:
        print(f"next: (cd '{args.to}' && {fetched.unpack})")
    else:
        print(f"next: longseq data prepare CONFIG sources='[{fetched.path}]'")
    return 0


class Display:
    """How far the transfer is: a bar on a terminal, a line now and then in a log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None
        self._next_line = time.monotonic()
        self._last = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._last:
            print(self._last, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, desc=self._name, unit="B", unit_scale=True)
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        self._last = f"{self._name}: {done:,} of {total:,} bytes ({100 * done // max(total, 1)} %)"
        if time.monotonic() >= self._next_line:
            print(self._last, file=sys.stderr, flush=True)
            self._last, self._next_line = "", time.monotonic() + LOG_EVERY

    def notice(self, sentence: str) -> None:
        if self._bar is not None:
            self._bar.write(sentence, file=sys.stderr)
        else:
            print(sentence, file=sys.stderr, flush=True)
