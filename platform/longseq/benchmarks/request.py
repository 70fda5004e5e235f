"""What benchmarks are asked for: options with defaults and meanings, which the command line reads. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longseq.attention.options import KERNELS
from longseq.benchmarks.variants import VARIANTS
from longseq.models.presets import PRESETS

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


def option(default: Any, meaning: str, metavar: str | None = "N", **limits: Any) -> Any:
    """A field that is an option of the command line.

    limits: ``least``, 1 unless it is said; ``choices``; or ``names`` of which some are chosen, with what each is.
    """
    return field(default=default, metadata={"meaning": meaning, "metavar": metavar, **limits})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all benchmarks against the length share.

    Attributes:
        lengths: rising.
        directions: "causal", "bidirectional" or both.
        contenders: of the benchmark's own table.
        gemm_size: side of the square product that the machine's rate is taken from.
    """

    lengths: tuple[int, ...]
    directions: tuple[str, ...] = (CAUSAL, BIDIRECTIONAL)
    contenders: tuple[str, ...]
    batch: int = option(1, "sequences at a time")
    features: int = option(256, "random features", "M")
    window: int = option(128, "of the contender of that name: nearer keys are exact", "W", least=0)
    kernel: str = option("softmax", "kernel of FAVOR+", choices=KERNELS)
    device: str = option("cpu", "where to measure", choices=("cpu", "cuda"))
    dtype: str = option("float32", "of the inputs", choices=("float32", "bfloat16", "float16"))
    backend: str = option("auto", "of longseq's attention: auto, torch, native, triton", None)
    rounds: int = option(5, "times each is timed at each length")
    seconds: float = 60.0
    gemm_size: int = 2048


_LENGTHS = (1024, 2048, 4096, 8192, 16384)
_SECONDS = "stop a contender before a length at which it would take longer, all its rounds together"


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """One attention call on q, k and v of shape (batch, heads, length, head_dim)."""

    lengths: tuple[int, ...] = option(_LENGTHS, "sequence lengths", "L,L,…")
    contenders: tuple[str, ...] = option(tuple(ATTENTION_CONTENDERS), "", "NAME,…", names=ATTENTION_CONTENDERS)
    seconds: float = option(60.0, _SECONDS, "S")
    heads: int = option(8, "attention heads")
    head_dim: int = option(64, "width of a head")


@dataclass(frozen=True, kw_only=True)
class StepRequest(Request):
    """One training step of a language model of the preset's size."""

    lengths: tuple[int, ...] = option((*_LENGTHS, 32768), "sequence lengths", "L,L,…")
    contenders: tuple[str, ...] = option(STEP_USUAL, "", "NAME,…", names=STEP_CONTENDERS)
    seconds: float = option(300.0, _SECONDS, "S")
    preset: str = option("regular", "the model's size", choices=tuple(PRESETS))
    vocabulary: int = 256
    activation_checkpointing: bool = option(False, "keep one activation a block: more time, less memory")


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """What is trained. Batches are ``batch`` random crops of ``length`` characters; sizes are the model's."""

    length: int = option(512, "characters per sequence", "L")
    batch: int = option(8, "sequences per step")
    steps: int = option(1000, "optimiser steps")
    window: int = option(64, "of the variants that have one", "W")
    features: int = option(128, "random features", "M")
    dim: int = 128
    depth: int = 4
    heads: int = 4
    lr: float = 2e-3


@dataclass(frozen=True, kw_only=True)
class RecallRequest:
    """The task and the model. A distance is learned at an accuracy of ``enough``."""

    distances: tuple[int, ...] = option((64, 256, 1024, 2048), "between answer and question", "L,L,…")
    pairs: int = 8  # at most each distance
    keys: int = 16
    values: int = 16
    batch: int = 32
    steps: int = option(2500, "at most, at the first distance")
    more_steps: int = option(300, "at most, at each further distance")
    enough: float = 0.99
    window: int = option(32, "of the variants that have one", "W")
    features: int = option(128, "random features", "M")
    dim: int = 64
    depth: int = 2
    heads: int = 2
    lr: float = 3e-3


