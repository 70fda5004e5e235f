"""Jobs on nodes of eight GPUs, however a scheduler shows them: every process takes its own, before it talks of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from gpu_machine import GPUS, GpuMachine
from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.devices import check_devices, environment_of_place, follow_scheduler, own_device, reading_device
from longseq.errors import ConfigError
from longseq.launch.local import environment_of, free_port
from longseq.launch.slurm import task as slurm_task
from longseq.launch.slurm.place import Place
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import build_trainer

MIG = [f"MIG-{number}" for number in range(GPUS)]
# What CUDA_VISIBLE_DEVICES is for the task with this number on its node, and the device that must be its.
LAYOUTS = {
    "all GPUs of the node": (lambda task: None, lambda task: task),
    "all by their UUIDs": (lambda task: ",".join(f"GPU-{n}" for n in range(GPUS)), lambda task: task),
    "one GPU a task": (lambda task: "0", lambda task: 0),
    "one UUID a task": (lambda task: f"GPU-{task}", lambda task: 0),
    "one MIG instance a task": (lambda task: MIG[task], lambda task: 0),
    "all MIG instances": (lambda task: ",".join(MIG), lambda task: 0),
    "the GPUs of a socket": (lambda task: "0,1,2,3" if task < 4 else "4,5,6,7", lambda task: task % 4),
}
STRATEGIES = {
    "single": ("trainer.strategy=single",),
    "ddp": ("trainer.strategy=ddp",),
    "ddp bf16": ("trainer.strategy=ddp", "trainer.precision=bf16"),
    "ddp fp16": ("trainer.strategy=ddp", "trainer.precision=fp16"),
    **{f"ZeRO-{stage}": (f"trainer.zero_stage={stage}",) for stage in range(4)},
    "ZeRO-2 bf16": ("trainer.zero_stage=2", "trainer.precision=bf16"),
    "ZeRO-1 fp16": ("trainer.zero_stage=1", "trainer.precision=fp16"),
    "ZeRO-2 offload": ("trainer.zero_stage=2", "trainer.offload_optimizer=cpu"),
    "ZeRO-3 offload bf16": (
        *("trainer.zero_stage=3", "trainer.offload_optimizer=cpu", "trainer.offload_params=cpu"),
        "trainer.precision=bf16",
    ),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with GpuMachine() as machine:
        yield machine
    rank_zero_only.rank = 0


def config_of(*overrides: str, nodes: int = 2, devices: int = GPUS) -> Config:
    sizes = (
        f"trainer.nodes={nodes}",
        f"trainer.devices={devices}",
        "data.batch_tokens=256",
        "trainer.accelerator=cuda",
    )
    return load_config("small.yaml", [f"data.train={Path.cwd()}/proteins.fasta", *sizes, *overrides])


def become(task: int, node: int, layout: str, config: Config) -> None:
    """This process is a task of a job, as far as the environment tells."""
    shown = LAYOUTS[layout][0](task)
    if shown is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = shown
    nodes = tuple(f"node{number}" for number in range(config.trainer.nodes))
    world = len(nodes) * config.trainer.devices
    slurm_task.become(Place(node * config.trainer.devices + task, task, world, nodes, "127.0.0.1", 29999))
    follow_scheduler(config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trainer_takes_its_own_gpu_before_the_group_is_formed(folder, machine, layout, strategy):
    nodes, devices, task, node = (1, 1, 0, 0) if strategy == "single" else (2, GPUS, 5, 1)
    config = config_of(*STRATEGIES[strategy], nodes=nodes, devices=devices)
    become(task, node, layout, config)
    check_devices(config)
    trainer = build_trainer(Run.create(config, default_name="one"), config, StopFlag(), None)
    own = f"cuda:{LAYOUTS[layout][1](task)}"
    assert str(trainer.strategy.root_device) == str(own_device(config)) == own
    assert (trainer.global_rank, trainer.world_size) == (node * devices + task, nodes * devices)
    groups = []
    forms = {"side_effect": lambda *_, **__: groups.append(len(machine.calls))}
    with mock.patch("torch.distributed.init_process_group", **forms), mock.patch("deepspeed.init_distributed", **forms):
        trainer.strategy.setup_environment()
    assert machine.calls[-1] == ("set_device", own)
    assert groups == ([] if strategy == "single" else [1])  # the device was set before
    assert f"cuda:{os.environ['LOCAL_RANK']}" == own  # which DeepSpeed goes by
    if layout == "all MIG instances" and devices > 1:
        assert machine.visible() == [MIG[task]]


PREFLIGHT = """
import json, os, sys
import torch.distributed as dist
from types import SimpleNamespace
from gpu_machine import GpuMachine
from longseq.config.schema import Config
from longseq.devices import follow_scheduler, own_device
from longseq.launch.slurm.place import Limits, Place
from longseq.launch.slurm.preflight import UnfitError, meet
from longseq.launch.slurm import task as slurm_task

