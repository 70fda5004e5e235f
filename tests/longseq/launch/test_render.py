"""Job scripts: what they say, and that no value from outside is ever run by a shell."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.launch.slurm.render import (
    Layout,
    Request,
    evaluate_script,
    layouts,
    prepare_script,
    shared_script,
    sweep_script,
    train_script,
)
from longseq.launch.slurm.site import Site, load_site
from longseq.training.memory_copies import folder_of

GOLDEN = Path(__file__).with_name("golden")
NAMES = ["train", "sweep", "chain", "evaluate", "embed", "benchmark", "prepare", "prepare-nodes"]
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "0"}
RUN = Path("/data/runs/uniref50")
CLUSTER = Site(
    partition="gpu",
    account="proj123",
    constraint="h100&ib",
    time="24h",
    cpus_per_task=12,
    memory="0",
    gpus_per_node=8,
    gpu_type="h100",
    modules=["cuda/12.4", "nccl"],
    environment={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's 'quoted'"},
    scratch="/local/a folder",
    sbatch=["--mail-type=FAIL"],
    srun=["--mpi=none"],
)


@pytest.fixture(autouse=True)
def _an_interpreter_for_all_machines(monkeypatch):
    monkeypatch.setattr("sys.executable", "/opt/longseq/bin/python")


def a_config(samples: int = 32, **trainer: object) -> Config:
    config = Config()
    config.data.length, config.data.batch_tokens = 64, 64 * samples
    for name, value in trainer.items():
        setattr(config.trainer, name, value)
    return config


def scripts(site: Site = CLUSTER) -> dict[str, str]:
    """One of each template."""
    config, one = a_config(), Request(1, 1, gpus=False, code="3f2a9c01b7d4")
    many = Request(4, 8, gpus=True, min_nodes=2, spares=1, dependency="afterok:12", code="3f2a9c01b7d4")
    pyxis = replace(site, container="pyxis", container_image="/i/longseq.sqsh", container_mounts=["/data", "/a:/b"])
    apptainer = replace(site, container="apptainer", container_image="/i/longseq.sif", container_mounts=["/data"])
    sweep = [RUN.with_name(f"sweep-{number}") for number in range(3)]
    return {
        "train": train_script(RUN, a_config(64), site, many),
        "sweep": sweep_script("sweep", sweep, a_config(64), pyxis, Request(1, 8, gpus=True, at_once=2)),
        "chain": train_script(RUN, config, replace(site, gpu_request="gres"), Request(2, 2, True, comes_back=False)),
        "evaluate": evaluate_script(RUN, ["data.ood=[a.fasta, 'b c']"], apptainer, Request(1, 1, gpus=True)),
        "embed": shared_script(
            *(RUN, "embed", ["embed", str(RUN), "a b.fasta", "--out", "v.npz"], Path("/w/.v.npz.shards"), site),
            Request(4, 8, gpus=True, dependency="afterok:12", by_node=True, code="3f2a9c01b7d4"),
        ),
        "benchmark": shared_script(
            *(RUN, "benchmark", ["benchmark", "proteingym", "gym", str(RUN)], Path("/w/b.shards")),
            *(replace(apptainer, requeue=False), Request(2, 1, gpus=False, by_node=True, code="3f2a9c01b7d4")),
        ),
        "prepare": prepare_script(Path("/w/uniref50.yaml"), ["workers=32"], Path("/w/p"), site, one),
        "prepare-nodes": prepare_script(Path("/w/web.yaml"), [], Path("/w/p"), site, replace(one, nodes=4)),
    }


@pytest.mark.interfaces
@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_the_one_that_was_looked_at(name, request):
    """After a change of the templates look at what `pytest --update-golden` changes, and commit it."""
    script, golden = scripts()[name], GOLDEN / f"{name}.sbatch"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(script)
    assert script == golden.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_finds_nothing(name):
    for site in (CLUSTER, Site()):
        done = subprocess.run(["shellcheck", "-"], input=scripts(site)[name], capture_output=True, text=True)
        assert done.stdout == ""


def hostile_values(count: int) -> list[str]:
    """Names as nobody should type them; what runs leaves the file WAS_RUN in the working folder."""
    draw = random.Random(6)
    run = ["touch WAS_RUN", ">WAS_RUN", "touch${IFS}WAS_RUN"]
    frames = [
        *("a;{}", "a\n{}\n", "$({})", "`{}`", "a' ; {} ; '", 'a" ; {} ; "', "a && {}", "| {}", "a\r\n{}", "\\$({})"),
        *("'$({})'", '"`{}`"', "${{x:-$({})}}", "a\\\n{}", "#\n{}", "a #; {}", "<({})", "$(({}))", "{{{{ {} }}}}"),
        *("{{% raw %}}\n{}", "EOF\n{}\nEOF", "a\x00{}", "a\u2028{}", "\x1b]0;{}\x07", "-{}", "--x=$({})", "~;{}"),
    ]
    values = dict.fromkeys(frame.format(command) for frame in frames for command in run)
    while len(values) < count:
        values[draw.choice(frames).format(draw.choice(run)) + draw.choice(frames).format(draw.choice(run))] = None
    return list(values)[:count]


def unless_refused(attempt: Callable[[], str]) -> str | None:
    try:
        return attempt()
    except ConfigError:
        return None


def scripts_with(value: str, folder: Path) -> list[str]:
    """Scripts that have a value in every place where one from outside can stand, without those that are refused."""
    everywhere = {"environment": {"A": value}, "scratch": value, "modules": [value], "srun": [f"--x={value}"]}
    inside = {"container": "apptainer", "container_image": value, "container_python": value}
    one = Request(1, 1, gpus=False)
    attempts = [
        lambda: train_script(folder / "run", a_config(), Site(**everywhere, **inside), one),
        lambda: train_script(folder / f"run {value}", a_config(), Site(), one),
        lambda: train_script(folder / "run", a_config(), Site(partition=value, account=value), one),
        lambda: sweep_script("s", [folder / value / "s-0"], a_config(), Site(), one),
        lambda: evaluate_script(folder / "run", [f"data.ood={value}", value], Site(sbatch=[f"--x={value}"]), one),
        lambda: evaluate_script(folder / "run", [f"data.ood={value}", value], Site(**everywhere), one),
        lambda: shared_script(folder / "run", "embed", [value], folder / value, Site(**everywhere), one),
    ]
    return [text for attempt in attempts if (text := unless_refused(attempt)) is not None]


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.long)])
def test_hostile_values_are_refused_or_harmless(tmp_path, every):
    """Whatever is rendered parses, and when it is run with stand-ins for SLURM's commands nothing of the value is."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("srun", "scontrol", "squeue", "module", "sleep", "mkdir"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    (tools / "sleep").write_text("#!/bin/sh\nkill -KILL $PPID\n")  # where no start can be noted, as without mkdir
    for verb in ("evaluate", "embed"):
        (tmp_path / f"run/slurm/{verb}-1.fence").mkdir(parents=True)
    (tmp_path / "run/FINISHED").touch()  # what comes after it is the same in all
    values = hostile_values(200)[::every]
    assert len(values) == 200 // every
    count = 0
    for number, value in enumerate(values):
        texts = scripts_with(value, tmp_path)
        count += len(texts)
        for index, text in enumerate(texts):
            assert all(line.isprintable() for line in text.splitlines() if line.startswith("#SBATCH"))
            (tmp_path / f"{number}-{index}.sbatch").write_text(text)
    assert count > 2 * len(values)  # the others were refused
    # One shell looks at all files; each is parsed, and run, on its own.
    look = 'for f in *.sbatch; do bash -n "$f" || echo "BAD $f"; (. "./$f") >/dev/null 2>&1; done; true'
    done = subprocess.run(
        ["bash", "-c", look],
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_RESTART_COUNT": "1", **JOB},
        capture_output=True,
        text=True,
    )
    assert "BAD" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert not list(tmp_path.rglob("WAS_RUN"))


