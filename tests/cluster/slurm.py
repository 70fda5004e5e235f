"""A real SLURM cluster on one machine, thrown away afterwards: what tests/cluster starts, and a person may play with.

    python tests/cluster/slurm.py [--nodes 3] [--gpus 2] [--flat] [COMMAND ...]     default: a shell on its login node

Everything is in one temporary folder, and everything ends with the process that started it. Where namespaces may be
made ("netns"), the login node and each node have their own host name, address, /dev/shm and processes, so that a node
can be switched off and its cable be pulled. Elsewhere ("flat") all are processes of this machine, on 127.0.0.1 and free
ports.

Each node, and the login node, has a supervisor: this file's own program, which is process 1 of its namespace. It starts
the commands that it reads, one a line, reaps what ends, and ends all of it when its input is closed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_LOGIN = "10.77.0.1"
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_SUBREAPER = 36  # of prctl


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    return f"SLURM is not installed ({', '.join(absent)}; Debian: slurm-wlm and munge)" if absent else ""


class Cluster:
    """A cluster with ``nodes`` nodes, node1 and so on. A context manager."""

    def __init__(self, nodes: int, *, gpus: int = 0, cpus: int = 8, flat: bool = False, extra: str = ""):
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.gpus, self.cpus, self.extra = gpus, cpus, extra
        self.netns = not flat and _namespaces()
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets' paths end at 108 characters
        self.supervisors: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {name: _free_port() for name in ("login", *self.nodes)}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.supervisors)):
            self._end(name)
        for _ in range(50):  # what has just been killed may still hold and make files
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    @property
    def environment(self) -> dict[str, str]:
        """What a command on the login node runs in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SQUEUE", "SRUN"))}
        return {**kept, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: object) -> list[str]:
        """A command on the login node, to be run in :attr:`environment`."""
        inside = self._enter("login") if self.netns else []
        return [*inside, *map(str, words)]

    def run(self, *words: object, check: bool = True, cwd: Path | None = None, timeout: float = 60) -> str:
        """Run a command on the login node: what it prints on stdout."""
        done = subprocess.run(
            self.command(*words), env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for(self, job: str, *states: str, timeout: float = 300) -> str:
        """Until a job is in one of some states."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, (
                f"job {job} is {state}, not {states}:\n{self.run('scontrol', 'show', 'job', job)}"
            )
            time.sleep(0.2)
        return state

    def kill_node(self, node: str) -> None:
        """The power fails: its slurmd and all that runs there are gone at once."""
        self._end(node)

    def kill_slurmd(self, node: str) -> None:
        """Only slurmd dies; what it had started lives on."""
        for pid in self.processes(node):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd":
                    os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Switch a node on again, or start its slurmd again."""
        if node not in self.supervisors:
            self._boot(node)
        self.tell(node, f"slurmd -D -N {node} -f {self.folder}/slurm.conf >>{self.folder}/log/{node}.err 2>&1")

    def cut(self, node: str) -> None:
        """Pull its network cable."""
        self._link(node, "down")

    def heal(self, node: str) -> None:
        self._link(node, "up")

    def processes(self, node: str) -> list[int]:
        """Ids, on this machine, of what runs on a node, its supervisor left out."""
        return list(_descendants(self._pid(node)))

    def restart_controller(self) -> None:
        """slurmctld is killed, and starts again."""
        for pid in self.processes("login"):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmctld":
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        self.tell("login", f"slurmctld -D -f {self.folder}/slurm.conf >>{self.folder}/log/slurmctld.err 2>&1")

    # --- starting

    def _start(self) -> None:
        for name in ("run", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._configure()
        self._supervise("login", _unshare() if self.netns else [])
        folder = shlex.quote(str(self.folder))
        if self.netns:
            addresses = "".join(f"{self._address(node)} {node}\n" for node in self.nodes)
            (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{_LOGIN} login\n{addresses}")
            (self.folder / "resolv.conf").touch()  # no server: look-ups of other names must fail at once
            self.tell(
                "login",
                # By itself it has the lowest address of its ports, which changes with a node: others lose their way.
                f"hostname login && ip link set lo up && ip link add br0 address 02:00:00:00:00:01 type bridge && "
                f"ip addr add {_LOGIN}/24 dev br0 && ip link set br0 up && mount --bind {folder}/hosts /etc/hosts && "
                f"mount --bind {folder}/resolv.conf /etc/resolv.conf && touch {folder}/run/network",
            )
            self._until(lambda: (self.folder / "run/network").exists(), "the network of the login node")
        self.tell(
            "login",
            f"munged --force -F -S {folder}/run/munge.sock --key-file={folder}/munge.key "
            f"--log-file={folder}/log/munged.log --pid-file={folder}/run/munged.pid --seed-file={folder}/run/seed "
            f">{folder}/log/munged.err 2>&1",
        )
        self._until(lambda: (self.folder / "run/munge.sock").exists(), "munged")
        self.tell("login", f"slurmctld -D -i -f {folder}/slurm.conf >{folder}/log/slurmctld.err 2>&1")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self, timeout: float = 30) -> None:
        self._until(lambda: self._idle() == len(self.nodes), "nodes that are idle", timeout)

    def _idle(self) -> int:
        return self.run("sinfo", "--noheader", "-N", "-o", "%T", check=False, timeout=20).split().count("idle")

    def _until(self, condition: object, what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "".join(f"{log.name}: {log.read_text()[-400:]}\n" for log in (self.folder / "log").iterdir())
                raise AssertionError(f"the cluster has no {what} after {timeout:g} s\n{logs}")
            time.sleep(0.05)

    def _supervise(self, name: str, prefix: Sequence[str]) -> None:
        with (self.folder / "log" / f"supervisor-{name}.log").open("ab") as log:
            self.supervisors[name] = subprocess.Popen(
                [*prefix, sys.executable, "-S", __file__, "supervise"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _boot(self, node: str) -> None:
        if not self.netns:
            self._supervise(node, [])
            return
        self._supervise(node, [*self._enter("login", pid=True), *_unshare(user=False)])
        self._until(lambda: self._pid(node) != self.supervisors[node].pid, f"supervisor of {node}")
        net = [*self._enter("login", only_net=True), "ip", "link"]
        subprocess.run([*net, "del", f"v{node}"], capture_output=True)
        subprocess.run(
            [*net, "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", str(self._pid(node))], check=True
        )
        subprocess.run([*net, "set", f"v{node}", "master", "br0", "up"], check=True)
        ready = self.folder / "run" / f"{node}.ready"
        ready.unlink(missing_ok=True)
        self.tell(
            node,
            f"hostname {node} && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && "
            f"ip addr add {self._address(node)}/24 dev eth0 && ip link set eth0 up && touch {ready}",
        )
        self._until(ready.exists, f"network of {node}")

    def tell(self, name: str, line: str) -> None:
        pipe = self.supervisors[name].stdin
        assert pipe is not None
        pipe.write(f"{line}\n".encode())
        pipe.flush()

    def _pid(self, name: str) -> int:
        """The supervisor itself, as this machine counts: below the programs that made its namespaces."""
        pid = self.supervisors[name].pid
        for candidate in (pid, *_descendants(pid)):
            with suppress(OSError):
                if b"supervise" in Path(f"/proc/{candidate}/cmdline").read_bytes().split(b"\0")[-2:]:
                    first = Path(f"/proc/{candidate}/comm").read_text().strip()
                    if first not in ("unshare", "nsenter"):
                        return candidate
        return pid

    def _end(self, name: str) -> None:
        supervisor = self.supervisors[name]
        if self.netns:
            with suppress(ProcessLookupError):
                os.kill(self._pid(name), signal.SIGKILL)  # process 1 of a namespace takes all others with it
        else:
            for _ in range(3):  # what is born meanwhile
                for pid in list(_descendants(supervisor.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            supervisor.kill()
        if supervisor.stdin:
            with suppress(OSError):
                supervisor.stdin.close()
        supervisor.wait()
        del self.supervisors[name]

    def _enter(self, name: str, *, only_net: bool = False, pid: bool = True) -> list[str]:
        user = [] if os.getuid() == 0 else ["-U", "--preserve-credentials"]
        spaces = ["-n"] if only_net else ["-m", "-n", "-u", *(["-p"] if pid else []), "--wd=."]
        return ["nsenter", "-t", str(self._pid(name)), *user, *spaces, "--"]

    def _link(self, node: str, state: str) -> None:
        assert self.netns, "only where nodes have a network of their own"
        subprocess.run([*self._enter("login", only_net=True), "ip", "link", "set", f"v{node}", state], check=True)

    def _address(self, node: str) -> str:
        return f"10.77.0.{10 + int(node.removeprefix('node'))}" if self.netns else "127.0.0.1"

    def _configure(self) -> None:
        folder, user = self.folder, "root" if os.getuid() == 0 else str(os.getuid())
        control = f"login({_LOGIN})" if self.netns else "localhost(127.0.0.1)"
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={control}",
            f"SlurmctldPort={self.ports['login']}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={folder}/run/munge.sock,cred_expire=5",
            "CredType=cred/munge",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/slurmd.%n.log",
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none", "MailProg=/bin/true"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core"),
            "SlurmdParameters=config_overrides",  # more CPUs than there are
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
            *("ReturnToService=2", "SlurmdTimeout=10", "MessageTimeout=5", "TCPTimeout=2", "KillWait=2"),
            *("UnkillableStepTimeout=120", "InactiveLimit=0", "MinJobAge=3600", "JobRequeue=1"),
            *(["GresTypes=gpu"] if self.gpus else []),
        ]
        for node in self.nodes:
            host = node if self.netns else "localhost"
            gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={self._address(node)} Port={self.ports[node]} "
                f"CPUs={self.cpus} RealMemory=8000{gres}"
            )
        lines += ["PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP", self.extra, ""]
        (folder / "slurm.conf").write_text("\n".join(lines))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "plugstack.conf").touch()
        # Any character device will do for a GPU that nobody touches.
        devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")[: self.gpus]
        (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"Name=gpu File={d}\n" for d in devices))


def _unshare(user: bool = True) -> list[str]:
    own = ["-U", "--map-current-user", "--keep-caps"] if user and os.getuid() else []
    return ["unshare", *own, "-m", "-n", "-u", "-p", "-f", "--mount-proc"]


def _namespaces() -> bool:
    """Whether this user may make namespaces with networks in them."""
    try:
        return (
            subprocess.run([*_unshare(), "ip", "link", "add", "br0", "type", "bridge"], capture_output=True).returncode
            == 0
        )
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(pid: int) -> Iterator[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for thread in threads:
        with suppress(OSError):
            for child in (thread / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def supervise() -> None:
    """Start what is read, a command a line; reap; end everything with the input."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes a child of this one
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.1)
        if ready:
            block = os.read(0, 1 << 16)
            if not block:
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                if os.fork() == 0:
                    os.setsid()
                    null = os.open(os.devnull, os.O_RDONLY)
                    os.dup2(null, 0)
                    os.execvp("bash", ["bash", "-c", os.fsdecode(line)])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    for _ in range(3):
        for pid in _descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="of a node; they are not real")
    parser.add_argument("--flat", action="store_true", help="without namespaces")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run on the login node; default: a shell")
    args = parser.parse_args()
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    with Cluster(args.nodes, gpus=args.gpus, flat=args.flat) as cluster:
        mode = "netns" if cluster.netns else "flat"
        print(f"{args.nodes} nodes ({mode}), all in {cluster.folder}; the end of this shell ends them", file=sys.stderr)
        return subprocess.run(cluster.command(*(args.command or ["bash"])), env=cluster.environment).returncode


if __name__ == "__main__":
    if sys.argv[1:] == ["supervise"]:
        supervise()
    else:
        sys.exit(main())
