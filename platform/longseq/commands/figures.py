"""Pictures of a run: PNG files under RUN/figures, and images in its TensorBoard.

Training curves; accuracy by length (of the kept evaluation, else of a sample that is scored now); what each layer's
attention looks at; similarities of the amino acids' embeddings next to BLOSUM62; how far attention is from softmax
attention, by layer.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from longseq.commands.options import add_model, add_overrides, ready
from longseq.data import resolve_sources
from longseq.errors import LongseqError
from longseq.output_files import output_file
from longseq.trained_model import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_overrides(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="another folder than RUN/figures")


def run(args: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise LongseqError("figures are drawn by matplotlib, which is not installed: pip install 'longseq[figures]'.")
    source = find(args.target, args.overrides, ema=args.ema)
    if source.run is None:
        raise LongseqError(f"{args.target}: an exported folder has neither curves nor data; give the run it came from.")
    if not source.tuned:
        resolve_sources(source.config)

    from longseq.evaluation.figures import figures
    from longseq.evaluation.result_files import show_pictures

    ready()
    folder = args.out or source.run.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures(source):
        path = folder / f"{name}.png"
        with output_file(path) as partial:
            figure.savefig(partial, format="png")
        pictures[f"figures/{name}"] = path
        print(path)
        sys.stdout.flush()
    if not args.out:
        show_pictures(source.run.tensorboard_dir / "figures", pictures, source.step)
    return 0
