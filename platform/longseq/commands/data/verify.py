"""Check a prepared corpus: every file against its checksum, and what is in them.

Without --full, duplicates and splits are checked on a part of the records; file checksums always on all.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=Path, help="the folder of a prepared corpus")
    parser.add_argument("--full", action="store_true", help="compare all records, and recompute the fingerprint")


def run(args: argparse.Namespace) -> int:
    from longseq.commands.data.progress import Bar
    from longseq.runs.run import as_typed
    from longseq_data.prepare.verify import verify

    with Bar({"bytes": ("checksums", "B"), "cells": ("records", " parts")}) as bar:
        found = verify(args.corpus, full=args.full, progress=bar)
    print(
        f"{as_typed(args.corpus.absolute())}: {found.files} files, {found.bytes:,} bytes as in the manifest; "
        f"{found.compared:,} of {found.records:,} records compared; fingerprint {found.fingerprint[:16]}"
    )
    return 0
