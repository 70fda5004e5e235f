"""Submit a training to a SLURM cluster: a configuration for a new run, or a run's folder to go on with it.

Everything that can be checked is checked first; the job comes back by itself until the run is finished.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from longseq.commands.key_help import help_on_flat_keys
from longseq.commands.numbers import natural, positive
from longseq.commands.options import TAKE_OVER_HELP
from longseq.config.loading import load_config, save_config
from longseq.config.schema import Config
from longseq.config.shipped import located
from longseq.data import fix_order, identities, resolve_sources, vocabulary
from longseq.errors import ConfigError, LongseqError, RunError
from longseq.launch.before import check_disk, check_origin, say_schedule
from longseq.launch.slurm import queue
from longseq.launch.slurm.mounts import check_mounts
from longseq.launch.slurm.queue import SlurmError
from longseq.launch.slurm.render import (
    Request,
    evaluate_script,
    layouts,
    prepare_script,
    sweep_script,
    train_script,
)
from longseq.launch.slurm.site import Site, load_site
from longseq.launch.slurm.state import check_free, record_job
from longseq.measure.memory import estimate, gib
from longseq.runs import code
from longseq.runs.changes import FIXED, check_precision, note_weights, refuse_changes
from longseq.runs.run import Run, as_typed
from longseq.text_parts import fit_parts


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
        choices=("train", "evaluate", "prepare"),
        default="train",
        help="evaluate RUN, or prepare a corpus of CONFIG, with the key=value of `longseq evaluate` and `data prepare`",
    )
    parser.add_argument(
        "--current-code", action="store_true", help="go on with RUN by today's code, and not that of its submission"
    )
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER_HELP)
    parser.add_argument("--dry-run", action="store_true", help="show the script, and make nothing")
    parser.add_argument("--test-only", action="store_true", help="ask sbatch when and where it would start; no more")
    parser.epilog = "keys of a site's profile (see slurm/sites/example.yaml):\n" + help_on_flat_keys(Site)


def run(args: argparse.Namespace) -> int:
    site = load_site(args.site)
    if args.time:
        site = replace(site, time=args.time)
        site.check()
    if args.job == "train":
        return _training(args, site)
    if args.spares:
        raise ConfigError(f"--spares={args.spares}: only a training has spares; leave it out with --job={args.job}.")
    job = _evaluation(args, site) if args.job == "evaluate" else _preparation(args, site)
    return _submit(args, [job])


@dataclass(frozen=True)
class _Job:
    """What is submitted at once."""

    script: str
    place: Path  # where the script is kept, and the log of a job that trains nothing, without their ending
    runs: tuple[Run, ...] = ()
    array: bool = False


def _training(args: argparse.Namespace, site: Site) -> int:
    if args.chain and args.array:
        raise ConfigError("--chain and --array: an array's jobs come back by themselves; leave --chain out.")
    resuming = (args.target / "config.yaml").is_file()
    if resuming and args.array:
        raise ConfigError(f"--array: a sweep makes new runs, and {args.target} is one: give a configuration.")
    members = _members(args.array) if args.array else [[]]
    described = Run.open(args.target).config() if resuming else load_config(args.target, args.overrides)
    nodes = args.nodes or described.trainer.nodes
    devices = args.devices or site.gpus_per_node or described.trainer.devices
    given = [*args.overrides, f"trainer.nodes={nodes}", f"trainer.devices={devices}"]
    if resuming:
        described = Run.open(args.target).config(tuple(given))
    request = Request(
        nodes=nodes,
        devices=devices,
        gpus=described.trainer.accelerator != "cpu" and bool(args.devices or site.gpus_per_node),
        min_nodes=args.min_nodes,
        spares=args.spares,
        dependency=args.dependency,
        comes_back=not args.chain,
        at_once=args.at_once,
        code=_code(args, site, Run.open(args.target) if resuming else None),
    )
    _check_request(request, site)
    if resuming:
        return _go_on(args, site, request, given)

    configs = [load_config(args.target, [*given, *member]) for member in members]
    for config in configs:
        _check(config, site, request)
        fit_parts(config)
        fix_order(config)
    shared = [layouts(config, nodes, request.least, devices) for config in configs]
    if any(layout != shared[0] for layout in shared):
        raise ConfigError("--array: jobs of one array share a step in the same way; submit these runs one by one.")
    first = Run.new(configs[0], default_name=args.target.stem)
    for number, config in enumerate(configs if args.array else ()):
        config.run.name = f"{first.path.name}-{number}"
    planned = [Run.new(config, default_name=args.target.stem) for config in configs]
    for config, new in zip(configs, planned, strict=True):
        check_disk(config, new.path)
        check_mounts(site, config, new.path)
    if args.array:
        script = sweep_script(first.path.name, [new.path for new in planned], configs[0], site, request)
    else:
        script = train_script(first.path, configs[0], site, request)
    made: list[Run] = []
    try:
        if not (args.dry_run or args.test_only):
            for config in configs:
                made.append(Run.create(config, default_name=args.target.stem))
                made[-1].record_data(identities(config))
                made[-1].slurm_dir.mkdir()
                if request.code:
                    code.keep(made[-1])
        place = planned[0].slurm_dir / "train"
        job = _Job(script, place, tuple(planned), array=bool(args.array))
        return _submit(args, [job] * (args.chain or 1), estimate(configs[0], vocabulary(configs[0]).size).line())
    except LongseqError:
        for new in made:
            new.discard_if_untrained()
        raise


def _go_on(args: argparse.Namespace, site: Site, request: Request, given: list[str]) -> int:
    run = Run.open(args.target)
    before, config = run.config(), run.config(tuple(given))
    _check(config, site, request)
    refuse_changes(before, config, run, FIXED)
    # Sizes alone: the job takes the sums of what may be hundreds of gigabytes.
    newest, damaged = run.newest_checkpoint(sums=False)
    for problem in damaged:
        print(f"longseq: warning: {problem} Going back to the one before it.", file=sys.stderr)
    if newest:
        check_precision(newest, config)
        if newest.step >= config.trainer.max_steps:
            raise RunError(
                f"{run.path}: finished at step {newest.step}. To train on, raise the last step: "
                f"trainer.max_steps={2 * newest.step}."
            )
        say_schedule(before, config, newest.step)
    note_weights(before, config, newest.position.samples if newest else 0, waits=bool(args.dependency))
    check_disk(config, run.path)
    check_mounts(site, config, run.path)
    job = _Job(train_script(run.path, config, site, request), run.slurm_dir / "train", (run,))
    line = estimate(config, vocabulary(config).size).line()
    if args.dry_run or args.test_only:
        return _submit(args, [job], line)
    with run.locked():  # no training on this machine has it
        check_free(run, take_over=args.take_over, after=bool(args.dependency))
        data = identities(config)
        if not config.data.accept_changes:
            run.check_data(config, data)
        config.data.accept_changes = False
        run.slurm_dir.mkdir(exist_ok=True)
        save_config(config, run.config_path)
        run.record_data(data)
        run.mark_finished(None)
        if request.code == code.current():
            code.keep(run)
        (run.path / "STOPPED").unlink(missing_ok=True)
        for crash in run.starts_dir.glob("*.crash"):  # counted anew: somebody has looked
            crash.unlink()
        try:
            return _submit(args, [job] * (args.chain or 1), line)
        except SlurmError:
            save_config(before, run.config_path)
            raise


def _code(args: argparse.Namespace, site: Site, run: Run | None) -> str:
    """Which code a training runs: of a new run, or one without a copy, today's; else that of its submission."""
    if site.container != "none":
        return ""
    if run is None or args.current_code:
        return code.current()
    return code.kept(run) or code.current()


