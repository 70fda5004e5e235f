"""What a protein model is worth, by the field's own measures. `longseq benchmark NAME --help` says more about each.

`longseq bench` measures machines; this measures models.
"""

from __future__ import annotations

import argparse

from longseq.commands.subverbs import add_parts

# benchmark: what it does. The module of the same name here has add_arguments(parser) and run(args), like a verb's.
BENCHMARKS = {
    "proteingym": "mutation effects: ProteinGym's assays, measures and averages, next to its published results",
    "contacts": "contacts from attention maps and from the categorical Jacobian",
    "structure": "three-state secondary structure by a linear probe on frozen embeddings",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_parts(parser, "longseq.commands.benchmark", BENCHMARKS, "NAME")


def run(args: argparse.Namespace) -> int:
    return args.act(args)