task, config = int(sys.argv[1]), Config()
config.trainer.devices, config.trainer.accelerator = 2, "cuda"
for port, shown in zip(map(int, sys.argv[3:]), json.loads(sys.argv[2])):
    os.environ["CUDA_VISIBLE_DEVICES"] = shown
    place = Place(task, task, 2, ("node1",), "127.0.0.1", port)
    slurm_task.become(place)
    with GpuMachine() as machine:
        follow_scheduler(config)
        try:
            line = meet(place, own_device(config), Limits(clock_seconds=1000))[1]
        except UnfitError as error:
            line = str(error)
    print(json.dumps([line, machine.calls]), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
os._exit(0)
"""


def test_preflight_forms_its_group_on_the_device_of_each_task():
    shown = [["0,1", "0", "MIG-a,MIG-b", "0"], ["0,1", "1", "MIG-a,MIG-b", "0"]]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")))
    ports = [str(free_port()) for _ in range(4)]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", PREFLIGHT, str(task), json.dumps(shown[task]), *ports],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    said = [[json.loads(line) for line in task.communicate(timeout=120)[0].splitlines()] for task in tasks]
    for task in range(2):
        for (line, calls), device in zip(said[task][:3], (f"cuda:{task}", "cuda:0", "cuda:0"), strict=True):
            assert line.startswith("2 processes on node1; nccl: an all-reduce")
            assert calls[:2] == [["set_device", device], ["init nccl", device]]
        line, calls = said[task][3]
        assert line.startswith("node1: rank 0, 1 have the same GPU (GPU-0): let each task see all GPUs")
        assert calls == []


@pytest.mark.parametrize("asked", ["high", "highest", "medium"])
def test_fp32_products_are_tf32_on_gpus_alone(folder, machine, monkeypatch, asked):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for accelerator in ("cpu", "cuda"):
        precision = () if asked == "high" else (f"trainer.float32_matmul_precision={asked}",)
        config = config_of(
            f"trainer.accelerator={accelerator}", "trainer.strategy=single", *precision, nodes=1, devices=1
        )
        build_trainer(Run.create(config, default_name=accelerator), config, StopFlag(), None)
    assert said == [asked]


def test_fewer_gpus_than_processes_of_this_machine_are_refused(folder, machine):
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    os.environ |= environment_of(rank=0, world=GPUS, port=1)
    with pytest.raises(ConfigError, match=r"trainer.devices=8, but there are 1 GPUs here: set trainer.devices=1\."):
        check_devices(config_of(nodes=1))


def test_every_process_of_this_machine_is_shown_its_own_mig_instance():
    shown = {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}
    assert environment_of_place(1, 2, shown) == {
        "CUDA_VISIBLE_DEVICES": "MIG-b",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    third = environment_of_place(2, 3, shown)
    assert (third["CUDA_VISIBLE_DEVICES"], third["LOCAL_RANK"], third["LOCAL_WORLD_SIZE"]) == ("MIG-a", "1", "2")
    assert environment_of_place(3, 8, {}) == {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}


def test_evaluations_take_gpus_in_turns(machine):
    os.environ |= {"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "3"}
    assert reading_device("auto") == "cuda:1"
    assert reading_device("cpu") == "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_available()
    assert reading_device("auto") == "cpu"