def test_the_hostile_values_would_be_noticed(tmp_path):
    """The proof above can fail: without quotes some of them run."""
    for value in hostile_values(200):
        if "\x00" not in value:
            subprocess.run(["bash", "-c", f"true {value}"], cwd=tmp_path, capture_output=True, timeout=60)
        if (tmp_path / "WAS_RUN").exists():
            return
    pytest.fail("none of the values ran")


@pytest.mark.parametrize("value", ["a\nb", 'a"b', "a'b", "a\\b", "a\tb"])
def test_a_directive_that_sbatch_would_misread_is_refused(value):
    with pytest.raises(ConfigError, match=r"--partition=.*leave it out"):
        train_script(RUN, a_config(), Site(partition=value), Request(1, 1, False))


def test_a_path_with_a_pattern_of_sbatchs_is_refused():
    with pytest.raises(ConfigError, match="sbatch would replace the %"):
        train_script(Path("/data/100%/run"), a_config(), Site(), Request(1, 1, False))


@pytest.mark.parametrize("text", ["after 1", "afterok:x", "afterok:1;true", "--x", ""])
def test_a_dependency_that_sbatch_does_not_know_is_refused(text):
    with pytest.raises(ConfigError, match="write it as sbatch does"):
        train_script(RUN, a_config(), Site(), Request(1, 1, False, dependency=text))


@pytest.mark.parametrize("argument", ["--nodes=3", "--output=x", "--signal=INT"])
def test_a_profile_cannot_contradict_submit(argument):
    with pytest.raises(ConfigError, match="is set from another key"):
        train_script(RUN, a_config(), Site(sbatch=[argument]), Request(1, 1, False))


def test_fewer_nodes_do_the_same_step_in_more_batches():
    found = layouts(a_config(32), nodes=4, min_nodes=1, devices=4)  # 2 sequences a process
    assert found == {4: Layout(4, 1), 3: Layout(2, 2), 2: Layout(2, 2), 1: Layout(1, 4)}
    for layout in found.values():
        assert layout.nodes * 4 * layout.accumulate * 2 == 32


def head(request: Request, site: Site) -> list[str]:
    words = ("nodes", "ntasks", "cpus", "no-kill")
    lines = (line.removeprefix("#SBATCH --") for line in train_script(RUN, a_config(), site, request).splitlines())
    return [line for line in lines if line.startswith(words)]


