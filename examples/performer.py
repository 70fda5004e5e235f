"""A Performer in one file: FAVOR+ attention, the model, and a loop that trains it on the proteins of a FASTA file.

    python examples/performer.py proteins.fasta.gz

Plain PyTorch and nothing of longseq. Axes in the margins: B sequences, L positions, E width, H heads, D = E / H,
M random features, C positions of a chunk, V letters. Read `attention` first; it is all that is new in here.
Source: Choromanski et al. 2020, "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794.
"""

import argparse
import gzip
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = "ACDEFGHIKLMNPQRSTVWYBOUXZ"  # 20 amino acids and 5 rare or unclear ones
END = len(LETTERS)  # between two proteins
VOCABULARY = len(LETTERS) + 1


def projections(features: int, head_dim: int, seed: int = 0) -> Tensor:
    """Random directions ω, (M, D): blocks of D orthogonal rows, each row as long as a Gaussian vector."""
    rng = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(features / head_dim)):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=rng))
        blocks.append((q * r.diagonal().sign()).T)  # with the signs every rotation is equally likely
    lengths = torch.randn(features, head_dim, generator=rng).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


def attention(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, chunk: int = 128) -> Tensor:
    """Causal softmax attention by random features, linear in L. q, k, v: (B, H, L, D); omega: (M, D).

    exp(q·k) is the mean over ω of φ(q)·φ(k) with φ(x) = exp(ω·x - |x|²/2). So Σ_j exp(q·k_j) v_j is about
    φ(q)ᵀ S with S = Σ_j φ(k_j) v_jᵀ, a matrix that can be summed before q is known. A column of ones behind v sums
    the denominator along with it.
    """
    scale = q.shape[-1] ** -0.25  # on both sides: together the usual 1 / √D
    q, k = q * scale, k * scale
    log_q = q @ omega.T - q.square().sum(-1, keepdim=True) / 2  # (B, H, L, M), logarithms of the features
    log_k = k @ omega.T - k.square().sum(-1, keepdim=True) / 2  # (B, H, L, M)
    phi_q = (log_q - log_q.amax(-1, keepdim=True)).exp()  # a factor per query is in numerator and denominator
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # (B, H, L, D + 1)

    # A factor on all keys so far cancels as well: `top` keeps their largest exponent at 0, and S follows when it grows.
    state = v.new_zeros(*v.shape[:2], omega.shape[0], v.shape[-1])  # (B, H, M, D + 1)
    top = torch.full_like(v[:, :, :1, :1], -math.inf)  # (B, H, 1, 1)
    out = []
    for phi, keys, values in zip(phi_q.split(chunk, 2), log_k.split(chunk, 2), v.split(chunk, 2), strict=True):
        before, top = top, torch.maximum(top, keys.detach().amax((2, 3), keepdim=True))
        state = state * (before - top).exp()
        keys = (keys - top).exp()  # (B, H, C, M)
        weights = (phi @ keys.transpose(2, 3)).tril()  # (B, H, C, C): the keys of this chunk, each seen by later ones
        out.append(weights @ values + phi @ state)  # (B, H, C, D + 1): and all keys before, from the state
        state = state + keys.transpose(2, 3) @ values
    summed = torch.cat(out, dim=2)  # (B, H, L, D + 1)
    return summed[..., :-1] / summed[..., -1:]


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of (B, H, L, D) by angles that grow with the position: products then know the distance."""
    length, half = x.shape[2], x.shape[3] // 2
    rates = 10_000 ** (-torch.arange(half, device=x.device) / half)  # (D / 2,)
    angles = torch.arange(length, device=x.device)[:, None] * rates  # (L, D / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, features: int, seed: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        # Each block has directions of its own, and they are not learned.
        self.register_buffer("omega", projections(features, dim // heads, seed), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 × (B, H, L, D)
        # Features estimate well where queries and keys are short: unit length, and a temperature of 2.
        q, k = (F.normalize(rotary(t), dim=-1) * (2 * t.shape[-1] ** 0.5) ** 0.5 for t in (q, k))
        mixed = attention(q, k, v, self.omega)  # (B, H, L, D)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # (B, L, E)
        return x + self.mlp(self.norm2(x))


class Performer(nn.Module):
    def __init__(self, dim: int = 128, depth: int = 2, heads: int = 4, features: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, features, seed) for seed in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next letter, (B, L, V), of tokens (B, L)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def read(path: str) -> Tensor:
    """All proteins of a FASTA file as one row of numbers, END behind each."""
    codes = {letter: number for number, letter in enumerate(LETTERS)}
    tokens: list[int] = []
    with gzip.open(path, "rt") if path.endswith(".gz") else Path(path).open() as lines:
        for line in lines:
            if line.startswith(">"):
                tokens += [END] if tokens else []
            else:
                tokens += [codes.get(letter, codes["X"]) for letter in line.strip().upper()]
    return torch.tensor(tokens)


def batch(tokens: Tensor, size: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows at random places, (B, L), and what follows each of their letters."""
    starts = torch.randint(len(tokens) - length, (size,), generator=rng)
    windows = tokens[starts[:, None] + torch.arange(length + 1)]  # (B, L + 1)
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Performer, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train(path: str, steps: int = 300, size: int = 16, length: int = 512, lr: float = 1e-3, seed: int = 0) -> float:
    """Train on the first nine tenths of a file. Returns the loss on the last tenth, in nats per letter."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    tokens = read(path)
    border = len(tokens) * 9 // 10
    model = Performer()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.1)
    print(f"{len(tokens):,} letters; {sum(p.numel() for p in model.parameters()):,} parameters")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # a warm-up, then half a cosine
            done = step / steps
            group["lr"] = lr * min(step / 20, 1) * (0.55 + 0.45 * math.cos(math.pi * done))
        loss = loss_of(model, *batch(tokens[:border], size, length, rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if step % 10 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  perplexity {loss.exp().item():.2f}", flush=True)
    with torch.no_grad():
        losses = [loss_of(model, *batch(tokens[border:], size, length, rng)) for _ in range(4)]
    held_out = torch.stack(losses).mean().item()
    print(f"held out: loss {held_out:.4f}  perplexity {math.exp(held_out):.2f}")
    return held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a Performer on the proteins of a FASTA file.")
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    train(args.file, steps=args.steps, length=args.length)
