"""The configurations that come with longseq: list them, or copy some to change them.

A configuration is named as it is listed, `longseq fit protein/base`, or by the file that a copy of it makes.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import textwrap
from itertools import takewhile
from pathlib import Path

from longseq.config.shipped import shipped, with_bases
from longseq.errors import LongseqError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="without one: the list")
    about = "write configurations, and what they extend, to configs/ here; profiles of clusters to slurm/sites/"
    copy = actions.add_parser("copy", help=about, description=f"{about[0].upper()}{about[1:]}.")
    copy.add_argument("words", nargs="+", metavar="NAME", help="as listed, e.g. protein/base; all: every one")


def run(args: argparse.Namespace) -> int:
    files = shipped() | _sites()
    if args.action == "copy":
        for target, source in _planned(args.words, files).items():
            _copy(source, target)
        return 0
    width = max(map(len, files))
    for name, file in files.items():
        print(f"{name:<{width}}  {_about(file)}")
    return 0


def _sites() -> dict[str, Path]:
    from longseq.launch.slurm.templates import folder

    return {f"sites/{file.stem}": file for file in sorted((folder() / "sites").glob("*.yaml"))}


def _about(file: Path) -> str:
    """The first sentence of a file's comment, on one line."""
    lines = takewhile(lambda line: re.match(r"# \S", line), file.read_text(encoding="utf-8").splitlines())
    comment = "\n".join(line[2:].partition("   ")[0] for line in lines)
    sentence = re.split(r":$|\.$|\.\s(?=[A-Z])", comment, maxsplit=1, flags=re.MULTILINE)[0]
    return textwrap.shorten(sentence, 90, placeholder=" ...")


def _planned(names: list[str], files: dict[str, Path]) -> dict[Path, Path]:
    """Where each file goes, and where it comes from.

    Raises:
        LongseqError: for a name that does not exist, and a file of another content in the way.
    """
    planned = {}
    for name in files if names == ["all"] else [name.removesuffix(".yaml") for name in names]:
        if name not in files:
            raise LongseqError(f"{name}: no such configuration; `longseq configs` lists those that come with longseq.")
        for file in with_bases(files[name]) if not name.startswith("sites/") else [files[name]]:
            root = Path("slurm") if name.startswith("sites/") else Path("configs")
            planned[root / file.parent.name / file.name] = file
    for target, source in planned.items():
        if target.exists() and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise LongseqError(f"{target}: exists, with other content; move it away, or copy in another folder.")
    return planned


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    print(f"{target}")
