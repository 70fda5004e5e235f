"""The program each task of a job runs: ``python -m longseq.launch.slurm.task RUN --start N``. Started by srun.

SLURM has started the processes; here they become the ranks of a training, as :mod:`longseq.training.worker` is one on
this machine. Exit code 0 also where the training was stopped and saved: srun would kill the others for any other code.
How a start ended stands in the run's ``starts/`` (see :mod:`longseq.runs.starts`), where the job script reads it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.config.schema import Config
from longseq.devices import environment_of_place, follow_scheduler, own_device
from longseq.errors import EXIT_CRASHED, EXIT_ERROR, EXIT_GO_ON, EXIT_UNFIT
from longseq.launch.gpu_settings import gpu_settings, recorder_settings
from longseq.launch.local import without_ranks
from longseq.launch.slurm.guard import fork_guard
from longseq.launch.slurm.place import Limits, Place
from longseq.runs import starts
from longseq.runs.checkpoint import Checkpoint, go_back_to, prune, remove_partials
from longseq.runs.code import changed_packages
from longseq.runs.owner import node_name
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.signs import PEER_LOST
from longseq.training.vitals import Vitals, stacks_on_request
from longseq.training.worker import leave, nothing_collected, outcome, quiet, raise_open_files
from longseq_data.cores import cores

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_FINISHED = "finished"
_MOST_LETTERS = 400  # of an error that is shown next to a job
# For SLURM to say which process has died, before the others say that they lost it, and before they end: srun takes the
# first that ends for the cause, and ends the others with a signal.
_CAUSE_SECONDS, _LAST_SECONDS = 2.0, 10.0


def main() -> int:
    stop = StopFlag()
    stop.install()  # first: a signal means "save", however early it comes
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--start", type=int, required=True)
    parser.add_argument("--address", default="", help="of rank 0's node, where that is not the job script's")
    parser.add_argument("overrides", nargs="*")
    Limits.add_arguments(parser)
    args = parser.parse_intermixed_args()
    place = Place.of_slurm(os.environ, args.address, args.start)
    run = Run(args.run, args.start)
    _redirect(run, place.rank)
    become(place)
    ward, port = fork_guard(place.rank, lambda: (run, place))
    stacks_on_request(ward.stacks.fileno())
    vitals = Vitals(ward.theirs, run.trace_of(place.rank))
    os.environ |= recorder_settings(os.environ, run)

    starts.watch(run.starts_dir, run.start, _say)
    try:
        overrides, limits = tuple(args.overrides), Limits.of(args)
        code, sentence = outcome(lambda: _train(run, overrides, place, limits, stop, vitals, port), run)
    except Exception as error:
        traceback.print_exc()
        code, sentence = EXIT_CRASHED, _why(error)
    else:
        if code == PEER_LOST:
            _say(f"rank {place.rank} {sentence}.", "warning")
        elif sentence:
            _say(sentence)
    # The sentence begins with the nodes, where they are to blame: the job's script goes by it.
    verdicts = {
        EXIT_ERROR: f"error {sentence}",
        EXIT_UNFIT: f"preflight {sentence}",
        EXIT_CRASHED: f"crashed rank {place.rank} on {place.node}: {sentence}",
        PEER_LOST: f"crashed rank {place.rank} on {place.node} {sentence}",
    }
    if code == EXIT_CRASHED and "CUDA error" in str(sentence):
        verdicts[code] = f"lost {place.node}: rank {place.rank}: {sentence}"
    if code == PEER_LOST:
        _wait_for_signal(stop, _CAUSE_SECONDS)
    ward.wait_to_be_ended()
    if code in verdicts:
        starts.note_end(run.starts_dir, run.start, verdicts[code])
    if code in (PEER_LOST, EXIT_CRASHED) and place.world > 1:  # a library's error may be a lost peer, too
        _wait_for_signal(stop, _LAST_SECONDS if code == PEER_LOST else _CAUSE_SECONDS)
    if place.rank == 0 and code in (0, EXIT_GO_ON):
        starts.note_end(run.starts_dir, run.start, "saved" if code else _FINISHED)
    return 0 if code == EXIT_GO_ON else code


def _train(
    run: Run, overrides: tuple[str, ...], place: Place, limits: Limits, stop: StopFlag, vitals: Vitals, port: int
) -> int:
    with nothing_collected():
        from torch._C._distributed_c10d import HashStore

        from longseq.launch.slurm import preflight  # noqa: F401 - brings torch
        from longseq.launch.slurm.recall import recall
        from longseq.training import memory_copies
        from longseq.training.collectives import PATIENCE
        from longseq.training.fit import fit

    quiet()
    raise_open_files()
    config = run.config(overrides)
    stop.time_limit = config.time_limit_seconds

    vitals.hang_seconds = config.trainer.hang_seconds if limits.hang_seconds is None else limits.hang_seconds
    follow_scheduler(config)
    vitals.device = str(own_device(config))

    store = gathered(run, config, place, limits, vitals, port)
    if place.rank == 0 and (changed := changed_packages()):
        _say(f"since the run was submitted, packages have changed: {', '.join(changed)}.", "warning")
    vitals.within = None
    if store is not None:
        store.set_timeout(PATIENCE)
    if config.trainer.memory_checkpoint_every:
        vitals.at("looking at copies in memory")
        folder = memory_copies.folder_of(os.environ["SLURM_JOB_ID"])
        os.environ[memory_copies.FOLDER] = str(folder)
        if place.local_rank == 0:
            memory_copies.remove_old(folder)
        keep = config.trainer.keep_checkpoints, config.trainer.keep_best, config.trainer.keep_every
        said = recall(run, place, store or HashStore(), folder, lambda: prune(run.checkpoints_dir, *keep), vitals.at)
        if said:
            _say(f"{said}.", "note")
    vitals.at("looking at data and checkpoints")
    # One looks at the checkpoints, whose sums take their time, and tells the others.
    chosen, origin = _begin(run, config) if place.rank == 0 else ("", "")
    if store is not None:
        os.environ["MASTER_PORT"] = str(store.port)
        if place.rank == 0:
            store.set("origin", origin)
            store.set("checkpoint", chosen)
        chosen, origin = (store.get(name).decode() for name in ("checkpoint", "origin"))
    if chosen == _FINISHED:
        return 0
    checkpoint = Checkpoint(run.checkpoints_dir / chosen) if chosen else None
    finished = fit(run, config, checkpoint, stop, vitals, Path(origin) if origin else None)
    return 0 if finished else EXIT_GO_ON


def gathered(run: Run, config: Config, place: Place, limits: Limits, vitals: Vitals, port: int) -> TCPStore | None:
    """Preflight, by all processes: what they can leave each other messages in; None for one process.

    port: where the guard of rank 0 hears the others.

    Raises:
        UnfitError: naming nodes.
    """
    from longseq.launch.slurm import preflight

    def met(store: TCPStore) -> None:
        if place.rank == 0:
            store.set("guard", f"{place.address}:{port}")
        vitals.hub = store.get("guard").decode()
        vitals.at(f"the first collective. {preflight.LOOK_AT_INTERFACES}")
        vitals.within = limits.seconds

    vitals.at("preflight")
    port_file = starts.path_of(run.starts_dir, run.start, "port")
    try:
        store, line = preflight.meet(place, own_device(config), limits, port_file, met)
    except preflight.NotMetError as error:
        starts.note_end(run.starts_dir, run.start, f"lost {error}")
        raise
    if place.rank == 0:
        print(f"preflight {line}", file=sys.stderr, flush=True)
    return store


def _why(error: Exception) -> str:
    """What a traceback ends with, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_LETTERS]


