"""Hand work to SLURM: what ``longseq submit`` does, as a function that returns data. No torch here."""

from __future__ import annotations

import copy
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import time as now
from typing import Literal

from longseq.config.loading import load_config
from longseq.config.merging import save_config
from longseq.config.schema import Config
from longseq.config.shipped import located
from longseq.data import fix_order, identities, resolve_sources, vocabulary
from longseq.errors import ConfigError, LongseqError, RunError
from longseq.launch.before import check_benchmarks, check_disk, check_origin, say_cpus, say_schedule
from longseq.launch.shared_work import SHARED, check_writable, keys_of, place_of, words_of
from longseq.launch.slurm import queue
from longseq.launch.slurm.mounts import check_files, check_mounts
from longseq.launch.slurm.queue import SlurmError
from longseq.launch.slurm.render import (
    Request,
    evaluate_script,
    layouts,
    prepare_script,
    shared_script,
    sweep_script,
    train_script,
)
from longseq.launch.slurm.site import Site, load_site
from longseq.launch.slurm.state import SharedJob, check_free, check_unshared, record_job, record_shared
from longseq.measure.memory import estimate, gib
from longseq.runs import code
from longseq.runs.changes import FIXED, check_precision, note_weights, refuse_changes
from longseq.runs.run import Run
from longseq.text_parts import fit_parts
from longseq.trained_model import find, run_of


@dataclass(frozen=True)
class Submission:
    """What was submitted, or would be."""

    script: str
    path: Path  # of the script, where it was submitted; of a job that trains nothing the log has its name with .log
    jobs: tuple[str, ...] = ()  # SLURM's ids, of a chain several; () where nothing was submitted
    runs: tuple[Run, ...] = ()  # of a sweep several; () for an evaluation or a preparation
    memory: str = ""  # what a process of a training needs, in words
    verb: str = ""  # of a job that works with a run and trains nothing
    expected: str = ""  # with test_only: when and where it would start, as sbatch says it


@dataclass(frozen=True)
class _Work:
    """What is submitted at once, and how."""

    script: str
    place: Path  # where the script is kept, and the log of a job that trains nothing, without their ending
    runs: tuple[Run, ...] = ()
    array: bool = False
    memory: str = ""
    codes: Path | None = None  # where the code of a job that trains nothing is kept
    shared: tuple[Run, SharedJob] | None = None  # without its number


@dataclass(frozen=True)
class _How:
    chain: int | None
    current_code: bool
    take_over: bool
    dry_run: bool
    test_only: bool
    command: str

    @property
    def looks(self) -> bool:
        """Whether nothing is to be made."""
        return self.dry_run or self.test_only


def submit(
    target: str | Path,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    devices: int | None = None,
    min_nodes: int | None = None,
    spares: int = 0,
    site: str | None = None,
    time: str | None = None,
    dependency: str | None = None,
    array: Sequence[Sequence[str]] = (),
    at_once: int | None = None,
    chain: int | None = None,
    job: Literal["train", "evaluate", "prepare", "embed", "score", "benchmark"] = "train",
    current_code: bool = False,
    take_over: bool = False,
    dry_run: bool = False,
    test_only: bool = False,
    command: str = "longseq.submit",
) -> Submission:
    """Submit a training, which comes back by itself until its run is finished, an evaluation or a preparation.

    Args:
        target: a configuration (a file, or a name of ``longseq configs``) for a new run, or a run's folder.
        overrides: ``section.key=value``; of embed, score and benchmark the verb's words without the model, as
            ``["proteins.fasta", "--out", "vectors.parquet"]`` or ``["proteingym", "gym", "--assay", "GB1_2014"]``.
        nodes: machines; default: trainer.nodes.
        devices: processes of a node, one a GPU where there are any; default: the site's, else trainer.devices.
        min_nodes: also start with as few, when no more are there.
        spares: ask for so many nodes more, where there are any: idle until one takes the place of a lost or unfit one.
        site: the cluster's profile, a file or the name of one that ships; default: $LONGSEQ_SITE.
        time: limit of one start, ``24h``; default: the site's.
        dependency: as sbatch has it, ``afterok:1234``.
        array: a sweep: the overrides of each of its runs.
        at_once: jobs of an array that run at a time.
        chain: so many jobs one after another, where jobs may not come back.
        job: or prepare the corpus of a configuration, or evaluate a run, or embed, score or benchmark with it: these
            three by the processes of all nodes, to the same bytes for any number of them.
        current_code: go on with a run by today's code, and not that of its submission.
        take_over: start although what had the run cannot be asked whether it still trains.
        dry_run: give the script, and make nothing.
        test_only: ask sbatch when and where it would start, and make nothing.
        command: what the run's folder says it was submitted by.

    Raises:
        LongseqError, DataError: in one sentence, for what cannot be trained, and where SLURM refuses; of a new run
            nothing is left then.
    """
    profile, path = load_site(site), Path(target)
    if time:
        profile = replace(profile, time=time)
        profile.check()
    how = _How(chain, current_code, take_over, dry_run, test_only, command)
    if job != "train" and spares:
        raise ConfigError(f"--spares={spares}: only a training has spares; leave it out with --job={job}.")
    if job in SHARED:
        if chain or array or min_nodes is not None:
            raise ConfigError(
                f"--job={job}: --chain, --array and --min-nodes are for trainings; leave them out: submitted again, it "
                "goes on behind what is finished."
            )
        return _send(_shared(path, job, overrides, profile, nodes or 1, devices, dependency, how), how)
    if job == "evaluate":
        return _send(_evaluation(path, overrides, profile, how), how)
    if job == "prepare":
        return _send(_preparation(path, overrides, profile, nodes or 1), how)
    if chain and array:
        raise ConfigError("--chain and --array: an array's jobs come back by themselves; leave --chain out.")
    if any(word.startswith(("run.name=", "run.dir=")) for member in array for word in member):
        raise ConfigError("--array: run.name and run.dir are one for all; each run gets a number behind its name.")
    run = Run.open(path) if (path / "config.yaml").is_file() else None
    if run and array:
        raise ConfigError(f"--array: a sweep makes new runs, and {target} is one: give a configuration.")
    described = run.config() if run else load_config(path, list(overrides))
    nodes = nodes or described.trainer.nodes
    per_node = devices or profile.gpus_per_node or described.trainer.devices
    given = [*overrides, f"trainer.nodes={nodes}", f"trainer.devices={per_node}"]
    if run:
        described = run.config(tuple(given))
    request = Request(
        nodes=nodes,
        devices=per_node,
        gpus=described.trainer.accelerator != "cpu" and bool(devices or profile.gpus_per_node),
        min_nodes=min_nodes,
        spares=spares,
        dependency=dependency,
        comes_back=not chain,
        at_once=at_once,
        code=_code(profile, run, current_code),
    )
    _check_request(request, profile)
    if run:
        return _go_on(run, given, profile, request, how)
    return _begin(path, [[*given, *member] for member in array or [()]], profile, request, how, sweep=bool(array))


