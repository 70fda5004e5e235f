"""A batch's part for one of several processes that hold its sequences together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longseq_data.vocabulary import IGNORE

Batch = dict[str, Tensor]


def sliced(batch: Batch, rank: int, parts: int, pad: int) -> Batch:
    """Slice ``rank`` of ``parts`` equal ones of every (rows, positions) tensor; other entries stay whole.

    Targets are cut as they are, so a slice's last token is asked for the first one of the next. What is missing from a
    multiple of ``parts`` comes behind the sequence as padding, which scores nothing: ``pad`` tokens, targets IGNORE,
    segments -1.
    """
    fill = {"tokens": pad, "targets": IGNORE, "segments": -1}
    part: Batch = {}
    for name, tensor in batch.items():
        if tensor.ndim < 2:
            part[name] = tensor
            continue
        size = -(-tensor.shape[1] // parts)
        whole = F.pad(tensor, (0, size * parts - tensor.shape[1]), value=fill[name])
        part[name] = whole[:, rank * size : (rank + 1) * size].contiguous()
    return part
