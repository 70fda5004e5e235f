"""What a launcher of one's own has told a process, and where that makes its ranks lie."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from longseq.errors import ConfigError, LongseqError
from longseq.launch import start
from longseq.launch.rank import Meeting, _Process, nodes_of
from longseq.launch.slurm.place import refuse_several_tasks
from longseq.runs import starts
from longseq.runs.checkpoint import partial_path
from longseq.training.callbacks.stopping import StopFlag

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "12345",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_each_launcher_is_understood():
    assert Meeting.of(TORCHRUN) == Meeting(3, 4, 1, "a", 12345, listens=False)
    srun = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    assert Meeting.of(srun) == Meeting(5, 6, 1, "10.0.0.1", 29500, listens=True)
    # Its nodes, where their names resolve: the launching one may be a login node. Each step has a port of its own.
    step = {**srun, "SLURM_STEP_NODELIST": "localhost,b", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    first, second = Meeting.of(step), Meeting.of({**step, "SLURM_STEP_ID": "1"})
    assert (first.address, second.address) == ("localhost", "localhost")
    assert first.port != second.port
    assert Meeting.of({**step, "SLURM_STEP_NODELIST": "a.invalid"}).address == "10.0.0.1"
    # A step of a job: mpirun's word counts, and what srun has told its daemons does not.
    mpirun = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", **srun}
    assert Meeting.of({**mpirun, "MASTER_ADDR": "b"}) == Meeting(0, 2, 1, "b", 29500, listens=True)
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR: not set, .* where rank 0 is. .*mpirun -x MASTER_ADDR=NODE"):
        Meeting.of(mpirun)
    assert Meeting.of({**mpirun, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).address == "127.0.0.1"
    ports = {Meeting.of({**mpirun, "MASTER_ADDR": "b", "OMPI_MCA_ess_base_jobid": job}).port for job in ("1", "2")}
    assert len(ports) == 2


def test_a_process_that_nobody_has_told_its_place_is_refused():
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE, MASTER_ADDR: not set, .* torchrun, mpirun or srun"):
        Meeting.of({"RANK": "0"})


@pytest.mark.parametrize(
    ("told", "nodes"),
    [
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], ("a", "b")),
        ([("a", None), ("a", None), ("b", None), ("b", None)], ("a", "b")),
        ([("a", 0), ("a", 0)], ("a", "a")),  # two agents of torchrun on one machine
        ([("a", None)], ("a",)),
    ],
)
def test_nodes_are_those_of_the_ranks_in_blocks(told, nodes):
    assert nodes_of(told) == nodes


@pytest.mark.parametrize(
    "told",
    [
        [("a", 0), ("b", 0), ("a", 1), ("b", 1)],  # in turn
        [("a", None), ("b", None), ("a", None), ("b", None)],
        [("a", 0), ("a", 1), ("b", 0)],  # unequal
        [("a", 1), ("a", 0)],
    ],
)
def test_ranks_that_are_not_in_equal_blocks_are_refused(told):
    with pytest.raises(ConfigError, match=r"the ranks \(0 on a, .*in blocks"):
        nodes_of(told)


@pytest.mark.parametrize(
    ("verb", "advice"),
    [
        ("fit", "python -m longseq.launch.rank fit CONFIG`"),
        ("resume", "python -m longseq.launch.rank resume RUN`"),
        ("finetune", "Start it once"),
    ],
)
def test_a_launcher_that_starts_a_verb_several_times_is_told_what_to_start(verb, advice):
    with pytest.raises(LongseqError, match=f"longseq {verb}: process 3 of 4 .*{advice}"):
        refuse_several_tasks(TORCHRUN, verb)
    refuse_several_tasks({**TORCHRUN, "WORLD_SIZE": "1"}, verb)


def process(store: HashStore, rank: int, name: str) -> _Process:
    """As one that has met the others, without a guard."""
    made = object.__new__(_Process)
    made.at, made.stop, made.begun = Meeting(rank, 2, rank, "a", 1, listens=False), StopFlag(), False
    made.name, made.call, made.store = name, "", store  # type: ignore[assignment]
    if rank == 0:
        made.call = name
        store.set("longseq/call", name)
    return made


def test_processes_hear_nothing_that_an_earlier_attempt_has_said():
    store = HashStore()
    others = []
    for attempt in ("first", "second"):
        others.append(process(store, 1, f"other of the {attempt}"))
        assert others[-1]._words() is None  # who calls is not there yet, or has ended
        leader = process(store, 0, attempt)
        assert others[-1]._words() is None
        leader.tell({"run": attempt})
        leader.tell({"code": 1})
        assert others[-1]._words() == f'{{"run": "{attempt}"}}'
    assert others[0]._words() == '{"run": "first"}'


@pytest.mark.parametrize("kept", [False, True])
def test_an_attempt_after_another_goes_on_where_that_has_left_a_run(run, monkeypatch, kept):
    store, asked = HashStore(), []
    other, leader = process(store, 1, "other"), process(store, 0, "leader")
    assert other._words() is None
    store.set("longseq/run", str(run.path if kept else run.path / "gone"))
    training = SimpleNamespace(report=[])
    monkeypatch.setattr(start, "begin", lambda config, name, launch: asked.append(("fit", config, name)) or training)
    monkeypatch.setattr(start, "resume", lambda path, words, **how: asked.append((path, words, how)) or training)
    monkeypatch.setattr("longseq.config.loading.load_config", lambda path, words: [str(path), *words])
    words, processes = ["optim.lr=1", "run.branch=one"], ["trainer.nodes=1", "trainer.devices=2"]
    leader.lead(argparse.Namespace(verb="fit", what="a.yaml", overrides=words))
    if kept:
        ((path, given, how),) = asked
        assert (Path(path), given, how["take_over"]) == (run.path, processes, True)
    else:
        assert asked == [("fit", ["a.yaml", *words, *processes], "a")]


def test_a_start_that_is_over_leaves_what_a_newer_one_writes(run, config):
    def lost(run, *_):
        run.checkpoints_dir.mkdir(exist_ok=True)
        for number in (run.start, starts.take(run.starts_dir, "somebody else")):
            partial_path(run.checkpoints_dir, 7, number).mkdir()
        raise LongseqError("cut off")

    with pytest.raises(LongseqError, match="cut off"):
        start._train(run, config, None, None, lost)
    assert partial_path(run.checkpoints_dir, 7, 2).exists()