@dataclass(frozen=True, kw_only=True)
class NeedleRequest:
    """The task, the lengths it is learned at, and the model."""

    length: int = option(131_072, "tokens per sequence", "L")
    gap: int = option(102_400, "tokens between the last value and the first question, at least", "L")
    short: int = option(4_096, "the short model's context", "L")
    keys: int = option(4, "values that are planted")
    values: int = 16
    steps: int = option(400, "at most, at each length")
    enough: float = 0.97  # the running accuracy at which a length is learned, after ``least`` steps
    least: int = 60  # what is learned with a margin carries over to the next length
    step_tokens: int = 16_384  # of a step at the shorter lengths, in 64 sequences at most
    tested: int = 32  # sequences, of held-out text
    dim: int = 64
    depth: int = 2
    heads: int = 2
    features: int = 64
    kernel: str = "softmax"
    rotary_base: float = option(1e9, "as model.rotary_base: at the usual 10,000 nothing is found far away", "B")
    tile: int = 8_192
    lr: float = 3e-3
    seed: int = option(0, "of weights and sequences", least=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """From a few dozen tokens on four times as long each to ``short``, and from there on twice as long."""
        lengths = [self.short]
        while lengths[0] >= 256:
            lengths.insert(0, lengths[0] // 4)
        while lengths[-1] * 2 < self.length:
            lengths.append(lengths[-1] * 2)
        return (*lengths, self.length)

    def gap_at(self, length: int) -> int:
        """The same share of a shorter sequence."""
        return self.gap * length // self.length


@dataclass(frozen=True, kw_only=True)
class OverheadRequest:
    """A training and a plain loop in turns; overrides: of configuration keys, e.g. ``trainer.zero_stage=1``."""

    preset: str = option("small", "the model's size", choices=tuple(PRESETS))
    length: int = option(512, "tokens per sequence", "L")
    batch: int = option(2, "sequences per step")
    steps: int = option(10, "of each turn")
    rounds: int = option(5, "turns of each that are counted, with and without a checkpoint as often")
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WatchingRequest:
    """A training on two processes; overrides: of configuration keys, e.g. ``trainer.log_every=50``."""

    preset: str = option("small", "the model's size", choices=tuple(PRESETS))
    length: int = option(512, "tokens per sequence", "L")
    batch: int = option(8, "sequences per step and process")
    steps: int = option(100, "that are counted")
    copy_every: int = option(50, "steps from one copy in memory to the next")
    overrides: tuple[str, ...] = ()


def _some(names: tuple[str, ...], meaning: str, usual: tuple[str, ...] | None = None) -> Any:
    return option(usual or names, meaning, "NAME,…", names=dict.fromkeys(names, ""))


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """Every combination of these is a cell."""

    presets: tuple[str, ...] = _some(tuple(PRESETS), "sizes", ("tiny", "small"))
    lengths: tuple[int, ...] = option((512, 2048), "tokens per sequence", "L,L,…")
    attention: tuple[str, ...] = _some(("favor", "exact"), "one or both")
    objectives: tuple[str, ...] = _some(("causal", "masked"), "one or both")
    checkpointing: tuple[str, ...] = _some(("no", "yes"), "one or both")
    zero_stages: tuple[str, ...] = _some(
        ("single", "0", "1", "2", "3"), "ZeRO stages; single: without DeepSpeed", ("2",)
    )
    batch: int = option(1, "sequences at a time")
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeaturesRequest:
    """How many draws the errors of the features are means of."""

    draws: int = option(100_000, "projection matrices for an estimator's error")
    length: int = option(4096, "length of the attention", "L")
    repeats: int = option(5, "draws of inputs and projections for the attention's error")
    seed: int = option(0, "of all of it", least=0)


# What `bench quality` and `recall` compare.
USUAL_VARIANTS = ("exact", "local", "softmax", "relu", "window", "window-relu", "window-share-decay")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """Those that are trained."""

    variants: tuple[str, ...] = option(
        USUAL_VARIANTS, "", "NAME,…", names={name: variant.about for name, variant in VARIANTS.items()}
    )


@dataclass(frozen=True, kw_only=True)
class ContextSizes:
    """Every length with every number of processes is a cell; and what is extrapolated."""

    lengths: tuple[int, ...] = option((8192, 16384, 32768, 65536), "tokens per sequence", "L,L,…")
    processes: tuple[int, ...] = option((1, 2), "processes that share a sequence", "P,P,…")
    preset: str = option("small", "the model's size", choices=tuple(PRESETS))
    features: int = option(256, "random features", "M")
    window: int = option(0, "exact window; 0: none", "W", least=0)
    vocabulary: int = option(256, "tokens there are")
    batch: int = option(1, "sequences at a time")
    tile: int = option(4096, "as model.sequence_tile", "T", least=0)
    dtype: str = option("float32", "of weights and activations", choices=("float32", "bfloat16"))
    threads: int = option(1, "of each process")
    rounds: int = option(1, "steps that are timed")
    warmups: int = option(1, "steps before them that are not", least=0)
    gpu_length: int = option(2**20, "tokens, strong scaling on GPUs", "L")
    gpu_slice: int = option(2**17, "tokens per GPU, weak scaling", "L")


@dataclass(frozen=True, kw_only=True)
class DataSizes:
    """How much is read, and how often."""

    megabytes: int = option(320, "of synthetic FASTA")
    rounds: int = option(3, "times each contender is timed")
    seconds: float = option(2.0, "of reading from a corpus, each time: it has no end", "S")