def _check(config: Config, site: Site, request: Request) -> None:
    if config.trainer.accelerator == "auto" and not request.gpus:
        raise ConfigError(
            "trainer.accelerator=auto, but the job asks for no GPU and would train on CPUs: give --gpus-per-node=G (or "
            "gpus_per_node in the site's profile), or trainer.accelerator=cpu. Where nodes have GPUs that nobody asks "
            "for, trainer.accelerator=cuda."
        )
    resolve_sources(config)
    check_origin(config)
    if site.gpu_memory_gib and request.gpus:
        needed = estimate(config, vocabulary(config).size)
        if needed.peak > site.gpu_memory_gib * 2**30:
            raise ConfigError(
                f"a process needs {needed.line()}, and a GPU has {gib(site.gpu_memory_gib * 2**30)} "
                "(gpu_memory_gib of the site's profile): raise trainer.accumulate or trainer.zero_stage, set "
                "trainer.activation_checkpointing=true, or lower data.length."
            )


def _check_request(request: Request, site: Site) -> None:
    if request.min_nodes is not None and request.min_nodes > request.nodes:
        raise ConfigError(f"--min-nodes={request.min_nodes} is more than --nodes={request.nodes}.")
    if request.gpus and site.gpus_per_node and request.devices > site.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node={request.devices}, but a node has {site.gpus_per_node} (gpus_per_node of the site's "
            "profile): take more nodes."
        )


