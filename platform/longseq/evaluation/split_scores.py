"""Score a model on every target of a split."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.log_probabilities import in_pieces, refuse_what_is_not_finite
from longseq.evaluation.request import plans
from longseq.evaluation.tally import BINS, DEPTHS, Tally, gathered
from longseq.models.performer import PerformerLM
from longseq_data.errors import DataError
from longseq_data.samples.batches import unpack
from longseq_data.samples.rank_share import MakeBatch, Samples
from longseq_data.samples.transport import pack
from longseq_data.vocabulary import IGNORE, Vocabulary


def score(
    model: PerformerLM, spec: Samples, *, batch_sequences: int, max_samples: int | None = None, top_k: int = 5
) -> Tally:
    """One pass over the split, on the model's device.

    Args:
        model: in evaluation mode, its projections set.
        spec: what to read and how to cut it.
        batch_sequences: sequences at a time.
        max_samples: score only so many sequences; None: all.
        top_k: a target among this many most probable tokens is near.

    Raises:
        DataError: if the data are bad.
        LongseqError: if a prediction is no finite number.
    """
    batches = enumerate(plans(spec, batch_sequences, max_samples))
    counted = (of_batch(model, spec, make, number * batch_sequences, top_k) for number, make in batches)
    return gathered(chain([empty(spec)], counted))


def empty(spec: Samples) -> Tally:
    """Of none of its sequences."""
    return Tally.empty(spec.vocabulary.size, DEPTHS * _of_families(spec))


def _of_families(spec: Samples) -> bool:
    return getattr(spec, "packing", None) == "family"


@torch.inference_mode()
def of_batch(model: PerformerLM, spec: Samples, make: MakeBatch, first: int, top_k: int) -> Tally:
    """One batch; first: the number of its first sequence. Raises as :func:`score` does."""
    device, vocabulary = next(model.parameters()).device, spec.vocabulary
    batch = unpack(pack(make()), wide=False)  # a long row grows to int64 a tile at a time
    if _of_families(spec):
        batch["depths"] = _depths(batch["tokens"], vocabulary)
    real = batch["tokens"] != vocabulary.pad
    # Exact attention needs no L × L mask without any padding.
    padding = None if bool(real.all()) else real.to(device)
    apart = len(real) == 1 and padding is None
    if apart and ("segments" not in batch or _reads_apart(model, batch["segments"][0])):
        return _count_in_tiles(model, batch, vocabulary, first, top_k)
    batch = _wide(batch)
    segments = batch["segments"].to(device) if "segments" in batch else None
    hidden = model.hidden(batch["tokens"].to(device), padding, segments)  # (B, L, E)
    return _count(model, hidden, batch, vocabulary, first, top_k)


def refuse_nothing(spec: Samples, tally: Tally) -> None:
    """Refuse a split without a single target.

    Raises:
        DataError: naming its files.
    """
    if not int(tally.targets.sum()):
        held_out = f" for the {spec.split} split" if spec.split else ""
        raise DataError(
            f"{', '.join(spec.sources)}: nothing to score{held_out}: hold out a larger share of the records."
        )


def _depths(tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Of each target of families (B, L), how many members are whole before it, as a number of a bin."""
    before = (tokens == vocabulary.eos).cumsum(1)
    return torch.where(before > 0, before.float().log2().floor().long() + 1, 0).clamp_max(DEPTHS - 1)


def _count_in_tiles(
    model: PerformerLM, batch: Mapping[str, Tensor], vocabulary: Vocabulary, first: int, top_k: int
) -> Tally:
    """Of one sequence of any length, its documents one after the other where they do not see each other."""
    total: Tally | None = None
    tokens = batch["tokens"][0].numpy()
    lengths = _lengths(batch["segments"][0]) if "segments" in batch else [len(tokens)]
    for begin, length in zip(accumulate([0, *lengths]), lengths, strict=False):
        for start, hidden in hidden_in_tiles(model, tokens[begin : begin + length]):
            tile = slice(begin + start, begin + start + hidden.shape[1])
            own = {name: value[:, tile] if value.dim() == 2 else value for name, value in batch.items()}
            part = _count(model, hidden, _wide(own), vocabulary, first, top_k)
            # At once: small arrays that stay between a tile's large ones would keep the heap from being used again.
            total = part if total is None else Tally.of_one([total, part])
    assert total is not None
    return total


