"""What the tests of downloads share: one file, a server that has it, and a call that fetches it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from longseq_data.fetch.download import Patience
from longseq_data.fetch.partial import Promise

CONTENT = random.Random(1).randbytes(300_017)
OTHER = random.Random(2).randbytes(300_017)
PATH = "/file.gz"
PROMISE = Promise(len(CONTENT), "md5", hashlib.md5(CONTENT).hexdigest(), "2024_02")
QUICK = Patience(timeout=0.4, tries=3, first_wait=0.01, longest_wait=0.02)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_whole(folder: Path) -> None:
    assert (folder / "file.gz").read_bytes() == CONTENT
    assert files(folder) == ["file.gz"]


def assert_part(folder: Path, size: int, content: bytes = CONTENT) -> None:
    """A part to go on with, and no file under the final name."""
    assert (folder / "file.gz.part").read_bytes() == content[:size]
    assert files(folder) == ["file.gz.part", "file.gz.part.json"]
