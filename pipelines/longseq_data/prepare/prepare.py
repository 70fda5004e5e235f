"""Prepare a corpus: files become Arrow files on disk, in memory that does not depend on their size.

First half: sources are read once, and their rows put aside, sorted by hash (map_stage). Second half: one range of
hashes after another is merged and written (reduce_stage). Every step leaves a file under its final name when it is
done, so an interrupted preparation goes on from there; the corpus gets its own name last.

    NAME.partial/parts/plan.json       what was asked for
                       sources/*.json   sources that were read to their end
                       clusters/*       a table of clusters sorted, or what MMseqs2 has found
                       map/*.arrow      rows put aside, one file a block
                       map/*.pickle     blocks that wait for a worker
                       shards/*         finished shards, with notes
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from longseq_data.corpus.manifest import Manifest, Source
from longseq_data.errors import DataError
from longseq_data.files import aside, sha256_of, user_path, write_text
from longseq_data.ingest.cache import CHANGED
from longseq_data.os_errors import explained, is_full
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.sources import expand_sources
from longseq_data.splits import Identifiers, Split

from .cluster_split import split_clusters, splits_of
from .cluster_table import ClusterTable, read_clusters
from .config import ADDED, PrepareConfig
from .held_out import read_held_out
from .identity import identify
from .map_stage import Counts, MapTask, Stored, cut, map_block, map_source, read_counts
from .mmseqs import program
from .plan import PARTS, Plan, begin, earlier_settings, locked, taken
from .publish import finish, publish
from .reduce_stage import ReduceTask, read_parts, records_of, reduce_shard, shard_count
from .workers import Nodes, Workers

# called with (stage, done, of how many): bytes of the sources, then shards. None: their size is not known
Progress = Callable[[str, int, "int | None"], object]

MIB = 1 << 20
NOTES, TABLE, HELD_OUT = "clusters.json", "table.npy", "held_out.npy"  # of parts/clusters
BLOCKS = 32  # of small inputs at most, so that workers share them evenly
SMALLEST_BLOCK, LARGEST_BLOCK = MIB, 64 * MIB
ALONE = 16 * MIB  # of input: starting processes takes longer
MAP_MEMORY = 16  # a block takes up to so many times its size, text and rows and columns together
REDUCE_MEMORY = 6


def prepare(
    config: PrepareConfig,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    nodes: Nodes | None = None,
) -> tuple[Manifest, bool]:
    """Make the corpus that ``config`` describes, or go on making it; gives its manifest and whether it is new.

    overwrite: replace a corpus of the same name. restart: forget what an interrupted preparation has done. nodes: that
    help out, see workers.help_out. With several workers a script that calls this needs ``if __name__ == "__main__":``,
    as for all of multiprocessing.

    Raises DataError for bad settings and bad data, for a name that is taken, for an interrupted preparation that had
    other settings or other sources, for a second one under way, and where the disk is full.
    """
    config.check()
    try:
        return _prepare(config, overwrite, restart, progress or (lambda *_: None), nodes)
    except DataError as error:
        raise DataError(_own_keys(str(error))) from error


def _own_keys(sentence: str) -> str:
    """Readers speak of the keys of a training."""
    return _KEYS.sub(r"\1", sentence.replace("data.strict=false", "unknown=x"))


_KEYS = re.compile(r"\bdata\.(format|tokenizer|column|part_bytes|image_size)\b")


def _prepare(
    config: PrepareConfig, overwrite: bool, restart: bool, progress: Progress, nodes: Nodes | None
) -> tuple[Manifest, bool]:
    sources = sorted(expand_sources(config.sources, config.format))
    read = config.reading(sources)
    leaves = tuple(read.leaves(sources))
    if mistaken := read.mistaken(leaves):
        _say(f"warning: {_own_keys(mistaken)}")
    output = user_path(config.output).absolute()
    if config.split_by == "cluster" and config.clusters == "mmseqs":
        program()  # said before hours of reading
    with locked(output):
        if config.split_by is None:
            earlier = earlier_settings(output, overwrite, restart)
            usual = "sequence" if read.has_residues else "id"
            config = replace(config, split_by=usual if earlier is None else str((ADDED | earlier)["split_by"]))
        plan = Plan.of(config, read, leaves, _block_bytes(config, leaves))
        there = taken(output, plan, overwrite)
        if there is not None:
            return there, False
        try:
            folder, plan, finished = begin(output, plan, restart)
            if finished is None:
                known = sum(source.size or ALONE for source in plan.sources)
                with Workers(config.processes if known >= ALONE or nodes else 1, _say, nodes) as workers:
                    _Preparation(config, read, leaves, plan, folder, progress, workers).run()
            return publish(folder, output), True
        except OSError as error:
            _sweep(output.with_name(f"{output.name}.partial") / PARTS)
            where = output if is_full(error) else None
            raise DataError(
                f"{explained(error, where or error.filename or output, 'cannot be written')}. Then start the same "
                f"command again: it goes on."
            ) from error


def _say(sentence: str) -> None:
    print(f"longseq: {sentence}", file=sys.stderr)


def _sweep(parts: Path) -> None:
    """Remove the files that were being written by processes that are no more."""
    for rest in [*parts.glob("*/*.partial"), *parts.glob("*/.*.partial"), *parts.glob("map/*.pickle")]:
        rest.unlink(missing_ok=True)


def _block_bytes(config: PrepareConfig, leaves: tuple[Leaf, ...]) -> int:
    known = sum(Path(leaf.source).stat().st_size for leaf in leaves if Path(leaf.source).is_file())
    most = min(LARGEST_BLOCK, config.memory_mb * MIB // (MAP_MEMORY * config.processes))
    return max(SMALLEST_BLOCK, min(most, known // BLOCKS) if known else most)


class _Preparation:
    def __init__(
        self,
        config: PrepareConfig,
        read: Reading,
        leaves: tuple[Leaf, ...],
        plan: Plan,
        folder: Path,
        progress: Progress,
        workers: Workers,
    ) -> None:
        self.config, self.read, self.leaves, self.plan = config, read, leaves, plan
        self.folder, self.progress, self.workers = folder, progress, workers
        self.parts = folder / PARTS
        for name in ("sources", "map", "shards", "clusters"):
            (self.parts / name).mkdir(exist_ok=True)
        for rest in (self.parts / "clusters").glob("mmseqs-*"):  # of processes that were killed
            shutil.rmtree(rest, ignore_errors=True)
        _sweep(self.parts)  # after processes that were killed

    def run(self) -> None:
        inputs = self._hold_out()
        self._read_clusters()
        stored = self._map()
        names = [self.task.path(i, k) for i, source in enumerate(stored) for k in range(source.blocks)]
        counts = Counts()
        for name in names:
            counts.add(read_counts(name))
        size = sum(name.stat().st_size for name in names)
        if not counts.kept:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.filtered.items()))
            raise DataError(
                f"{self.plan.output}: no record passes the filters ({reasons}); change them and add --restart."
                if reasons
                else f"{self.plan.output}: sources={self.config.sources} hold nothing but white space; name others."
            )
        if counts.alone == counts.kept:
            raise DataError(
                f"{self.config.clusters}: lists none of the {counts.kept:,} records, so each would be a cluster of its "
                "own: name the table of these sources, with their identifiers, and add --restart."
            )
        shards = shard_count(counts.kept_bytes)
        room = self.config.memory_mb * MIB / self.config.processes / REDUCE_MEMORY
        task = ReduceTask(
            self.parts / "shards",
            tuple(names),
            replace(self.read.vocabulary, name=self.read.kept_name),
            self.read.written,
            self.config.deduplicate,
            shards,
            ranges=max(1, math.ceil(size / shards / room)),
        )
        clusters = self._cluster(task) if self.config.split_by == "cluster" else None
        if clusters is not None and self.config.clusters == "mmseqs":
            task = replace(task, split=partial(splits_of, self.parts / "clusters" / HELD_OUT))
        if clusters is not None and counts.alone:
            clusters["alone"] = counts.alone
        self._reduce(task)
        _refuse_lost_splits(self.config, task)
        if self.read.written:
            with aside(self.folder / self.read.kept_name) as copy:
                shutil.copyfile(self.read.tokens, copy)
        sources = [
            Source(source.name, each.size, each.sha256) for source, each in zip(self.plan.sources, stored, strict=True)
        ]
        held_out = json.loads((self.parts / "held_out.json").read_text())
        finish(self.folder, task, self.plan, sources, inputs, counts, held_out["families"], held_out["names"], clusters)

    def _read_clusters(self) -> None:
        """Sort the table of clusters, where there is one."""
        table, notes = self.config.cluster_table, self.parts / "clusters" / NOTES
        if table is not None and not notes.exists():
            rows = read_clusters(str(user_path(table)), notes.with_name(TABLE))
            write_text(notes, json.dumps({"rows": rows}))

    def _cluster(self, task: ReduceTask) -> dict[str, object]:
        """What the manifest says of the clusters; those of MMseqs2 are made now, once."""
        notes = self.parts / "clusters" / NOTES
        if self.config.clusters == "repid":
            return {}
        if not notes.exists():
            config = self.config
            found = split_clusters(
                task,
                config.rule,
                config.cluster_identity,
                config.cluster_coverage,
                (program(), config.processes, config.memory_mb),
                lambda done: self.progress("clusters", done, None),
                notes.with_name(HELD_OUT),
            )
            write_text(notes, json.dumps(found))
        return json.loads(notes.read_text())

    def _hold_out(self) -> list[Source]:
        """Read the lists of the ood split once; what they are."""
        notes = self.parts / "held_out.json"
        if not notes.exists():
            held_out = read_held_out(self.config)
            if held_out.names.size:
                np.save(self.parts / "held_out.npy", held_out.names)
            inputs = [Source(file.name, file.size or 0, sha256_of(Path(file.name))) for file in self.plan.inputs]
            values = {
                "families": held_out.families,
                "names": int(held_out.names.size),
                "inputs": list(map(asdict, inputs)),
            }
            write_text(notes, json.dumps(values))
        return [Source(**source) for source in json.loads(notes.read_text())["inputs"]]

    @cached_property
    def task(self) -> MapTask:
        names = self.parts / "held_out.npy"
        table = ClusterTable(self.parts / "clusters" / TABLE) if self.config.cluster_table is not None else None
        held_out = names if names.exists() else None
        return MapTask(self.parts / "map", self.config, self.read, self.leaves, held_out, self.plan.block_bytes, table)

    def _map(self) -> list[Stored]:
        """Put the rows of every source aside; what each source is made of."""
        notes = [self.parts / "sources" / f"{i:05d}.json" for i in range(len(self.plan.sources))]
        todo = [i for i, note in enumerate(notes) if not note.exists()]
        for i in todo:
            if self.plan.sources[i].stamp is None:  # nothing tells whether it is what was begun with
                for begun in (self.parts / "map").glob(f"{i:05d}-*"):
                    begun.unlink()
        sizes = [source.size for source in self.plan.sources]
        total = sum(size for size in sizes if size) if all(sizes) else None
        read = sum(sizes[i] or 0 for i in range(len(notes)) if i not in {*todo})

        def advance(size: int) -> None:
            nonlocal read
            read += size
            self.progress("bytes", read, total)

        # A worker reads a source from its beginning to its end. One that would take longer than all others together,
        # shared among the workers, is read here, and parsed and written there.
        most = (total or 0) / self.workers.count
        alone = self.workers.count == 1
        here = [i for i in todo if not alone and ((sizes[i] or 0) > most or len(todo) < self.workers.count)]
        waiting: dict[int, set[int]] = {i: set() for i in here}
        ended: dict[int, Stored] = {}

        def tasks() -> Iterator[tuple[int, int | None]]:
            for i in here:
                for number, block in enumerate(cut(self.task, i, advance)):
                    if isinstance(block, Stored):
                        ended[i] = block
                    elif not self.task.path(i, number).exists():
                        with aside(self.task.text(i, number)) as text:
                            text.write_bytes(pickle.dumps(block, protocol=5))
                        waiting[i].add(number)
                        yield i, number
            for i in todo:
                if i not in waiting:
                    yield i, None

        work = partial(_map_any, self.task, advance if alone else None)
        for (i, number), stored in self.workers.share(work, tasks(), brief=lambda item: item[1] is not None):
            if number is None:
                assert stored is not None
                write_text(notes[i], json.dumps(asdict(stored)))
                if not alone:
                    advance(stored.size)
            else:
                waiting[i].discard(number)
            for done in [i for i in ended if not waiting[i]]:
                write_text(notes[done], json.dumps(asdict(ended.pop(done))))
        for i, whole in ended.items():
            write_text(notes[i], json.dumps(asdict(whole)))
        for i in todo:
            source = self.plan.sources[i]
            if source.stamp is not None and (now := identify(source.name)).stamp is not None and now != source:
                for path in [notes[i], *(self.parts / "map").glob(f"{i:05d}-*")]:
                    path.unlink()
                raise DataError(f"{source.name} {CHANGED}; then start over with --restart.")
        return [Stored(**json.loads(note.read_text())) for note in notes]

    def _reduce(self, task: ReduceTask) -> None:
        todo = [shard for shard in range(task.shards) if not task.notes(shard).exists()]
        done = task.shards - len(todo)
        self.progress("shards", done, task.shards)
        for _ in self.workers.share(partial(reduce_shard, task), todo):
            done += 1
            self.progress("shards", done, task.shards)


def _refuse_lost_splits(config: PrepareConfig, task: ReduceTask) -> None:
    """Raise DataError where there would be nothing to train on, or equal identifiers leave nothing to validate on."""
    there = {name for shard in range(task.shards) for name in read_parts(task, shard)}
    shares = config.valid_fraction, config.test_fraction
    wanted: tuple[tuple[Split, float], ...] = (("train", 1.0), ("valid", shares[0]))
    lost: Split | None = next((name for name, share in wanted if share and name not in there), None)
    if lost is None or not there - {"ood"}:
        return
    otherwise = "set valid_fraction=0" if lost == "valid" else "set valid_fraction=0 and test_fraction=0"
    if config.split_by == "cluster":
        kind = "validate" if lost == "valid" else "train"
        raise DataError(
            f"{config.output}: no cluster is left to {kind} on with valid_fraction={shares[0]:g} and test_fraction="
            f"{shares[1]:g}; change them, or {otherwise}; then start over with --restart."
        )
    found = Identifiers()
    for name in sorted(there - {"ood"}):
        for shard in range(task.shards):
            if task.arrow(shard, name).exists():
                for identifier, tokens in records_of(task.arrow(shard, name)):
                    found.add(identifier, config.rule, tokens.tobytes)
    if lost == "valid" and not found.repeated:  # too few records, which the report says
        return
    raise DataError(
        f"{config.output}: {found.lost(lost, *shares, prefix='', otherwise=otherwise)}; then start over with --restart."
    )


def _map_any(task: MapTask, advance: Callable[[int], object] | None, item: tuple[int, int | None]) -> Stored | None:
    """A block of a source that waits on the disk, or a whole source."""
    source, number = item
    if number is None:
        return map_source(task, source, advance)
    map_block(task, source, number)
    return None
