"""What benchmarks take on the command line, checked: the fields of their requests, and what goes with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

from longseq.commands.numbers import above_zero, at_least, positive

Asked = TypeVar("Asked")


def lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in asked)

    return names


def add_fields(parser: argparse.ArgumentParser, request: type) -> None:
    """An option for each field that says what it means (benchmarks.request.option)."""
    for field in fields(request):
        if "meaning" not in field.metadata:
            continue
        about, kind, default = dict(field.metadata), str(field.type), field.default
        how: dict[str, Any] = {"help": about["meaning"], "default": default}
        if isinstance(default, tuple):
            how["default"] = ",".join(map(str, default))
        if kind == "bool":
            how["action"] = "store_true"
        elif "choices" in about:
            how["choices"] = about["choices"]
        else:
            how["metavar"] = about["metavar"]
        if "names" in about:
            how["type"] = names(about["names"])
            how["help"] = about["meaning"] or "; ".join(f"{name}: {words}" for name, words in about["names"].items())
        elif kind in ("int", "float", "tuple[int, ...]"):
            how["type"] = {"int": at_least(about.get("least", 1)), "float": above_zero}.get(kind, lengths)
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how)


def asked(request: type[Asked], args: argparse.Namespace, **more: Any) -> Asked:
    """The request that was typed."""
    given = {field.name: getattr(args, field.name) for field in fields(request) if hasattr(args, field.name)}  # type: ignore[arg-type]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return request(**(given | more))


def threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=None)
    about = "CPU threads; torch chooses by default"
    parser.add_argument("--threads", type=positive, default=argparse.SUPPRESS, metavar="N", help=about)


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
