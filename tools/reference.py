"""The pages of docs/reference that are made from the code: keys, verbs, exit codes, and what every configuration costs.

``python tools/reference.py`` writes them; `make docs` and `make check` do so before they build the site.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from longseq.cli import VERBS
from longseq.config.loading import described_keys, load_config
from longseq.config.schema import Config
from longseq.errors import EXIT_CODES
from longseq.launch.slurm.site import Site
from longseq.measure.memory import estimate
from longseq.measure.model_flops import training_flops
from longseq_data.prepare.config import PrepareConfig

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"

# What the hours are reckoned with, said on the page.
PEAK, SHARE = 989e12, 0.3  # FLOP/s of an H100 SXM in bf16 without sparsity (its data sheet), and the part that is used


def cell(text: object) -> str:
    """A table's cell: one line, without what Markdown would read as markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def code(text: object) -> str:
    return f"`{text}`".replace("|", "\\|")


def key_rows(entries: Iterator[tuple[str, str, object, Mapping[str, Any]]]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, about in entries:
        choices = f" One of {', '.join(map(code, about['choices']))}." if about.get("choices") else ""
        least = f" At least {about['at_least']:g}." if about.get("at_least") is not None else ""
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        shown = '""' if shown == "" else shown
        meaning = f"{cell(about['meaning'])}.{choices}{least}"
        rows.append(f"| {code(name)} | {cell(kind.removesuffix(' | None'))} | {code(shown)} | {meaning} |")
    return rows


def flat(schema: type) -> Iterator[tuple[str, str, object, Mapping[str, Any]]]:
    defaults = schema()
    for item in fields(schema):
        yield item.name, str(item.type), getattr(defaults, item.name), item.metadata


def keys() -> str:
    lines = [
        "# Configuration keys",
        "",
        "Every key of a training's YAML file, in the order of `longseq fit --help`. How files, `extends` and overrides "
        "work: [Configure a run](../how-to/configure.md).",
    ]
    for section in vars(Config()):
        found = [(f"{s}.{name}", str(a["type"]), a["default"], a) for s, name, a in described_keys() if s == section]
        if found:
            lines += ["", f"## {section}", "", *key_rows(iter(found))]
    lines += ["", "## deepspeed", "", "Passed through to DeepSpeed's own configuration.", ""]
    lines += ["## `longseq data prepare`", "", "A file without sections.", "", *key_rows(flat(PrepareConfig)), ""]
    lines += ["## A cluster's profile", "", "Of `longseq submit --site FILE`.", "", *key_rows(flat(Site))]
    return "\n".join(lines)


def parser_of(verb: str) -> tuple[argparse.ArgumentParser, str]:
    """A verb's arguments, and what its module says of it."""
    module = importlib.import_module(f"longseq.commands.{verb}{'_' * keyword.iskeyword(verb)}")
    parser = argparse.ArgumentParser(prog=f"longseq {verb}", add_help=False)
    module.add_arguments(parser)
    return parser, (module.__doc__ or "").strip()


def arguments(parser: argparse.ArgumentParser, level: int) -> list[str]:
    lines: list[str] = []
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help for choice in action._choices_actions}
            for name, child in action.choices.items():
                lines += ["", f"{'#' * level} {child.prog.removeprefix('longseq ')}", "", f"{about.get(name) or ''}."]
                lines += arguments(child, level + 1)
            continue
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(action.option_strings)
        takes = action.metavar or (action.dest if not action.option_strings else "")
        if isinstance(takes, tuple):
            takes = " ".join(takes)
        if action.option_strings and action.nargs != 0 and not takes:
            takes = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
        nothing = (None, False, [], "", argparse.SUPPRESS)
        default = "" if any(action.default is value or action.default == value for value in nothing) else action.default
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append(f"| {code(f'{names} {takes}'.strip())} | {code(default) if default != '' else ''} | {cell(text)} |")
    table = ["", "| argument | default | meaning |", "|---|---|---|", *rows] if rows else []
    return table + lines


def verbs() -> str:
    lines = ["# Verbs", "", "What `longseq --help` and `longseq VERB --help` print.", ""]
    lines += ["| verb | what it does |", "|---|---|"]
    lines += [f"| [`{verb}`](#{verb}) | {cell(about)} |" for verb, about in VERBS.items()]
    for verb in VERBS:
        parser, about = parser_of(verb)
        lines += ["", f"## {verb}", "", about.replace("<", "&lt;"), *arguments(parser, 3)]
    return "\n".join(lines)


def exit_codes() -> str:
    rows = [f"| {number} | {meaning} |" for number, meaning in EXIT_CODES.items()]
    jobs = "SLURM's states that go with them: [Train on a SLURM cluster](../how-to/slurm.md#exit-codes-of-a-job)."
    return "\n".join(["# Exit codes", "", "| code | meaning |", "|---|---|", *rows, "", jobs])


def costs() -> str:
    """Memory as `longseq check` reckons it, and hours from model FLOPs."""
    lines = [
        "# What every configuration costs",
        "",
        "Memory is the arithmetic of `longseq check` for one process: tensors on a GPU, and in the CPU's memory; "
        "leave a tenth for what the allocator cannot use. Hours are model FLOPs of all steps / (processes × "
        f"{SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s), the bf16 peak of an H100: an assumption and no measurement, "
        "too good for small models. `machine/mfu` in TensorBoard says what share your machine reaches.",
        "",
        "| configuration | weights | tokens per step | steps | processes | on a GPU | on the CPU | hours | GPU-hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.parent.name in ("prepare", "experiments"):
            continue
        size = {"text": 260, "pixels": 260, "genome": 9}.get(path.parent.name, 29)
        size = 32768 if path.stem == "pg19" else size
        placeholder = ["data.train=x"]
        if path.stem == "pg19":
            placeholder.append("data.tokenizer=bytes")  # the vocabulary's size alone matters here
        config = load_config(path, placeholder)
        memory = estimate(config, size, on_cuda=True)
        spec = config.performer_spec(size, on_cuda=True)
        tokens = config.data.batch_tokens * config.trainer.max_steps
        hours = training_flops(spec, config.data.length) * tokens / (PEAK * SHARE) / 3600
        name = path.relative_to(ROOT)
        lines.append(
            f"| `{name}` | {spec.parameter_count / 1e6:,.1f} M | {config.data.batch_tokens:,} | "
            f"{config.trainer.max_steps:,} | {config.processes} | {memory.peak / 2**30:.2f} GiB | "
            f"{memory.host / 2**30:.2f} GiB | {hours / config.processes:,.2f} | {hours:,.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    for name, page in (("keys", keys), ("verbs", verbs), ("exit-codes", exit_codes), ("costs", costs)):
        (PAGES / f"{name}.md").write_text(page() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
