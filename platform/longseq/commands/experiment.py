"""Run an experiment: a file of configs/experiments/, which names the runs, trains and scores them all, and sets their
table next to the paper's numbers. Interrupted, the same command goes on; with other --seeds it adds to the table.

  longseq experiment configs/experiments/table2.yaml --seeds 0,1,2 \\
      data.train='[archaea.fasta.gz,escherichia.fasta.gz]' data.ood=viruses.fasta.gz
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

from longseq.commands.numbers import naturals, positive
from longseq.commands.options import add_overrides
from longseq.errors import EXIT_GO_ON, LongseqError
from longseq.experiments.plan import Plan, read_plan
from longseq.experiments.running import Interrupted, Settings, facts, perform, results, trials
from longseq.experiments.running import arguments as run_arguments
from longseq.experiments.tables import report
from longseq_data.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment", type=Path, metavar="FILE", help="a YAML file, or a name of `longseq configs`: experiments/table2"
    )
    add_overrides(parser, "for every run, as of `longseq fit`")
    parser.add_argument("--seeds", type=naturals, default=(0,), metavar="N,…", help="run.seed of each; default: 0")
    parser.add_argument("--steps", type=positive, metavar="N", help="trainer.max_steps of every run")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="what all runs have in common, e.g. configs/protein/trembl_paper.yaml",
    )
    parser.add_argument("--sequences", type=positive, metavar="N", help="score a sample of N of each split")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where runs, results and table go; default: experiments/NAME"
    )
    parser.add_argument("--list", action="store_true", help="print the runs' overrides, for `longseq submit --array`")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and train nothing")


def run(args: argparse.Namespace) -> int:
    plan = read_plan(args.experiment)
    out = user_path(args.out or Path("experiments") / plan.name).absolute()
    if plan.bench:
        return _bench(plan, out, args)
    steps = [f"trainer.max_steps={args.steps}"] if args.steps else []
    config = args.config or plan.config
    assert config  # of a plan that is no benchmark's
    settings = Settings(out, config, (*args.overrides, *steps), args.seeds, args.sequences)
    if args.list:
        for trial in trials(plan, args.seeds):
            print(shlex.join(run_arguments(plan, settings, trial)))
        return 0
    try:
        found = results(plan, settings) if args.table else perform(plan, settings, _tell)
    except Interrupted:
        print(f"longseq: interrupted: what is finished is kept in {out}; the same command goes on.", file=sys.stderr)
        return EXIT_GO_ON
    if not found:
        raise LongseqError(f"{out}: holds no results yet; the command without --table trains.")
    text = report(plan, found, facts(plan, settings, found))
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"kept in {out / 'table.md'}")
    return 0


def _tell(text: str) -> None:
    print(f"experiment  {text}", file=sys.stderr, flush=True)


def _bench(plan: Plan, out: Path, args: argparse.Namespace) -> int:
    """A benchmark, its table kept with the paper's numbers behind it."""
    if args.overrides or args.steps or args.config or args.sequences or args.list or args.table:
        raise LongseqError(
            f"{plan.path}: is `longseq bench {plan.bench[0]}`, which has options of its own and no runs: give it --out "
            "alone, or change bench in a copy of the file."
        )
    from longseq.cli import main

    written = io.StringIO()
    with redirect_stdout(written):
        code = main(["bench", *plan.bench, "--out", str(out)])
    table = written.getvalue()
    if code == 0:
        paper = f"## The paper (arXiv 2009.14794)\n\n{plan.paper}\n\n## What differs\n\n{plan.differs}\n"
        table = f"# {plan.name}\n\n{plan.about}\n\n```\n{table}```\n\n{paper}"
        (out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return code
