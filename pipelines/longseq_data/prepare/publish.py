"""The end of a preparation: shards become a folder that `datasets.load_from_disk` opens, under its final name."""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longseq_data.corpus.manifest import (
    MANIFEST,
    OFFSETS,
    DataFile,
    Manifest,
    Source,
    SplitInfo,
    describe_lengths,
    fingerprint,
    read_manifest,
)
from longseq_data.files import aside, sha256_of, sync_folder, write_text
from longseq_data.readers.fasta import PEPTIDE
from longseq_data.splits import LOOKED_AT, Identifiers
from longseq_data.vocabulary import Vocabulary

from .map_stage import SPLITS, Counts
from .plan import PARTS, Plan
from .reduce_stage import Part, ReduceTask, read_parts, records_of, schema, split_digest

PACKAGES = ("datasets", "pyarrow", "numpy")


def finish(
    folder: Path,
    task: ReduceTask,
    plan: Plan,
    sources: list[Source],
    inputs: list[Source],
    counts: Counts,
    families: list[str],
    listed: int,
    clusters: dict[str, object] | None = None,
) -> Manifest:
    """Put the shards in their places, and write what describes them; the manifest last. May be called again."""
    parts = [read_parts(task, shard) for shard in range(task.shards)]
    splits: dict[str, SplitInfo] = {}
    for name in SPLITS:
        of_split = [(task.arrow(shard, name), part[name]) for shard, part in enumerate(parts) if name in part]
        if of_split:
            splits[name] = _finish_split(folder, name, of_split, task.vocabulary)
    mark = fingerprint(task.vocabulary, splits)
    for name, split in splits.items():
        arrow = [Path(file.name).name for file in split.files if file.rows is not None]
        _describe(folder / name, arrow, f"{mark[:16]}-{name}", task)
        split.files += [_data_file(folder, f"{name}/{described}") for described in ("dataset_info.json", "state.json")]
    write_text(folder / "dataset_dict.json", json.dumps({"splits": list(splits)}))
    records = sum(split.records for split in splits.values())
    manifest = Manifest(
        fingerprint=mark,
        vocabulary=task.vocabulary,
        splits=splits,
        settings=plan.settings,
        sources=sources,
        inputs=inputs,
        files=[_data_file(folder, "dataset_dict.json")],
        report={
            "records": counts.records,
            "tokens": counts.tokens,
            "filtered": dict(sorted(counts.filtered.items())),
            "unknown_letters": dict(sorted(counts.unknown.items())),
            "duplicates": counts.kept - records,
            "held_out_families": families,
            "held_out_names": listed,
            "held_out": dict(sorted(counts.held_out.items())),
            **({} if clusters is None else {"clusters": clusters}),
            **_repeated(folder, splits),
            **({} if counts.proteins or counts.tokens < PEPTIDE else {"nucleotides": True}),
        },
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )
    write_text(folder / MANIFEST, manifest.text())
    return manifest


def _repeated(folder: Path, splits: dict[str, SplitInfo]) -> dict[str, object]:
    """How many of some records have an identifier that others have too; nothing where none has.

    Those at the beginning of a corpus are a random part of it.
    """
    found = Identifiers()
    files = [folder / file.name for name in SPLITS if name in splits for file in splits[name].files if file.rows]
    for file in files:
        for identifier, _ in records_of(file):
            if found.records == LOOKED_AT:
                break
            found.records += 1
            found.name(identifier)
    if not found.again:
        return {}
    return {"repeated_ids": {"records": found.records, "again": found.again, "first": found.first_again}}


def publish(folder: Path, output: Path) -> Manifest:
    """Give a finished folder its name; a corpus that has it gives way."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for rest in folder.rglob("*.partial"):  # of processes that were killed
        rest.unlink()
    for path in [*folder.rglob("*/"), folder]:
        sync_folder(path)
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    folder.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    return read_manifest(output)


def _finish_split(folder: Path, name: str, parts: list[tuple[Path, Part]], vocabulary: Vocabulary) -> SplitInfo:
    (folder / name).mkdir(exist_ok=True)
    files, lengths, cells = [], Counter[int](), {}
    for number, (path, part) in enumerate(parts):
        place = folder / name / f"data-{number:05d}-of-{len(parts):05d}.arrow"
        if path.exists():  # else it was moved before an interruption
            path.replace(place)
        files.append(DataFile(f"{name}/{place.name}", part["size"], part["sha256"], part["rows"]))
        lengths.update({int(length): count for length, count in part["lengths"].items()})
        cells.update({int(cell): digest for cell, digest in part["cells"].items()})
    records, tokens = (sum(part[key] for _, part in parts) for key in ("rows", "tokens"))
    _write_offsets(folder / name / OFFSETS, [folder / file.name for file in files], records)
    files.append(_data_file(folder, f"{name}/{OFFSETS}"))
    shortest = min(part["shortest"] for _, part in parts)
    longest = max(part["longest"] for _, part in parts)
    description = describe_lengths(dict(lengths), shortest, longest)
    return SplitInfo(records, tokens, split_digest(cells), description, files)


def _data_file(folder: Path, name: str) -> DataFile:
    return DataFile(name, (folder / name).stat().st_size, sha256_of(folder / name))


def _write_offsets(path: Path, files: list[Path], records: int) -> None:
    """Where each record begins in the flat stream of tokens, and where the last one ends: (records + 1,) int64."""
    with aside(path) as partial, partial.open("wb") as handle:
        description = {"descr": "<i8", "fortran_order": False, "shape": (records + 1,)}
        np.lib.format.write_array_header_1_0(handle, description)
        handle.write(np.zeros(1, dtype="<i8").tobytes())
        end = 0
        for offsets in _token_offsets(files):
            handle.write((offsets[1:] + (end - offsets[0])).astype("<i8").tobytes())
            end += int(offsets[-1] - offsets[0])


def _token_offsets(files: list[Path]) -> Iterator[npt.NDArray[np.int64]]:
    import pyarrow as pa

    for path in files:
        with pa.memory_map(str(path)) as handle, pa.ipc.open_stream(handle) as reader:
            for batch in reader:
                yield batch.column("tokens").offsets.to_numpy()


def _describe(folder: Path, files: list[str], mark: str, task: ReduceTask) -> None:
    """The two files by which `datasets` knows the Arrow files of a split."""
    # as datasets.DatasetInfo writes it, whose import would take longer than a small corpus
    info = dict.fromkeys(("description", "citation", "homepage", "license"), "")
    features = json.loads(schema(task.vocabulary).metadata[b"huggingface"])["info"]["features"]
    write_text(folder / "dataset_info.json", json.dumps({**info, "features": features}))
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": mark,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    write_text(folder / "state.json", json.dumps(state, indent=2))