def test_spares_are_asked_for_where_there_are_any():
    four = Site(cpus_per_task=4)
    assert head(Request(2, 2, False), four) == ["nodes=2", "ntasks-per-node=2", "cpus-per-task=4"]
    asked = head(Request(2, 2, False, spares=1), four)
    assert asked == ["nodes=2-3", "ntasks-per-node=2", "cpus-per-task=4", "no-kill"]


def test_a_range_of_nodes_is_not_cut_by_a_count_of_tasks():
    """SLURM gives no more nodes than --ntasks-per-node times the fewest."""
    asked = head(Request(2, 2, False, min_nodes=1, spares=1), Site(cpus_per_task=4))
    assert asked == ["nodes=1-3", "cpus-per-task=8", "no-kill"]
    request = Request(2, 1, False, spares=1)
    assert head(request, Site()) == ["nodes=2-3", "cpus-per-task=1", "no-kill"]
    assert " --cpus-per-task=1 " in train_script(RUN, a_config(), Site(), request)


def test_fewer_nodes_keep_groups_whole():
    config = a_config(32, context_parallel=8)
    found = layouts(config, nodes=4, min_nodes=2, devices=4)  # 2 groups of two nodes, 16 sequences each
    assert found == {4: Layout(4, 1), 3: Layout(2, 2), 2: Layout(2, 2)}


def test_nodes_that_are_no_whole_group_are_refused():
    with pytest.raises(ConfigError, match=r"1 × 4 processes are no groups of .*context_parallel=8: take --min-nodes=2"):
        layouts(a_config(32, context_parallel=8), nodes=4, min_nodes=1, devices=4)


def test_fewer_nodes_that_cannot_share_a_step_are_refused():
    with pytest.raises(ConfigError, match=r"--min-nodes=3: a step of 32 sequences .* 3 × 4 processes"):
        layouts(a_config(32), nodes=4, min_nodes=3, devices=4)


def test_the_profiles_that_ship_are_read_and_the_example_shows_every_default():
    assert load_site("example") == Site()
    assert load_site("gpu-h100").gpus_per_node == 8
    text = (Path(__file__).parents[3] / "slurm/sites/example.yaml").read_text()
    for item in fields(Site):
        assert f"\n{item.name}: " in text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("partion: gpu", "site.yaml:1: unknown key 'partion'. Did you mean partition"),
        ("gpus_per_node: many", "gpus_per_node=many is not a whole number"),
        ("time: soon", "time=soon: write a time as"),
        (
            "time: 1440",
            "time=1440: a number alone may mean minutes, as SLURM reads it, or seconds: write 1440m or",
        ),
        ("time: 2m", "less than a minute is left to train in"),
        ("container: pyxis", "container=pyxis and container_image=None: give both"),
        ("container: dockr", "choose from none, pyxis, apptainer"),
        ("environment: {'A B': x}", "'A B' is no name of a variable"),
        ("srun: ['; true']", "srun: '; true' is no --option"),
    ],
)
def test_a_profile_that_cannot_work_is_refused_with_its_place(tmp_path, line, sentence):
    (tmp_path / "site.yaml").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"site\.yaml") as refusal:
        load_site(str(tmp_path / "site.yaml"))
    assert sentence in str(refusal.value)


def test_times_are_written_as_they_are_meant(tmp_path):
    for written in ("24:00:00", "24h", "1-00:00:00", "1440:00", "1-0", "0-24:00"):
        (tmp_path / "site.yaml").write_text(f"time: {written}\n")
        text = train_script(RUN, a_config(), load_site(str(tmp_path / "site.yaml")), Request(1, 1, False))
        assert "#SBATCH --time=1-00:00:00\n" in text


def test_nodes_forget_what_a_run_has_in_their_memory_at_every_end_of_its_job(tmp_path):
    """Each node by itself, those that were left out as well; and once, however the script ends."""
    request = Request(2, 1, gpus=False, spares=1)
    assert "forget" not in train_script(RUN, a_config(), Site(), request)
    config = a_config(memory_checkpoint_every=1)
    script = train_script(RUN, config, Site(), request)
    assert script.count("EXIT") == 1 + script.count("trap 'forget; [ -z")  # no later trap leaves it out
    body = script[script.index("forgotten=''") : script.index("trap forget EXIT") + len("trap forget EXIT")]
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/bash\necho "${{@: -4}}" >>"{tmp_path}/said"; [[ $* != *n2* ]] || sleep 60\n')
    (tools / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    began = time.monotonic()
    line = f"set -u; all=(n1 n2 n3)\n{body.replace('KILL 8', 'KILL 1')}\nforget; exit 69"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert (done.returncode, time.monotonic() - began < 50) == (69, True)  # a node that is away keeps nobody
    said = sorted((tmp_path / "said").read_text().splitlines())
    folder = f"/dev/shm/longseq-{os.getuid()}-4711"
    assert said == [f"--nodelist={node} rm -rf {folder}" for node in ("n1", "n2", "n3")]
    assert folder == str(folder_of("4711"))
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True).stdout == ""
