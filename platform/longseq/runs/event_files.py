"""Files of TensorBoard's events, record by record. No torch here.

A record is the length of its event in 8 bytes, their checksum in 4, the event, and its checksum in 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longseq_data.files import aside

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_ASIDE = "rewritten"  # TensorBoard reads whatever has "tfevents" in its name


def drop_after(folder: Path, step: int) -> None:
    """Leave out of a run's events what came after its checkpoint of ``step``: a resume goes over these steps again.

    TensorBoard hides such events behind the next file's START too, and warns of them at each look. Those that an
    earlier START hides go as well. Files are written anew where something goes; records that cannot be read stay, with
    whatever is behind them.

    Raises:
        OSError: if a file cannot be read or written; none is left half done.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog

    for rest in folder.glob(f".{_ASIDE}.*.partial"):  # of a start that was killed
        rest.unlink(missing_ok=True)
    first_hidden = step + 1
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):  # the newest first
        hidden, restart = False, first_hidden
        for _, event in _records(path):
            hidden = hidden or _is_hidden(event, first_hidden)
            if event is not None and event.session_log.status == SessionLog.START:
                restart = min(restart, event.step)
        if hidden:
            with aside(path, _ASIDE) as partial, partial.open("wb") as file:
                for record, event in _records(path):
                    if not _is_hidden(event, first_hidden):
                        file.write(record)
        first_hidden = restart


def _is_hidden(event: Event | None, first_hidden: int) -> bool:
    return event is not None and event.step >= first_hidden


def events_from(path: Path, begin: int, largest: int) -> Iterator[tuple[int, Event | None]]:
    """Events from a byte on, each with the byte behind it; None in place of one of more than ``largest`` bytes, which
    is not read. A record that is cut, as the one that is just being written, is left for the next look."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(begin)
        while (length := _length(file.read(12))) is not None and begin + length + 16 <= size:
            begin += length + 16
            if length > largest:
                file.seek(begin)
            yield begin, None if length > largest else _event(file.read(length + 4), length)


def _records(path: Path) -> Iterator[tuple[bytes, Event | None]]:
    """Each record as its bytes, with its event. From one that is cut or damaged on, all is one, without an event."""
    with path.open("rb") as file:
        while head := file.read(12):
            length = _length(head)
            body = file.read(length + 4) if length is not None else b""
            event = _event(body, length)
            yield (head + body, event) if event is not None else (head + body + file.read(), None)


def _length(head: bytes) -> int | None:
    """Of the event behind the 12 bytes before it; None where they are cut or damaged."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little"):
        return int.from_bytes(head[:8], "little")
    return None


def _event(body: bytes, length: int | None) -> Event | None:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    if length is None or len(body) != length + 4:
        return None
    try:
        return Event.FromString(body[:-4])
    except DecodeError:
        return None
