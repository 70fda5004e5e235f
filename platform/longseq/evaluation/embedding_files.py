"""Embeddings as Parquet or npz files, written as they come: memory does not grow with the number of sequences."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from longseq.evaluation.vector_options import Embedded, Vectors, Wanted

_ROWS = 256  # of a row group
_VALUES = 1 << 22  # of a row group, about


def write_parquet(items: Iterable[Embedded], path: Path, dim: int, wanted: Wanted) -> int:
    """Columns id, length, of each layer one of the pool's name and, per residue, residues (length rows of ``dim``
    numbers). Returns the sequences."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.from_numpy_dtype(wanted.dtype), dim)
    columns = {"id": pa.string(), "length": pa.int32()}
    columns |= {wanted.pool + suffix: vector for suffix in wanted.suffixes}
    if wanted.per_residue:
        columns |= {f"residues{suffix}": pa.list_(vector) for suffix in wanted.suffixes}
    schema = pa.schema(columns)
    held: list[Embedded] = []
    written, values = 0, 0
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            layers = range(len(wanted.layers))
            arrays = [
                pa.array([item.identifier for item in held], pa.string()),
                pa.array([item.length for item in held], pa.int32()),
                *(_vectors(np.stack([_of(item.pooled, wanted, layer) for item in held]), vector) for layer in layers),
            ]
            ends = pa.array(np.cumsum([0, *(item.length for item in held)]).astype(np.int32))
            for layer in layers if wanted.per_residue else ():
                flat = _vectors(np.concatenate([_of(item.residues, wanted, layer) for item in held]), vector)
                arrays += [pa.ListArray.from_arrays(ends, flat)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        for item in items:
            held.append(item)
            written += 1
            values += dim * len(wanted.layers) * (item.length if wanted.per_residue else 1)
            if len(held) >= _ROWS or values >= _VALUES:
                flush()
                held, values = [], 0
        if held:
            flush()
    return written


def _of(vectors: Vectors | None, wanted: Wanted, layer: int) -> Vectors:
    assert vectors is not None
    found: Vectors = vectors[layer] if wanted.several else vectors
    return found


def _vectors(array: Vectors, vector: object) -> object:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=vector)


def write_npz(items: Iterable[Embedded], path: Path, dim: int, wanted: Wanted) -> int:
    """Arrays ids, length (N,), of each layer one of the pool's name (N, dim) and, per residue, residues (all residues,
    dim), record after record.

    An array's header says its size, which is known last: the numbers wait in files of their own until then.
    """
    with tempfile.TemporaryDirectory(prefix=".embed-", dir=path.parent) as folder:
        place = Path(folder)
        written, residues, widest = 0, 0, 1
        pooled = [wanted.pool + suffix for suffix in wanted.suffixes]
        each = [f"residues{suffix}" for suffix in wanted.suffixes] if wanted.per_residue else []
        files: dict[str, IO[bytes]] = {name: (place / name).open("w+b") for name in ["ids", "length", *pooled, *each]}
        number = np.dtype(wanted.dtype).newbyteorder("<").str
        try:
            for item in items:
                identifier = item.identifier.encode()
                files["ids"].write(len(identifier).to_bytes(4, "little") + identifier)
                files["length"].write(np.int64(item.length).tobytes())
                for layer, name in enumerate(pooled):
                    files[name].write(_of(item.pooled, wanted, layer).tobytes())
                for layer, name in enumerate(each):
                    files[name].write(np.ascontiguousarray(_of(item.residues, wanted, layer)).tobytes())
                written, residues = written + 1, residues + item.length
                widest = max(widest, len(item.identifier))
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                _put(archive, "ids", f"<U{widest}", (written,), _padded_names(files["ids"], widest))
                _put(archive, "length", "<i8", (written,), files["length"])
                for name in pooled:
                    _put(archive, name, number, (written, dim), files[name])
                for name in each:
                    _put(archive, name, number, (residues, dim), files[name])
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
