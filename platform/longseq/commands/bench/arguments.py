"""What benchmarks take on the command line, checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping


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


def positive(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def rounds(text: str) -> int:
    return _whole(text, 3)


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def seeds(text: str) -> tuple[int, ...]:
    return tuple(natural(part) for part in text.split(","))


def threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=None)
    about = "CPU threads; torch chooses by default"
    parser.add_argument("--threads", type=positive, default=argparse.SUPPRESS, metavar="N", help=about)


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
