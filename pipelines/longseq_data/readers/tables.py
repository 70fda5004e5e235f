"""Tables: Parquet files and Hugging Face datasets, streamed row by row. Rows are counted from 1."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from longseq_data.errors import DataError, one_line

from .documents import Text
from .formats import HubAddress
from .images import ImageDocument
from .sources import URL, open_raw, reading_error
from .text import identifier_of, missing_column, parts, short_name, text_field

if TYPE_CHECKING:
    import datasets
    import pyarrow

REACHED = 3  # seconds for the Hub to answer
BATCH_ROWS = 16  # decoded at a time; rows may be books

Row = dict[str, Any]


def read_parquet(source: str, column: str, part_bytes: int, strict: bool) -> Generator[Text, None, None]:
    """The rows of a text column of a Parquet file as documents; a column ``id`` identifies them."""
    name = short_name(source)
    with closing(_parquet_rows(source, column, image=False)) as rows:
        yield from _texts(rows, source, name, column, part_bytes, strict)


def read_parquet_images(source: str, column: str, size: int) -> Generator[ImageDocument, None, None]:
    """The rows of an image column of a Parquet file, PNG or JPEG as the Hub stores them."""
    name = short_name(source)
    with closing(_parquet_rows(source, column, image=True)) as rows:
        yield from _images(rows, source, name, column, size)


def read_hub(source: str, column: str, part_bytes: int, strict: bool) -> Generator[Text, None, None]:
    """The rows of a text column of a Hub dataset, streamed."""
    with closing(_hub_rows(source, column)) as rows:
        yield from _texts(rows, source, _hub_name(source), column, part_bytes, strict)


def read_hub_images(source: str, column: str, size: int) -> Generator[ImageDocument, None, None]:
    """The rows of an image column of a Hub dataset, streamed."""
    with closing(_hub_rows(source, column)) as rows:
        yield from _images(rows, source, _hub_name(source), column, size)


def _texts(
    rows: Iterator[Row], source: str, name: str, column: str, part_bytes: int, strict: bool
) -> Generator[Text, None, None]:
    for number, row in enumerate(rows, 1):
        data = text_field(row, column, f"{source}, row {number}", strict)
        yield from parts(Text(identifier_of(row, f"{name}:{number}"), source, number, data), part_bytes)


def _images(
    rows: Iterator[Row], source: str, name: str, column: str, size: int
) -> Generator[ImageDocument, None, None]:
    for number, row in enumerate(rows, 1):
        place = f"{source}, row {number}"
        if column not in row:
            raise missing_column(place, column, list(row))
        value = row[column]
        content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(content, (bytes, str)) or not content:
            raise DataError(
                f"{place}: '{column}' holds no image (a {type(content).__name__}); name the column of the images in "
                "data.column."
            )
        yield ImageDocument(identifier_of(row, f"{name}:{number}"), source, number, size, content)


def _parquet_rows(source: str, column: str, image: bool) -> Generator[Row, None, None]:
    import pyarrow.parquet as pq

    number = 0
    with closing(_open_parquet(source)) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=False)  # else it keeps all that it has read
        except Exception as error:  # Arrow's, the filesystem's
            raise _no_parquet(source, error) from error
        with closing(table):
            _refuse_column(source, table.schema_arrow, column, image)
            chosen = [name for name in dict.fromkeys((column, "id")) if name in table.schema_arrow.names]
            batches = (
                batch
                for group in range(table.num_row_groups)
                for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=chosen)
            )
            while True:
                try:
                    batch = next(batches, None)
                    rows = [] if batch is None else _as_bytes(batch, column, image).to_pylist()
                except Exception as error:
                    raise DataError(
                        f"{source}, after row {number}: the Parquet data is damaged ({one_line(error)[:200]}); "
                        "download or copy it again."
                    ) from error
                if batch is None:
                    return
                yield from rows
                number += len(rows)


def _open_parquet(source: str) -> IO[bytes]:
    try:
        if not URL.match(source) and Path(source).stat().st_size == 0:
            raise DataError(f"{source} is empty; give a Parquet file, or remove it from the list.")
        return open_raw(source, seekable=True)
    except DataError:
        raise
    except Exception as error:  # every filesystem plugin has exceptions of its own
        raise reading_error(source, None, error) from error


def _no_parquet(source: str, error: Exception) -> DataError:
    return DataError(
        f"{source}: no Parquet file, or a damaged one ({one_line(error)[:200]}); download it again, or name the format "
        "in data.format."
    )


# Arrow's names of what holds text, whoever wrote the file: Polars writes views, pandas' categories are dictionaries.
_TEXT = ("string", "large_string", "string_view")
_BINARY = ("binary", "large_binary", "binary_view")


def _stored(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of a column's values, without what is wrapped around it."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _refuse_column(source: str, schema: pyarrow.Schema, column: str, image: bool) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise missing_column(source, column, schema.names)
    if schema.names.count(column) > 1:
        raise DataError(f"{source}: {schema.names.count(column)} columns are named '{column}'; rename all but one.")
    kind = _stored(schema.field(column).type)
    binary = str(kind) in _BINARY or pa.types.is_fixed_size_binary(kind)
    if image:
        if not (binary or pa.types.is_struct(kind)):
            raise DataError(
                f"{source}: column '{column}' is {kind} and holds no images; name the column of the images in "
                "data.column."
            )
    elif not binary and str(kind) not in _TEXT:
        raise DataError(
            f"{source}: column '{column}' is {kind} and holds no text; name the column with the text in data.column."
        )


def _as_bytes(batch: pyarrow.RecordBatch, column: str, image: bool) -> pyarrow.RecordBatch:
    """Text as its bytes: Arrow does not check that a file's strings are UTF-8, and Python's would raise."""
    import pyarrow as pa

    if image:
        return batch
    index = batch.schema.get_field_index(column)
    values = batch.column(index)
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        elif pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        else:
            break
    return batch.set_column(index, column, values.cast(pa.large_binary()))


def _hub_rows(source: str, column: str) -> Generator[Row, None, None]:
    number = 0
    stream = _open_hub(source)
    # iter() and not a for loop: that would give each worker process a share of its own, and shares are ours to give
    batches = stream.iter(batch_size=BATCH_ROWS)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the network's, the parsers', those of a loading script
            raise DataError(
                f"{source}, after row {number}: cannot be read ({one_line(error)[:300]}); check the data and the "
                "connection."
            ) from error
        if batch is None:
            return
        if column not in batch:
            raise missing_column(source, column, list(batch))
        kept = [name for name in dict.fromkeys((column, "id")) if name in batch]
        for values in zip(*(batch[name] for name in kept), strict=True):
            yield dict(zip(kept, values, strict=True))
        number += len(batch[column])


def _open_hub(source: str) -> datasets.IterableDataset:
    address = HubAddress.parse(source)
    if not address.path.startswith(("/", ".", "~")) and not Path(address.path).is_dir():
        _reach_hub(source)
    try:
        import datasets

        datasets.disable_progress_bars()
        stream = datasets.load_dataset(
            address.path, address.config, revision=address.revision, split=address.split, streaming=True
        )
        # Images stay PNG or JPEG until a sample wants them. JSON, whose types datasets 4 does not know, has none.
        return stream.decode(False) if stream.features else stream
    except Exception as error:  # of the Hub, the network, the files
        raise DataError(
            f"{source}: cannot be opened ({one_line(error)[:300]}); check the name, configuration and split, and the "
            "connection to the Hugging Face Hub."
        ) from error


def _reach_hub(source: str) -> None:
    """Raise DataError where the Hub does not answer: `datasets` would try for half a minute, and once a file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    problem: Exception | None = None
    for wait in (0.0, 1.0):
        time.sleep(wait)
        try:
            get_session().head(constants.ENDPOINT, timeout=REACHED)
            return
        except Exception as error:  # of its HTTP library, which differs between releases
            problem = error
    assert problem is not None
    raise DataError(
        f"{source}: cannot be opened: the Hugging Face Hub ({constants.ENDPOINT}) does not answer "
        f"({one_line(problem)[:200]}; tried twice); check the connection, HF_ENDPOINT and HTTPS_PROXY, or name "
        "files of this machine."
    ) from problem


def _hub_name(source: str) -> str:
    address = HubAddress.parse(source)
    name = Path(address.path).name if Path(address.path).is_absolute() else address.path
    return str(HubAddress(name, address.config, None, address.split)).removeprefix("hub:")
