"""Real proteins and texts, which do not come with the repository; tests of them are skipped where there are none.

LONGSEQ_PROTEINS: a folder of UniRef50 ``*.fasta.gz``. LONGSEQ_TEXT: a folder of books, ``*.txt``. Without these
variables, ``shared/data/proteins`` and ``shared/data/text`` next to the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def folder_of(kind: str) -> Path:
    """The folder of "proteins" or of "text", which need not exist."""
    return Path(os.environ.get(f"LONGSEQ_{kind.upper()}") or BESIDE / kind)
