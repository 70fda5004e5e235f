"""Vectors of sequences: what ``longseq embed`` does, as a function that returns data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longseq.errors import LongseqError
from longseq.evaluation.records import look, records
from longseq.evaluation.shards import Job, done, kept, refuse_devices, results
from longseq.evaluation.vector_options import DTYPES, IDS, POOLS, Layer, Wanted
from longseq.output_files import check_output, output_file, shards_of
from longseq.trained_model import Source, find

if TYPE_CHECKING:
    from longseq.evaluation.vector_options import Embedded


def embed(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    layer: int | None = None,
    layers: Sequence[Layer | Literal["last"]] | None = None,
    pool: str = "mean",
    dtype: str = "float32",
    per_residue: bool = True,
    devices: int = 1,
) -> Iterator[Embedded]:
    """A vector of size E for each residue of each record, and one of all, in the file's order.

    Args:
        target: a run folder, a checkpoint, an exported folder, or what ``longseq.find`` returned for one of these.
        file: FASTA or text, as the model was trained on.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: with the running mean of the weights.
        layer: 0: the embedding, k: after block k; None: after the final norm, which is what the head reads.
        layers: several, at one reading of a record (one per layer of a record that is read in tiles); then arrays have
            an axis of layers in front. None or "last": as above.
        pool: the vector of a record: ``mean`` or ``max`` over its residues, or ``bos``, that of the token before them
            (BOS, or EOS as trained with data.packing=concat), which says something in masked models, from block 1 on.
        dtype: float32 or float16.
        per_residue: False: pooled ones alone; then a record of any length takes no more memory than a tile of it.
        devices: processes that share the work; results are the same to the last bit.

    Returns:
        records with ``identifier``, ``length``, ``pooled`` (E,), also called ``mean`` where it is one, and ``residues``
        (length, E) or None; memory holds one batch.

    Raises:
        LongseqError, DataError: at once, for a model or file that cannot be used; while it is read, for a bad record.
    """
    source = find(target, overrides, ema=ema)
    wanted = _wanted(source, layer, layers, pool, dtype, per_residue)
    job = embedding(source, file, overrides, wanted, ema=ema)
    refuse_devices(devices)
    look(source, job.file)
    return _vectors(source, job, devices)


def embed_to_file(
    target: str | Path | Source,
    file: str | Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    layer: int | None = None,
    layers: Sequence[Layer | Literal["last"]] | None = None,
    pool: str = "mean",
    dtype: str = "float32",
    per_residue: bool = False,
    ids: str = "given",
    devices: int = 1,
    begin: Callable[[], None] = lambda: None,
) -> int:
    """The same into a .parquet or .npz file, and the number of its sequences.

    What is finished is kept in .FILE.shards next to it until the file is whole: the same call goes on there.

    Args:
        ids: "given", as they are, or "numbered": the second of an id x is called x.2, the third x.3, but for names that
            are ids of the file; it is read once more for these, and memory holds them all.
        begin: called when all has been checked, before the model is read.

    Raises:
        LongseqError, DataError: also for a file of another ending, and one that cannot be written.
    """
    source = find(target, overrides, ema=ema)
    _refuse_others("ids", ids, IDS)
    if out.suffix not in (".parquet", ".npz"):
        raise LongseqError(f"--out {out}: embeddings are written to .parquet or .npz; give it one of these endings.")
    wanted = _wanted(source, layer, layers, pool, dtype, per_residue)
    job = embedding(source, file, overrides, wanted, ema=ema)
    check_output(out, file)
    look(source, job.file)

    from longseq.evaluation.embedding_files import write_npz, write_parquet
    from longseq.evaluation.vector_work import Vectors

    write = write_parquet if out.suffix == ".parquet" else write_npz
    work, place = Vectors(job, source), shards_of(out)
    # The shards go after the file has its name: whenever it is killed, one of the two is there.
    with kept(place, work), output_file(out) as partial:
        begin()
        rows = results(place, work, devices)
        if ids == "numbered":
            rows = _numbered(rows, (record.identifier for record in records(source, job.file)))
        return write(rows, partial, source.spec.dim, wanted)


def embedding(source: Source, file: str | Path, overrides: Sequence[str], wanted: Wanted, *, ema: bool) -> Job:
    """The job that :func:`embed` does."""
    return Job(
        "embed", str(source.folder), str(file), tuple(overrides), ema, {**asdict(wanted), "layers": list(wanted.layers)}
    )


def _wanted(
    source: Source,
    layer: int | None,
    layers: Sequence[Layer | Literal["last"]] | None,
    pool: str,
    dtype: str,
    per_residue: bool,
) -> Wanted:
    """Raises LongseqError for what there is not."""
    if layer is not None and layers is not None:
        raise LongseqError(f"layer={layer} and layers={_said(layers)}: give one of them.")
    asked = (layer,) if layers is None else tuple(None if each == "last" else each for each in layers)
    for each in asked:
        if each is not None and not 0 <= each <= source.spec.depth:
            raise LongseqError(
                f"layer={each}: {source.name} has {source.spec.depth} blocks; take 0 to {source.spec.depth}."
            )
    if not asked or len(set(asked)) < len(asked):
        raise LongseqError(f"layers={_said(asked)}: give each layer once, e.g. 1,3.")
    _refuse_others("pool", pool, POOLS)
    _refuse_others("dtype", dtype, DTYPES)
    if pool == "bos":
        if source.causal:
            raise LongseqError(
                f"pool=bos: {source.name} is causal, and the token before a record sees nothing of it; take mean or "
                "max."
            )
        if 0 in asked:
            raise LongseqError(
                "pool=bos: in layer 0 the token before a record is the same for all; take layers from 1 on."
            )
    return Wanted(asked, layers is not None, pool, per_residue, dtype)


def _refuse_others(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LongseqError(f"{name}={value}: take {', '.join(known[:-1])} or {known[-1]}.")


def _numbered(rows: Iterator[Embedded], ids: Iterable[str]) -> Iterator[Embedded]:
    """With ids that are each there once; ids: those of all rows, none of which is given to another row."""
    count = dict.fromkeys(ids, 0)
    for row in rows:
        given = name = row.identifier
        count[given] = count.get(given, 0) + 1
        while count[given] > 1 and name in count:
            name = f"{given}.{count[given]}"
            count[given] += name in count
        yield row._replace(identifier=name)


def _said(layers: Sequence[Layer | Literal["last"]]) -> str:
    return ",".join("last" if layer is None else str(layer) for layer in layers)


def _vectors(source: Source, job: Job, devices: int) -> Iterator[Embedded]:
    from longseq.evaluation.vector_work import Vectors

    yield from done(Vectors(job, source), devices)
