"""Pieces of the training state in safetensors files: written by each rank, read by whoever needs them.

    training/rank-00000.safetensors   "exp_avg:4096:model.head.weight": elements from 4096 on of that flattened weight
    training/loops.pt                 counters, schedule, loss scale: plain values and tensors, read with weights_only

Nothing in them depends on the number of ranks, the ZeRO stage or the strategy that wrote them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longseq.errors import RunError
from longseq.pinned import Copies
from longseq.training.optimizer_state import Holder

FOLDER = "training"
LOOPS = f"{FOLDER}/loops.pt"

Content = bytes | Mapping[str, Tensor]
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def shard_name(rank: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}.safetensors"


def snapshot(
    holder: Holder, rank: int, into: Mapping[str, Tensor] | None = None, by: Copies | None = None
) -> dict[str, Tensor]:
    """Copies, on the CPU, of the pieces that this rank is to write; none where rank 0 holds the same.

    into: the copies of the snapshot before, to be written over: fresh memory would cost more time than the copying.
    by: makes the copies, and knows when they are made.
    """
    copies, by = {}, by or Copies()
    for piece in holder.pieces() if not (holder.replicated and rank) else ():
        for kind, tensor in piece.tensors.items():
            name = f"{kind}:{piece.start}:{piece.name}"
            copies[name] = by.of(tensor, (into or {}).get(name))
    return copies


def restore(holder: Holder, folder: Path) -> None:
    """Fill what this rank holds from the pieces of a checkpoint, whoever wrote them.

    Raises:
        RunError: if some of it is in none of the files.
    """
    reader = _Reader(folder)
    for piece in holder.pieces():
        for kind, tensor in piece.tensors.items():
            tensor.copy_(reader.read(kind, piece.name, piece.start, piece.numel))


class _Reader:
    """Ranges of named tensors out of the shards of a checkpoint."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in sorted((folder / FOLDER).glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  # no dictionary
                kind, start, name = key.split(":", 2)
                numel = file.get_slice(key).get_shape()[0]
                self.pieces[kind, name].append((int(start), int(start) + numel, file, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        parts, at, end = [], start, start + numel
        for first, last, file, key in sorted(self.pieces[kind, name], key=lambda piece: piece[0]):
            if first <= at < last and at < end:
                parts.append(file.get_slice(key)[at - first : min(end, last) - first])
                at = min(end, last)
        if at < end:
            raise RunError(
                f"{self.folder}: holds no {kind} of {name} from element {at} on: the configured model is another one; "
                "leave model.* and the learned parts of attention.* as the run has them."
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack(values: Mapping[str, Any]) -> bytes:
    """Plain values and tensors as bytes that :func:`unpack` reads without executing anything."""
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    return buffer.getvalue()


def unpack(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Written:
    """What a manifest says of a file."""

    size: int
    sha256: str


def write(path: Path, content: Content) -> Written:
    """Write a file through to the disk, and take its checksum from what was to be written, not from what came out.

    Tensors go out in the safetensors format, by Python's own calls: these let go of the interpreter's lock while
    they copy and hash, so that the training goes on meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in [content] if isinstance(content, bytes) else _safetensors(content):
            block = memoryview(part)
            digest.update(block)
            size += len(block)
            while len(block):
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _safetensors(tensors: Mapping[str, Tensor]) -> Any:
    """The parts of a safetensors file: length of the header, header, then each tensor's bytes."""
    header, offset, blocks = {}, 0, []
    # Widest elements first, so that all are aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        if size:
            blocks.append(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    yield from blocks
