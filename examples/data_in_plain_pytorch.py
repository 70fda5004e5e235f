"""longseq's data in a training loop of your own: batches from FASTA files, and a state that is one number.

    python examples/data_in_plain_pytorch.py proteins.fasta.gz

No Lightning, and nothing of `longseq`: `longseq_data` works without it.
"""

import argparse
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from longseq_data.readers.sources import expand_sources
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import IGNORE, TOKENS


def batches(file: str, start: int = 0) -> Loader:
    """Endless batches of 16 sequences, from the sample with number ``start`` on."""
    spec = StreamSpec(
        sources=tuple(expand_sources([file])),
        split="train",  # without the records that these two shares hold out
        valid_fraction=0.05,
        test_fraction=0.05,
        length=128,
        packing="concat",  # records joined by EOS, cut every 128 tokens
        objective="causal",
        seed=0,
    )
    return Loader(TrainingBatches(spec, batch_sequences=16, accumulate=1, rank=0, world=1, start=start), workers=0)


def train(file: str, steps: int, start: int = 0, model: nn.Module | None = None) -> tuple[nn.Module, int, list[float]]:
    """Some steps of a model that sees one letter back. Returns it, the samples consumed, and the losses."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Embedding(len(TOKENS), 32), nn.Linear(32, len(TOKENS)))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    losses = []
    for batch in islice(batches(file, start), steps):
        logits = model(batch["tokens"])  # (16, 128) int64 in, (16, 128, V) out
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        start = int(batch["samples"])  # save it next to the weights: it is the whole state of the data
    return model, start, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Batches from FASTA files in a loop of your own.")
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    model, consumed, losses = train(args.file, args.steps)
    print(f"{consumed} samples, loss {losses[0]:.4f} → {losses[-1]:.4f}")
    _, consumed, losses = train(args.file, args.steps, consumed, model)
    print(f"{consumed} samples, loss {losses[0]:.4f} → {losses[-1]:.4f}: it went on where it was")
