"""Files of TensorBoard's events, record by record. No torch here.

A record is the length of its event in 8 bytes, their checksum in 4, the event, and its checksum in 4.
"""

from __future__ import annotations

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


def _records(path: Path) -> Iterator[tuple[bytes, Event | None]]:
    """Each record as its bytes, with its event. From one that is cut or damaged on, all is one, without an event."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with path.open("rb") as file:
        while head := file.read(12):
            body, event = b"", None
            if len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little"):
                length = int.from_bytes(head[:8], "little")
                body = file.read(length + 4)
                if len(body) == length + 4:
                    try:
                        event = Event.FromString(body[:-4])
                    except DecodeError:
                        event = None
            yield (head + body, event) if event is not None else (head + body + file.read(), None)