def _wide(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.long() for name, value in batch.items()}


def _reads_apart(model: PerformerLM, segments: Tensor) -> bool:
    """Whether documents of a long row are read one by one: in one piece they may not fit. ESM's scaling is a row's."""
    one = not model.spec.mask_scaling or len(_lengths(segments)) == 1
    return one and 0 < model.spec.tile < len(segments)


def _lengths(segments: Tensor) -> list[int]:
    """How long each document of a row (L,) is."""
    return torch.unique_consecutive(segments, return_counts=True)[1].tolist()


def _count(
    model: PerformerLM, hidden: Tensor, batch: Mapping[str, Tensor], vocabulary: Vocabulary, first: int, top_k: int
) -> Tally:
    targets = batch["targets"].to(hidden.device).contiguous()  # of a corpus a view: inputs and targets share memory
    scored = targets != IGNORE
    of_target, best = (torch.empty(targets.shape, device=hidden.device) for _ in range(2))
    predicted, above = (torch.empty_like(targets) for _ in range(2))
    for piece, log_probability in in_pieces(model, hidden.flatten(0, 1)):
        own = log_probability.gather(-1, targets.view(-1)[piece].clamp_min(0)[:, None])  # (n, 1)
        of_target.view(-1)[piece] = own[:, 0]
        best.view(-1)[piece], predicted.view(-1)[piece] = log_probability.max(-1)
        above.view(-1)[piece] = (log_probability > own).sum(-1)
    refuse_what_is_not_finite(of_target[scored])
    correct = (predicted == targets) & scored
    near = (above < top_k) & scored

    mask = scored.cpu().numpy()
    losses = np.where(mask, -of_target.cpu().numpy().astype(np.float64), 0.0)
    confidence = np.where(mask, best.exp().cpu().numpy().astype(np.float64), 0.0)
    right, wanted, found = correct.cpu().numpy(), targets.cpu().numpy(), predicted.cpu().numpy()
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    rows = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)
    by_bin = np.zeros((len(mask), BINS))
    np.add.at(by_bin, (rows[mask], bins[mask]), confidence[mask])
    tokens = (batch["tokens"] != vocabulary.pad).sum(1).numpy()
    kept = tokens > 0  # the last batch is filled up with rows without a sequence

    def frequency(values: np.ndarray, size: int = vocabulary.size) -> np.ndarray:
        return np.bincount(values, minlength=size).astype(np.int64)

    def of_depth(values: np.ndarray) -> np.ndarray:
        by_depth = np.zeros((len(mask), DEPTHS if "depths" in batch else 0))
        if "depths" in batch:
            np.add.at(by_depth, (rows[mask], batch["depths"].numpy()[mask]), values[mask])
        return by_depth

    measured = "bytes" in batch
    extent = [int(batch["bytes"]), int(batch["words"]), 1] if measured else [0, 0, 0]
    return Tally(
        number=(first + np.arange(len(mask)))[kept],
        tokens=tokens[kept],
        targets=mask.sum(1)[kept],
        loss=losses.sum(1)[kept],
        correct=right.sum(1)[kept],
        near=near.sum(1).cpu().numpy()[kept],
        confidence=by_bin[kept],
        depth_loss=of_depth(losses)[kept],
        depth_targets=of_depth(mask).astype(np.int64)[kept],
        bin_targets=frequency(bins[mask], BINS),
        bin_correct=frequency(bins[right], BINS),
        wanted=frequency(wanted[mask]),
        predicted=frequency(found[mask]),
        hits=frequency(wanted[right]),
        extent=np.array(extent, dtype=np.int64),
    )
