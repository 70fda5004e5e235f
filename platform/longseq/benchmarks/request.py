"""What a benchmark is asked for: the contenders by name and the sizes. No torch here, for the sake of ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

CAUSAL, BIDIRECTIONAL = "causal", "bidirectional"

# Each contender of `bench attention`, and what it is.
ATTENTION_CONTENDERS: dict[str, str] = {
    "favor": "longseq, FAVOR+ alone",
    "window": "longseq, FAVOR+ beyond an exact window (--window)",
    "exact": "torch's scaled_dot_product_attention",
    "performer-pytorch": "performer_pytorch.FastAttention, without its redraws",
    "fast-transformers": "fast_transformers' linear attention with its Favor features, without their redraws",
    "fla": "flash-linear-attention's chunked kernels over positive features made by torch (causal, CUDA)",
    "opt": "attention returns a copy of V: the limit",
}

# Each contender of `bench step`: the same model and weights, with another function for its attention.
STEP_CONTENDERS: dict[str, str] = {
    "favor": ATTENTION_CONTENDERS["favor"],
    "window": ATTENTION_CONTENDERS["window"],
    "exact": ATTENTION_CONTENDERS["exact"],
    "opt": "attention returns V: the limit (OPT, arXiv 2009.14794, section 4.1)",
    "plan": "longseq, three layers of FAVOR+ (one of two) and one exact, repeated (only when asked for)",
    "gate": "longseq, FAVOR+ with forget gates (only when asked for)",
    "compiled": "longseq, FAVOR+ alone, with blocks that torch.compile has compiled (only when asked for)",
}
STEP_USUAL = tuple(
    name for name in STEP_CONTENDERS if name not in ("plan", "gate", "compiled")
)  # compiling is slow itself

OURS = ("favor", "window")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all benchmarks against the length share.

    Attributes:
        lengths: sequence lengths, rising.
        directions: "causal", "bidirectional" or both.
        contenders: names, of the benchmark's own table.
        window: of the contender "window": weights of keys less than this many positions away are exact.
        device: "cpu" or "cuda".
        rounds: how often each contender is timed at each length.
        seconds: a contender stops before a length at which warming up and all its rounds would take longer.
        gemm_size: side of the square product that the machine's rate is taken from.
    """

    lengths: tuple[int, ...]
    directions: tuple[str, ...]
    contenders: tuple[str, ...]
    batch: int = 1
    features: int = 256
    window: int = 128
    kernel: str = "softmax"
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    rounds: int = 5
    seconds: float = 60.0
    gemm_size: int = 2048


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """One attention call on q, k and v of shape (batch, heads, length, head_dim)."""

    heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class StepRequest(Request):
    """One training step of a language model of the preset's size."""

    preset: str = "regular"
    vocabulary: int = 256
    activation_checkpointing: bool = False
