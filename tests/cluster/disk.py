"""A disk that all nodes share and that can be made ill: an ext4 in a file, mounted in the namespace of each node."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.slurm import Cluster


class Disk:
    """A context manager; everything on it is gone afterwards."""

    def __init__(self, cluster: Cluster, mebibytes: int = 256):
        self.cluster, self.mebibytes = cluster, mebibytes
        self.folder = cluster.folder / "disk"
        self.image = cluster.folder / "disk.ext4"
        self.device = ""

    @staticmethod
    def missing() -> str:
        """Why there can be none here; empty if there can."""
        return "" if os.getuid() == 0 and Path("/dev/loop-control").exists() else "no loop devices may be made here"

    def __enter__(self) -> Disk:
        with self.image.open("wb") as file:
            file.truncate(self.mebibytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", self.image], check=True)
        found = subprocess.run(["losetup", "--find", "--show", self.image], check=True, capture_output=True, text=True)
        self.device = found.stdout.strip()
        self.folder.mkdir()
        # One file system, however often it is mounted: what is done to it here is done to it everywhere.
        subprocess.run(["mount", "-o", "errors=remount-ro", self.device, self.folder], check=True)
        for name in ("login", *self.cluster.nodes):
            inside = self.cluster._enter(name)
            subprocess.run([*inside, "mount", "-o", "errors=remount-ro", self.device, self.folder], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._thaw()
        for name in self.cluster.supervisors:
            with suppress(OSError):
                subprocess.run([*self.cluster._enter(name), "umount", "--lazy", str(self.folder)], capture_output=True)
        subprocess.run(["umount", "--lazy", self.folder], check=True)
        subprocess.run(["losetup", "--detach", self.device], check=True)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Whoever writes waits, as for the server of a network file system that is away."""
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)
        try:
            yield
        finally:
            self._thaw()

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte is left, and no file can be made longer."""
        filler = self.folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
        try:
            yield
        finally:
            filler.unlink()

    def read_only(self) -> None:
        """As the kernel makes it by itself after an error of the disk; for good."""
        subprocess.run(["mount", "-o", "remount,abort", self.folder], capture_output=True)

    def _thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.folder], capture_output=True)
