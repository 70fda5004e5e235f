"""A job script in a real shell, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from longseq.config.schema import Config
from longseq.launch.slurm.render import Request, train_script
from longseq.launch.slurm.site import Site
from longseq.runs import starts


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    requeued: bool


SAVE = 'echo saved >"$start.end"'


class Job:
    """A script, a run's folder, and what its next starts are to do: shell commands, with $run and $start.

    A job goes on by itself: its script is run until it ends, and a start that nothing was said of saves.
    """

    def __init__(self, folder: Path, *, nodes: int = 2, min_nodes: int | None = None, spares: int = 0, **site: object):
        self.run, self.tools = folder / "a run", folder / "tools"
        self.run.mkdir()
        self.tools.mkdir()
        self.log, self.output = folder / "requeued", folder / "job.log"
        self.dead, self.unready = folder / "dead", folder / "unready"  # nodes; these as often as written
        self.restart, self.nodes = 0, nodes + spares
        config = Config()
        config.data.length, config.data.batch_tokens = 64, 64 * nodes
        comes_back = bool(site.pop("comes_back", True))
        request = Request(nodes, 1, gpus=False, min_nodes=min_nodes, spares=spares, comes_back=comes_back)
        self.script = train_script(self.run, config, Site(pause_seconds=0, **site), request)  # type: ignore[arg-type]
        self._tool("squeue", 'case "$*" in *%T*) echo ${STATE:-RUNNING} ;; esac')
        self._tool("sleep", 'if [ "${1%.*}" -ge 10 ]; then echo "slept $1"; fi; exec /bin/sleep 0.05')
        self.partition()

    def partition(self, *names: str) -> None:
        """What it is made of; no node is left out yet."""
        self._tool(
            "sinfo",
            f"case \"$*\" in *%o*) echo address-of-${{3#--nodes=}} ;; *) printf '%s\\n' {' '.join(names)} ;; esac",
        )
        self._tool(
            "scontrol",
            f'''case $1,$2 in
show,hostnames) if [[ $3 = *[* ]]; then seq -f n%g {self.nodes}; else tr , "\\n" <<<"$3"; fi ;;
show,reservation) grep "^ReservationName=${{3//--oneliner/[^ ]*}} " "{self.tools}/reservations" 2>/dev/null ;;
show,job) echo "JobId=7 ReqNodeList=(null) ExcNodeList=(null) NumNodes=2" ;;
*) echo "$*" >>"{self.log}" ;;
esac''',
        )

    def start(self, *does: str, **environment: str) -> Ended:
        """Run the script; what it has said so far is in job.log, where it reads it."""
        for number, what in enumerate(does):
            (self.tools / f"does-{number}").write_text(what)
        self._tool(
            "srun",
            f'''run="{self.run}"; starts="$run/starts"; start=$(ls "$starts" | grep start | tail -1)
start=$starts/${{start%.start}}
case " $* " in
*" longseq.launch.slurm.task "*)
    echo "$*" >>"{self.tools}/arguments"
    next=$(ls "{self.tools}"/does-* 2>/dev/null | head -1)
    if [ -n "$next" ]; then mv "$next" "{self.tools}/now"; else echo '{SAVE}' >"{self.tools}/now"; fi
    . "{self.tools}/now" ;;
*" bash "*) exec /bin/sleep 20 ;; # that watches over the node of the script
*) list=" $(tr , " " <<<"${{*#*--nodelist=}}") "
    for node in $(cat "{self.dead}" 2>/dev/null); do [[ $list != *" $node "* ]] || exit 1; done
    exec 9>>"{self.tools}/lock"; flock 9
    for node in $(sort -u "{self.unready}" 2>/dev/null); do
        [[ $list == *" $node "* ]] || continue
        sed -i "0,/^$node$/{{//d}}" "{self.unready}"
        echo "srun: error: Unable to create step for job 7: Memory required by task is not available" >&2; exit 1
    done ;;
esac''',
        )
        before = self.log.read_text() if self.log.exists() else ""
        said = len(self.said)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(self.restart), "SLURM_JOB_PARTITION": "main"}
        slurm |= {"SLURM_JOB_NODELIST": f"n[1-{self.nodes}]", "SLURM_JOB_NUM_NODES": str(self.nodes)}
        with self.output.open("ab") as output:
            done = subprocess.run(
                ["bash", "-c", self.script],
                env={**os.environ, "PATH": f"{self.tools}:/usr/bin:/bin", **slurm, **environment},
                stdout=output,
                stderr=output,
                timeout=120,
            )
        for left in self.tools.glob("does-*"):
            left.unlink()
        self.restart += 1
        after = self.log.read_text() if self.log.exists() else ""
        return Ended(done.returncode, self.said[said:], "requeue 7" in after[len(before) :])

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def arguments(self) -> list[str]:
        """Of each start."""
        return (self.tools / "arguments").read_text().splitlines()

    @property
    def starts(self) -> list[int]:
        return starts.numbers(self.run / "starts")

    def _tool(self, name: str, body: str) -> None:
        (self.tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.tools / name).chmod(0o755)


AT_STEP = 'echo "{} 20 2.5 100 0" >"$start.step"; exit 137'


UNFIT = 'echo "preflight n2: only 1 MiB free." >"$start.end"; exit 69'


KILLED = """echo 'srun: error: n2: task 1: Killed' >&2
echo 'srun: launch/slurm: _step_signal: Terminating StepId=7.0' >&2
echo 'srun: error: n1: task 0: Killed' >&2
echo "{} 20 2.5 100 0" >"$start.step"; exit 137"""


REFUSED = "echo 'srun: error: Unable to create step for job 7: Requested nodes are busy' >&2; exit 1"
