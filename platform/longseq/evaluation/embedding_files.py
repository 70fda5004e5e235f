"""Embeddings as Parquet or npz files, written as they come: memory does not grow with the number of sequences."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from longseq.evaluation.hidden_vectors import Embedded

_ROWS = 256  # of a row group
_VALUES = 1 << 22  # of a row group, about


def write_parquet(items: Iterable[Embedded], path: Path, dim: int, per_residue: bool) -> int:
    """Columns id, length, mean and, per residue, residues (length rows of ``dim`` numbers). Returns the sequences."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), dim)
    columns = {"id": pa.string(), "length": pa.int32(), "mean": vector}
    if per_residue:
        columns["residues"] = pa.list_(vector)
    schema = pa.schema(columns)
    held: list[Embedded] = []
    written, values = 0, 0
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            arrays = [
                pa.array([item.identifier for item in held], pa.string()),
                pa.array([item.length for item in held], pa.int32()),
                _vectors(np.stack([item.mean for item in held]), vector),
            ]
            if per_residue:
                ends = np.cumsum([0, *(item.length for item in held)]).astype(np.int32)
                flat = _vectors(np.concatenate([_residues(item) for item in held]), vector)
                arrays.append(pa.ListArray.from_arrays(pa.array(ends), flat))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        for item in items:
            held.append(item)
            written += 1
            values += dim * (item.length if per_residue else 1)
            if len(held) >= _ROWS or values >= _VALUES:
                flush()
                held, values = [], 0
        if held:
            flush()
    return written


def _residues(item: Embedded) -> npt.NDArray[np.float32]:
    assert item.residues is not None
    return item.residues


def _vectors(array: npt.NDArray[np.float32], vector: object) -> object:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=vector)


def write_npz(items: Iterable[Embedded], path: Path, dim: int, per_residue: bool) -> int:
    """Arrays ids, length (N,), mean (N, dim) and, per residue, residues (all residues, dim), record after record.

    An array's header says its size, which is known last: the numbers wait in files of their own until then.
    """
    with tempfile.TemporaryDirectory(prefix=".embed-", dir=path.parent) as folder:
        place = Path(folder)
        written, residues, widest = 0, 0, 1
        names = ["ids", "length", "mean", *(["residues"] if per_residue else [])]
        files: dict[str, IO[bytes]] = {name: (place / name).open("w+b") for name in names}
        try:
            for item in items:
                identifier = item.identifier.encode()
                files["ids"].write(len(identifier).to_bytes(4, "little") + identifier)
                files["length"].write(np.int64(item.length).tobytes())
                files["mean"].write(item.mean.tobytes())
                if per_residue:
                    files["residues"].write(np.ascontiguousarray(_residues(item)).tobytes())
                written, residues = written + 1, residues + item.length
                widest = max(widest, len(item.identifier))
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                _put(archive, "ids", f"<U{widest}", (written,), _padded_names(files["ids"], widest))
                _put(archive, "length", "<i8", (written,), files["length"])
                _put(archive, "mean", "<f4", (written, dim), files["mean"])
                if per_residue:
                    _put(archive, "residues", "<f4", (residues, dim), files["residues"])
        finally:
            for file in files.values():
                file.close()
    return written


def _put(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], content: IO[bytes]) -> None:
    content.seek(0)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        shutil.copyfileobj(content, entry, 1 << 20)


def _padded_names(file: IO[bytes], widest: int) -> IO[bytes]:
    """Names of one width each, as NumPy holds strings."""
    file.seek(0)
    out = tempfile.TemporaryFile()  # noqa: SIM115
    while size := file.read(4):
        name = file.read(int.from_bytes(size, "little")).decode()
        out.write(np.array(name, dtype=f"<U{widest}").tobytes())
    return out