def _evaluation(args: argparse.Namespace, site: Site) -> _Job:
    run = Run.open(args.target)
    config = run.config(tuple(args.overrides))
    devices = 1
    request = Request(1, devices, gpus=config.trainer.accelerator != "cpu" and bool(site.gpus_per_node))
    if config.trainer.accelerator == "auto" and not request.gpus:
        print(
            "longseq: warning: trainer.accelerator=auto, but the job asks for no GPU (gpus_per_node of the site's "
            "profile): it scores on CPUs.",
            file=sys.stderr,
        )
    if not (args.dry_run or args.test_only):
        run.slurm_dir.mkdir(exist_ok=True)
    return _Job(evaluate_script(run.path, args.overrides, site, request), run.slurm_dir / "evaluate")


def _preparation(args: argparse.Namespace, site: Site) -> _Job:
    from longseq.config.flat import load_flat
    from longseq_data.prepare.config import PrepareConfig

    wanted = load_flat(PrepareConfig, args.target, args.overrides, "longseq data prepare --help")
    wanted.check()
    config = located(args.target).absolute()
    here = Path.cwd() / f"prepare-{config.stem}"
    request = Request(args.nodes or 1, 1, gpus=False)
    # The job's working folder is this one, so relative paths mean the same there.
    script = prepare_script(config, args.overrides, here.with_name(f"{here.name}-%j.log"), site, request)
    return _Job(script, here)


def _submit(args: argparse.Namespace, jobs: list[_Job], memory: str = "") -> int:
    """Show, try or submit scripts, each after the one before, and say what came of it."""
    if args.dry_run:
        print(jobs[0].script, end="")
        return 0
    if args.test_only:
        print(queue.test_only(jobs[0].script))
        return 0
    ids: list[str] = []
    for job in jobs:
        path = job.place.with_name(f".{job.place.name}.sbatch")
        path.write_text(job.script, encoding="utf-8")
        after = (f"--dependency=afterany:{ids[-1]}",) if ids else ()
        try:
            number = queue.submit(path, *after)
            ids.append(number)
            command = shlex.join(["longseq", *sys.argv[1:]])
            for index, run in enumerate(job.runs):
                record_job(run, f"{number}_{index}" if job.array else number, command, path)
            path.rename(job.place.with_name(f"{job.place.name}-{number}.sbatch"))
        except BaseException:  # a job that is in no run's folder would train without an owner
            if ids:
                queue.cancel(ids)
            path.unlink()
            raise
    print(f"job     {', '.join(ids)}")
    runs = jobs[0].runs
    if not runs:
        kept = jobs[0].place.with_name(f"{jobs[0].place.name}-{ids[0]}")
        print(f"script  {as_typed(kept.with_name(f'{kept.name}.sbatch'))}")
        print(f"log     {as_typed(kept.with_name(f'{kept.name}.log'))}")
        return 0
    print(f"run     {as_typed(runs[0].path)}{f' to {runs[-1].path.name}' if len(runs) > 1 else ''}")
    print(f"memory  {memory}")
    used = code.kept(runs[0])
    if used:
        whose = "" if used == code.current() else ", of the first submission (--current-code takes today's)"
        print(f"code    {used}{whose}")
    print(f"Follow it:     longseq logs -f {as_typed(runs[0].path)}")
    print(f"State:         longseq jobs --dir {as_typed(runs[0].path.parent)}")
    print(f"Look at it:    tensorboard --logdir {as_typed(runs[0].path.parent)}")
    print(f"Cancel it:     longseq cancel {' '.join(as_typed(run.path) for run in runs)}")
    return 0


def _members(arguments: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep."""
    lines = arguments
    if len(arguments) == 1 and Path(arguments[0]).is_file():
        text = Path(arguments[0]).read_text(encoding="utf-8").splitlines()
        lines = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    elif len(arguments) == 1 and "=" not in arguments[0]:
        raise ConfigError(f"--array={arguments[0]}: no such file, and no key=value.")
    try:
        members = [shlex.split(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"--array: {error}: close the quotation.") from None
    if any(word.startswith(("run.name=", "run.dir=")) for member in members for word in member):
        raise ConfigError("--array: run.name and run.dir are one for all; each run gets a number behind its name.")
    return members
