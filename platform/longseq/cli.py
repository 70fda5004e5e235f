"""``longseq``: one command, one verb a file in ``commands``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import importlib
import keyword
import sys
from collections.abc import Sequence

from longseq import __version__
from longseq.errors import EXIT_ERROR, USER_ERRORS
from longseq_data.os_errors import explained

# verb: what it does. The module of the same name in longseq.commands has add_arguments(parser) and run(args).
VERBS = {
    "check": "before an expensive job: configuration, files, memory, devices, collectives, one step",
    "fit": "train a model here, with 1 process or more (trainer.devices=N)",
    "submit": "train on a SLURM cluster: multi-node jobs that come back by themselves",
    "jobs": "the runs that were submitted: job, state, step, loss, speed, starts, time left",
    "status": "how one run stands: its job, its starts, and where they got to",
    "logs": "what a run's job has written; -f follows it",
    "cancel": "cancel the jobs of a run",
    "resume": "go on with a run from its newest whole checkpoint",
    "evaluate": "how well checkpoints predict: loss, accuracy, calibration, beside the empirical baseline",
    "sample": "new sequences from a causal model; masked positions filled in by a masked one",
    "score": "log-likelihoods of sequences, and effects of mutations",
    "embed": "a model's vectors of sequences, as Parquet or npz",
    "figures": "pictures of a run: curves, accuracy by length, attention, similarities, errors",
    "export": "a model as a Hugging Face folder: safetensors, config.json, tokenizer, model card",
    "import": "the weights of a Hugging Face Transformer (ESM-2, BERT-like), to go on with as a Performer",
    "data": "make and look at data",
    "experiment": "a table of runs beside the paper's numbers: configs/experiments/*.yaml",
    "bench": "measure this machine, side by side with the exact Transformer and other libraries",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its result is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="longseq", description="Pretrain Performers (FAVOR+ linear attention) on very long sequences."
    )
    parser.add_argument("--version", action="version", version=f"longseq {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, about in VERBS.items():
        # Only the verb that is asked for is imported: `longseq --help` needs none of them.
        name = f"longseq.commands.{verb}{'_' * keyword.iskeyword(verb)}"
        module = importlib.import_module(name) if argv and argv[0] == verb else None
        formatter = argparse.RawDescriptionHelpFormatter
        child = verbs.add_parser(
            verb, help=about, description=module.__doc__ if module else None, formatter_class=formatter
        )
        if module:
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    # argparse takes the arguments of a list in one block only; those after an option come back here.
    words = [word for word in rest if not word.startswith("-") and "=" not in word and hasattr(args, "words")]
    rest = [word for word in rest if word not in words]
    misplaced = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if misplaced:
        parser.error(f"unrecognized arguments: {' '.join(misplaced)}")
    if words:
        args.words = [*args.words, *words]
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args)
    except USER_ERRORS as error:
        print(f"longseq: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_ERROR)
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        sys.stderr.close()
        return EXIT_ERROR
    except OSError as error:  # a full or read-only disk, mostly
        print(f"longseq: error: {explained(error)}.", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
