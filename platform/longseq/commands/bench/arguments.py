"""What benchmarks take on the command line, checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from longseq.commands.numbers import above_zero, natural, naturals, positive

__all__ = [
    "above_zero",
    "lengths",
    "names",
    "natural",
    "naturals",
    "positive",
    "set_threads",
    "threads_argument",
]


def lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def names(known: Mapping[str, str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in asked)

    return names


def threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=None)
    about = "CPU threads; torch chooses by default"
    parser.add_argument("--threads", type=positive, default=argparse.SUPPRESS, metavar="N", help=about)


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
