"""longseq's attention in a model of your own: an encoder that classifies long sequences.

    python examples/attention_in_your_model.py

`favor_attention` takes the place of `F.scaled_dot_product_attention`: the same shapes, and no L × L matrix. The task is
made here: two letters are planted anywhere in 2,000 random ones, and the label says whether they are the same.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention import favor_attention


class Encoder(nn.Module):
    def __init__(self, vocabulary: int, classes: int, dim: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, L); real: (B, L) bool, False where a row is padded."""
        x = self.embedding(tokens)  # (B, L, E)
        for layer, (norm, qkv, mlp) in enumerate(zip(self.norms, self.qkv, self.mlp, strict=True)):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 × (B, H, L, D)
            # F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]) would be the exact one.
            mixed = favor_attention(q, k, v, kernel="relu", features=64, key_padding=real, layer=layer)  # (B, H, L, D)
            x = x + mixed.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (B, E)
        return self.head(mean)


def batch(size: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L), which of them are real, and labels (B,). Letters 0 to 3 are noise, 4 and 5 are planted."""
    tokens = torch.randint(4, (size, length), generator=rng)
    planted = torch.randint(4, 6, (size, 2), generator=rng)
    places = torch.rand(size, length // 2, generator=rng).topk(2).indices  # in the half that is never padded
    tokens.scatter_(1, places, planted)
    ends = torch.randint(length // 2, length + 1, (size, 1), generator=rng)
    return tokens, torch.arange(length) < ends, (planted[:, 0] == planted[:, 1]).long()


def train(steps: int, length: int) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = Encoder(vocabulary=6, classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(1, steps + 1):
        tokens, real, labels = batch(16, length, rng)
        loss = F.cross_entropy(model(tokens, real), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}/{steps}  loss {sum(losses[-10:]) / 10:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a classifier with longseq's attention.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2000)
    args = parser.parse_args()
    train(args.steps, args.length)
