"""A verb that is several: `longseq data prepare`, `longseq benchmark contacts`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping


def add_parts(parser: argparse.ArgumentParser, package: str, parts: Mapping[str, str], metavar: str) -> None:
    """A parser for each part, by the module of its name in ``package``; its ``run`` becomes ``args.act``."""
    children = parser.add_subparsers(dest=metavar.lower(), metavar=metavar, required=True)
    for name, about in parts.items():
        module = importlib.import_module(f"{package}.{name}")
        child = children.add_parser(
            name, help=about, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(child)
        child.set_defaults(act=module.run)
