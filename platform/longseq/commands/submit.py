"""Submit a training to a SLURM cluster: a configuration for a new run, or a run's folder to go on with it.

Everything that can be checked is checked first; the job comes back by itself until the run is finished. With --job it
does something else with a run or a configuration.
"""

from __future__ import annotations

import argparse
import glob
import shlex
import sys
from pathlib import Path

from longseq.commands.key_help import help_on_flat_keys
from longseq.commands.numbers import natural, positive
from longseq.commands.options import TAKE_OVER_HELP, given
from longseq.errors import ConfigError
from longseq.launch.shared_work import SHARED, words_of
from longseq.launch.slurm.site import Site
from longseq.launch.submission import Submission, submit
from longseq.runs import code
from longseq.runs.run import as_typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="CONFIG|RUN",
        type=Path,
        help="a YAML file, a name of `longseq configs`, or the folder of a run",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. trainer.max_steps=20000")
    parser.add_argument("--nodes", type=positive, metavar="N", help="machines; default: trainer.nodes")
    parser.add_argument(
        "--gpus-per-node",
        "--tasks-per-node",
        dest="devices",
        type=positive,
        metavar="G",
        help="training processes of a node, one a GPU; with trainer.accelerator=cpu without one; default: the site's, "
        "else trainer.devices",
    )
    parser.add_argument(
        "--min-nodes", type=positive, metavar="N", help="also start with fewer nodes, when no more are there"
    )
    parser.add_argument(
        "--spares",
        type=natural,
        default=0,
        metavar="K",
        help="ask for K more nodes, where there are any: idle until one takes the place of a lost or unfit node",
    )
    parser.add_argument("--site", metavar="FILE", help="the cluster's profile; default: $LONGSEQ_SITE")
    parser.add_argument("--time", metavar="T", help="limit of one start, e.g. 24h; default: the site's")
    parser.add_argument("--dependency", metavar="D", help="as sbatch has it, e.g. afterok:1234")
    parser.add_argument(
        "--array",
        action="append",
        metavar="FILE|'key=value ...'",
        help="a sweep, a run for each line of FILE or each --array: overrides, separated by spaces",
    )
    parser.add_argument("--at-once", type=positive, metavar="N", help="jobs of an array that run at a time")
    parser.add_argument(
        "--chain", type=positive, metavar="N", help="N jobs one after another, where jobs may not come back"
    )
    parser.add_argument(
        "--job",
        choices=("train", "evaluate", "prepare", *SHARED),
        default="train",
        help="evaluate RUN, or prepare a corpus of CONFIG, with their verbs' key=value; "
        "embed, score or benchmark with RUN on all nodes, the verb's words without RUN behind a --, as in --job embed "
        "--nodes 4 -- proteins.fasta --out vectors.parquet",
    )
    parser.add_argument(
        "--current-code", action="store_true", help="go on with RUN by today's code, and not that of its submission"
    )
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER_HELP)
    parser.add_argument("--dry-run", action="store_true", help="show the script, and make nothing")
    parser.add_argument("--test-only", action="store_true", help="ask sbatch when and where it would start; no more")
    parser.epilog = "keys of a site's profile (see slurm/sites/example.yaml):\n" + help_on_flat_keys(Site)


def run(args: argparse.Namespace) -> int:
    names = "nodes devices min_nodes spares site time dependency at_once chain job current_code take_over"
    options = given(args, f"{names} dry_run test_only")
    command = shlex.join(["longseq", *sys.argv[1:]])
    members = _members(args.array or [])
    if args.job in SHARED:
        _understood(args.job, args.target, args.overrides)
    done = submit(args.target, args.overrides, array=members, command=command, **options)
    if args.dry_run:
        print(done.script, end="")
    elif args.test_only:
        print(done.expected)
    else:
        _say(done)
    return 0


def _say(done: Submission) -> None:
    print(f"job     {', '.join(done.jobs)}")
    if not done.runs:
        print(f"script  {as_typed(done.path)}")
        print(f"log     {as_typed(done.path.with_suffix('.log'))}")
        if done.verb:
            words = f"{as_typed(done.path.parent.parent)} --job {done.verb}"
            print(f"Follow it:     longseq logs -f {words}")
            print(f"State:         longseq status {as_typed(done.path.parent.parent)}")
            print(f"Cancel it:     scancel {' '.join(done.jobs)}    (longseq cancel {words}: all such jobs of the run)")
        return
    first, runs = done.runs[0], done.runs
    print(f"run     {as_typed(first.path)}{f' to {runs[-1].path.name}' if len(runs) > 1 else ''}")
    print(f"memory  {done.memory}")
    used = code.kept(first)
    if used:
        whose = "" if used == code.current() else ", of the first submission (--current-code takes today's)"
        print(f"code    {used}{whose}")
    print(f"Follow it:     longseq logs -f {as_typed(first.path)}")
    print(f"State:         longseq jobs --dir {as_typed(first.path.parent)}")
    print(f"Look at it:    tensorboard --logdir {as_typed(first.path.parent)}")
    print(f"Cancel it:     longseq cancel {' '.join(as_typed(run.path) for run in runs)}")


def _understood(verb: str, target: Path, words: list[str]) -> None:
    """Refuse what the job's command line would refuse, before it waits for nodes."""
    from longseq.cli import parsed

    args = parsed(words_of(verb, target, words))
    for file in (getattr(args, name, None) for name in ("file", "folder", "variants", "context", "reference")):
        if file and not glob.has_magic(str(file)) and "://" not in str(file) and not Path(file).exists():
            raise ConfigError(f"{file} does not exist: correct the path.")


def _members(arguments: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep."""
    lines = arguments
    if len(arguments) == 1 and Path(arguments[0]).is_file():
        text = Path(arguments[0]).read_text(encoding="utf-8").splitlines()
        lines = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    elif len(arguments) == 1 and "=" not in arguments[0]:
        raise ConfigError(f"--array={arguments[0]}: no such file, and no key=value.")
    if arguments and not lines:
        raise ConfigError(f"--array={arguments[0]}: a file without a line of key=value.")
    try:
        return [shlex.split(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"--array: {error}: close the quotation.") from None