def _begin(
    path: Path, members: Sequence[list[str]], site: Site, request: Request, how: _How, *, sweep: bool
) -> Submission:
    configs = [load_config(path, member) for member in members]
    for config in configs:
        _check(config, site, request)
        fit_parts(config)
        fix_order(config)
    shared = [layouts(config, request.nodes, request.least, request.devices) for config in configs]
    if any(layout != shared[0] for layout in shared):
        raise ConfigError("--array: jobs of one array share a step in the same way; submit these runs one by one.")
    first = Run.new(configs[0], default_name=path.stem)
    for number, config in enumerate(configs if sweep else ()):
        config.run.name = f"{first.path.name}-{number}"
    planned = [Run.new(config, default_name=path.stem) for config in configs]
    for config, new in zip(configs, planned, strict=True):
        check_disk(config, new.path)
        check_mounts(site, config, new.path)
    if sweep:
        script = sweep_script(first.path.name, [new.path for new in planned], configs[0], site, request)
    else:
        script = train_script(first.path, configs[0], site, request)
    made: list[Run] = []
    try:
        if not how.looks:
            for config in configs:
                made.append(Run.create(config, default_name=path.stem))
                made[-1].record_data(identities(config))
                made[-1].slurm_dir.mkdir()
                if request.code:
                    code.keep(made[-1])
        memory = estimate(configs[0], vocabulary(configs[0]).size).line()
        return _send(_Work(script, planned[0].slurm_dir / "train", tuple(planned), sweep, memory), how)
    except LongseqError:
        for new in made:
            new.discard_if_untrained()
        raise


def _go_on(run: Run, given: list[str], site: Site, request: Request, how: _How) -> Submission:
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
    note_weights(before, config, newest.position.samples if newest else 0, waits=bool(request.dependency))
    check_disk(config, run.path)
    check_mounts(site, config, run.path)
    memory = estimate(config, vocabulary(config).size).line()
    work = _Work(train_script(run.path, config, site, request), run.slurm_dir / "train", (run,), memory=memory)
    if how.looks:
        return _send(work, how)
    with run.locked():  # no training on this machine has it
        check_free(run, take_over=how.take_over, after=bool(request.dependency))
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
            return _send(work, how)
        except SlurmError:
            save_config(before, run.config_path)
            raise


def _code(site: Site, run: Run | None, current: bool) -> str:
    """Which code a training runs: of a new run, or one without a copy, today's; else that of its submission."""
    if site.container != "none":
        return ""
    if run is None or current:
        return code.current()
    return code.kept(run) or code.current()