def _begin(run: Run, config: Config) -> tuple[str, str]:
    """What one process does for all: look at the data, and find where to go on.

    Returns:
        the name of a checkpoint, nothing for a run that has none, or "finished"; and where the weights lie that a run
        without checkpoints begins with, if with any.
    """
    from longseq.data import begin_reading, identities
    from longseq.data_report import check_data
    from longseq.launch.before import check_origin
    from longseq.runs.changes import check_precision
    from longseq.training.deepspeed_settings import check_deepspeed

    run.check_start()
    check_deepspeed(config)
    begin_reading(config)
    check_data(config, begun=True)
    run.check_data(config, identities(config))
    remove_partials(run.checkpoints_dir)
    checkpoint, damaged = run.newest_checkpoint()
    for problem in damaged:
        _say(f"{problem} Going back to the one before it.", "warning")
    if checkpoint is None:
        return "", str(check_origin(config) or "")
    check_precision(checkpoint, config)
    for kept in go_back_to(checkpoint, damaged):
        _say(f"the damaged one is kept as {kept}", "warning")
    if checkpoint.position.step >= config.trainer.max_steps:
        run.mark_finished(checkpoint.position.step)
        return _FINISHED, ""
    return checkpoint.path.name, ""


def _redirect(run: Run, rank: int) -> None:
    """Rank 0 writes to the job's log, every other one to its own."""
    if not rank:
        return
    log = run.rank_log(rank)
    log.parent.mkdir(exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    print(f"longseq: start {run.start}, rank {rank} on {node_name()}", flush=True)


def become(place: Place) -> None:
    """Have libraries find this process's place in its environment, and no other one's."""
    each = place.world // len(place.nodes)
    threads = os.environ.get("SLURM_CPUS_PER_TASK") or max(1, cores() // each)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "TMPDIR" in os.environ:
        Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    for name in os.environ.keys() - without_ranks(os.environ).keys():  # of the shell that submitted, or of srun's PMI
        del os.environ[name]
    os.environ |= {
        "RANK": str(place.rank),
        **environment_of_place(place.local_rank, each, os.environ),
        **gpu_settings(os.environ),
        "NODE_RANK": str(place.rank // each),
        "WORLD_SIZE": str(place.world),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        # DeepSpeed builds some of its operators with ninja, which pip puts next to the interpreter.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def _wait_for_signal(stop: StopFlag, seconds: float) -> None:
    """Until srun ends this process, which has found another one's end, or so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.05)


def _say(sentence: str, kind: str = "error") -> None:
    print(f"longseq: {kind}: {sentence}", file=sys.stderr, flush=True)


def _clean() -> None:
    """The job's own temporary folder goes with it."""
    folder = os.environ.get("TMPDIR", "")
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and folder.endswith(f"/longseq-{job}") and os.environ.get("SLURM_LOCALID") == "0":
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    try:
        ended = main()
    except Exception:  # with its traceback, and no waiting for the others
        traceback.print_exc()
        ended = EXIT_CRASHED
    _clean()
    leave(ended)
