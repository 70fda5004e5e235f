"""Vectors of sequences: what ``longseq embed`` does, as a function that returns data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import LongseqError
from longseq.evaluation.records import look
from longseq.evaluation.shards import Job, done, kept, refuse_devices, results
from longseq.output_files import check_output, output_file, shards_of
from longseq.trained_model import Source, find

if TYPE_CHECKING:
    from longseq.evaluation.hidden_vectors import Embedded


def embed(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    layer: int | None = None,
    per_residue: bool = True,
    devices: int = 1,
) -> Iterator[Embedded]:
    """A vector of size E for each residue of each record, and their mean, in the file's order.

    Args:
        target: a run folder, a checkpoint, an exported folder, or what ``longseq.find`` returned for one of these.
        file: FASTA or text, as the model was trained on.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: with the running mean of the weights.
        layer: 0: the embedding, k: after block k; None: after the final norm, which is what the head reads.
        per_residue: False: means alone; then a record of any length takes no more memory than a tile of it.
        devices: processes that share the work; results are the same to the last bit.

    Returns:
        records with ``identifier``, ``length``, ``mean`` (E,) and ``residues`` (length, E) or None, float32; memory
        holds one batch.

    Raises:
        LongseqError, DataError: at once, for a model or file that cannot be used; while it is read, for a bad record.
    """
    source = find(target, overrides, ema=ema)
    job = embedding(source, file, overrides, ema=ema, layer=layer, per_residue=per_residue)
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
    per_residue: bool = False,
    devices: int = 1,
    begin: Callable[[], None] = lambda: None,
) -> int:
    """The same into a .parquet or .npz file, and the number of its sequences.

    What is finished is kept in .FILE.shards next to it until the file is whole: the same call goes on there.

    Args:
        begin: called when all has been checked, before the model is read.

    Raises:
        LongseqError, DataError: also for a file of another ending, and one that cannot be written.
    """
    source = find(target, overrides, ema=ema)
    if out.suffix not in (".parquet", ".npz"):
        raise LongseqError(f"--out {out}: embeddings are written to .parquet or .npz; give it one of these endings.")
    job = embedding(source, file, overrides, ema=ema, layer=layer, per_residue=per_residue)
    check_output(out, file)
    look(source, job.file)

    from longseq.evaluation.embedding_files import write_npz, write_parquet
    from longseq.evaluation.work import Vectors

    write = write_parquet if out.suffix == ".parquet" else write_npz
    work, place = Vectors(job, source), shards_of(out)
    # The shards go after the file has its name: whenever it is killed, one of the two is there.
    with kept(place, work), output_file(out) as partial:
        begin()
        return write(results(place, work, devices), partial, source.spec.dim, per_residue)


def embedding(
    source: Source, file: str | Path, overrides: Sequence[str], *, ema: bool, layer: int | None, per_residue: bool
) -> Job:
    """The job that :func:`embed` does.

    Raises:
        LongseqError: for a layer that there is not.
    """
    if layer is not None and not 0 <= layer <= source.spec.depth:
        raise LongseqError(
            f"layer={layer}: {source.name} has {source.spec.depth} blocks; take 0 to {source.spec.depth}."
        )
    options = {"layer": layer, "per_residue": per_residue}
    return Job("embed", str(source.folder), str(file), tuple(overrides), ema, options)


def _vectors(source: Source, job: Job, devices: int) -> Iterator[Embedded]:
    from longseq.evaluation.work import Vectors

    yield from done(Vectors(job, source), devices)