def _check(config: Config, site: Site, request: Request) -> None:
    if config.trainer.accelerator == "auto" and not request.gpus:
        raise ConfigError(
            "trainer.accelerator=auto, but the job asks for no GPU and would train on CPUs: give --gpus-per-node=G (or "
            "gpus_per_node in the site's profile), or trainer.accelerator=cpu. Where nodes have GPUs that nobody asks "
            "for, trainer.accelerator=cuda."
        )
    for there, layout in layouts(config, request.nodes, request.least, request.devices).items():
        fewer = copy.deepcopy(config)
        fewer.trainer.nodes, fewer.trainer.accumulate = layout.nodes, layout.accumulate
        try:
            fewer.check()
        except ConfigError as error:
            raise ConfigError(f"with {there} of {request.nodes} nodes: {error}") from None
    resolve_sources(config)
    check_origin(config)
    check_benchmarks(config)
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


def _evaluation(path: Path, overrides: Sequence[str], site: Site, how: _How) -> _Work:
    run = Run.open(path)
    config = run.config(tuple(overrides))
    gpus = config.trainer.accelerator != "cpu" and bool(site.gpus_per_node)
    request = Request(1, 1, gpus, code=_code(site, None, current=True))
    say_cpus(config, gpus)
    if not how.looks:
        run.slurm_dir.mkdir(exist_ok=True)
    shared = run, SharedJob("", "evaluate", str(run.evaluations_dir), how.command, "")
    script = evaluate_script(run.path, list(overrides), site, request)
    codes = run.path / "code" if request.code else None
    return _Work(script, run.slurm_dir / "evaluate", codes=codes, shared=shared)


def _shared(
    path: Path,
    verb: str,
    words: Sequence[str],
    site: Site,
    nodes: int,
    devices: int | None,
    dependency: str | None,
    how: _How,
) -> _Work:
    run = run_of(path)
    config = run.config(keys_of(words))
    per_node = devices or site.gpus_per_node or config.trainer.devices
    gpus = config.trainer.accelerator != "cpu" and bool(devices or site.gpus_per_node)
    own = _code(site, None, current=True)
    request = Request(nodes, per_node, gpus=gpus, dependency=dependency, by_node=True, code=own)
    _check_request(request, site)
    say_cpus(config, gpus)
    if not dependency:  # of a training that still runs it may be the first checkpoint
        find(path, sums=False)
    place = place_of(run, verb, words)
    check_files(site, words, (run.path.parent, place.parent))
    if not how.looks:
        check_writable(run)
        check_unshared(run, place)
        run.slurm_dir.mkdir(exist_ok=True)
    script = shared_script(run.path, verb, words_of(verb, path.resolve(), words), place, site, request)
    shared = run, SharedJob("", verb, str(place), how.command, "")
    return _Work(script, run.slurm_dir / verb, codes=run.path / "code" if own else None, shared=shared)


def _preparation(path: Path, overrides: Sequence[str], site: Site, nodes: int) -> _Work:
    from longseq.config.flat import load_flat
    from longseq_data.prepare.config import PrepareConfig

    load_flat(PrepareConfig, path, list(overrides), "longseq data prepare --help").check()
    config = located(path).absolute()
    here = Path.cwd() / f"prepare-{config.stem}"
    # The job's working folder is this one, so relative paths mean the same there.
    request = Request(nodes, 1, gpus=False, code=_code(site, None, current=True))
    script = prepare_script(config, list(overrides), here, site, request)
    return _Work(script, here, codes=here.with_name(f"{here.name}.code") if request.code else None)


def _send(work: _Work, how: _How) -> Submission:
    """Show, try or submit a script: of a chain several times, each after the one before."""
    path = work.place.with_name(f".{work.place.name}-{secrets.token_hex(4)}.sbatch")  # two may submit at once
    shown = Submission(
        work.script, path, runs=work.runs, memory=work.memory, verb=work.shared[1].verb if work.shared else ""
    )
    if how.looks:
        return shown if how.dry_run else replace(shown, expected=queue.test_only(work.script))
    ids: list[str] = []
    if work.codes:
        code.keep_in(work.codes)
    for _ in range(how.chain if work.runs and how.chain else 1):
        path.write_text(work.script, encoding="utf-8")
        after = (f"--dependency=afterany:{ids[-1]}",) if ids else ()
        try:
            number = queue.submit(path, *after)
            ids.append(number)
            if work.shared:
                run, job = work.shared
                record_shared(run, replace(job, job=number, script=str(path), time=round(now())))
            for index, run in enumerate(work.runs):
                record_job(run, f"{number}_{index}" if work.array else number, how.command, path)
            path.rename(work.place.with_name(f"{work.place.name}-{number}.sbatch"))
        except BaseException:  # a job that is in no run's folder would train without an owner
            if ids:
                queue.cancel(ids)
            path.unlink()
            raise
    return replace(shown, path=work.place.with_name(f"{work.place.name}-{ids[0]}.sbatch"), jobs=tuple(ids))
