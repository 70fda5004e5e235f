"""Import a Transformer's weights: a Hugging Face folder of ESM-2 (EsmForMaskedLM) or a BERT-like model (ProtBERT).

OUT becomes a folder like that of `longseq export`. With attention.kind=exact, as it is written, the model computes what
the original does. The transfer to a Performer goes on from it:

  longseq import esm2_t6_8M_UR50D esm8m
  longseq evaluate esm8m --data proteins.fasta.gz attention.kind=favor
  longseq fit configs/protein/transfer.yaml model.init_from=esm8m data.train=proteins.fasta.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq.errors import LongseqError
from longseq.interop import exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="config.json, the weights and the vocabulary")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise LongseqError(f"{args.out}: exists already, and is not overwritten: remove it, or choose another name.")
    if exported.is_exported(args.folder):
        raise LongseqError(f"{args.folder}: is a folder of longseq already; use it as it is.")

    from longseq.interop.exporting import write_folder
    from longseq.interop.importing import import_transformer

    imported = import_transformer(args.folder)
    config, vocabulary = imported.config, imported.vocabulary.vocabulary
    spec = config.performer_spec(vocabulary.size)
    name = args.folder.resolve().name
    card = (
        f"---\nlibrary_name: longseq\ntags: [longseq]\n---\n\n# {args.out.name}\n\nThe weights of {name}, imported by "
        "longseq; its licence and its model card are theirs.\n"
    )
    write_folder(args.out, imported.state, config, vocabulary, 0, card, first=vocabulary.bos)
    print(
        f"imported {name}: {spec.parameter_count:,} parameters, {spec.depth} blocks, {spec.heads} heads, width "
        f"{spec.dim}; {vocabulary.size:,} tokens ({Path(vocabulary.name).name}); to {args.out}"
    )
    return 0
