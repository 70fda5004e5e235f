"""Make and look at data. `longseq data ACTION --help` says more about each action."""

from __future__ import annotations

import argparse

from longseq.commands.subverbs import add_parts

# action: what it does. The module of the same name here has add_arguments(parser) and run(args), like a verb's.
ACTIONS = {
    "fetch": "download UniRef or UniProtKB, checked against the release's checksums",
    "inspect": "counts, lengths and first records of a prepared corpus or of sequence files",
    "leaks": "relatives of test and valid records in train, by MMseqs2",
    "prepare": "make a corpus of sequence files: filtered, without duplicates, split, shuffled",
    "synth": "write a synthetic protein corpus",
    "tokenizer": "train a tokenizer on texts",
    "verify": "check every file of a prepared corpus",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_parts(parser, "longseq.commands.data", ACTIONS, "ACTION")


def run(args: argparse.Namespace) -> int:
    return args.act(args)
