"""What a Performer language model is made of, as one typed value that refuses what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from longseq.attention.options import OPTIONS, AttentionOptions

EXPORTED = "model."  # before each weight's name in an exported folder: the transformers model holds ours under it
NORMS = ("layernorm", "rmsnorm")
FFNS = ("gelu", "swiglu", "relu2")
ROTARY_BASE = 10_000.0  # Su et al. 2021, arXiv 2104.09864


@dataclass(frozen=True)
class PerformerSpec(AttentionOptions):
    """Architecture of a :class:`~longseq.models.performer.PerformerLM`: the options of its attention, and these.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    vocabulary: int
    dim: int
    depth: int
    heads: int
    ffn_dim: int
    causal: bool
    dropout: float = 0.0
    redraw_every: int = field(default=0, kw_only=True)  # of a model that no configuration describes: one draw for ever
    # What tells the families of Transformers apart whose weights can be imported: see longseq.interop.importing.
    position: str = "rotary"  # or "learned": a vector a position, max_positions of them
    max_positions: int = 0
    rotary_base: float = ROTARY_BASE
    norm: str = "pre"  # or "post": x = norm(x + branch(x)), and no norm before the head
    norm_eps: float = 1e-5
    embedding_norm: bool = False  # a norm behind the embedding
    attention_bias: bool = False
    head: str = "linear"  # or "transform": linear, GELU and norm before it, and a bias on the logits (BERT's)
    mask_scaling: bool = False  # ESM's "token dropout": MASK, the last id, embeds as 0, and the others are scaled
    norm_kind: str = "layernorm"  # or "rmsnorm"
    ffn: str = "gelu"  # or "swiglu", "relu2": see longseq.models.mlp
    bias: bool = True  # of the MLPs' linear maps and the norms
    conv: int = 0  # width of a depthwise convolution on queries, keys and values; 0: none
    value_residual: bool = False  # layers mix the first one's values into theirs
    seed: int = 0
    activation_checkpointing: bool = False
    activation_offload: bool = False
    sequence_tile: int = 0  # positions that norms, projections and MLPs compute at a time; 0: all
    carry: bool = True  # whether tiles may go through all layers at once, where the attention allows it
    layers: tuple[AttentionOptions, ...] = ()  # a plan, repeated over the depth; (): all layers are as this spec says

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"model.dim={self.dim} is not divisible by model.heads={self.heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"model.dim / model.heads = {self.dim} / {self.heads} = {self.head_dim} is odd; "
                "rotary positions need an even head size"
            )
        if (self.position == "learned") != (self.max_positions > 0):
            raise ValueError(
                f"model.position={self.position} and model.max_positions={self.max_positions}: learned positions need "
                "their number, e.g. 1024, and rotary ones have none (0)"
            )
        if self.position == "learned" and self.rotary_base != ROTARY_BASE:
            raise ValueError(
                f"model.rotary_base={self.rotary_base:g} and model.position=learned: learned positions do not "
                "rotate; leave it out"
            )
        if self.attention_bias and not self.bias:
            raise ValueError(
                "model.attention_bias=true and model.bias=false contradict each other: leave one of them out"
            )
        if self.conv == 1:
            raise ValueError("model.conv=1 sees one position and mixes nothing: take a width from 2 on, or 0 for none")
        if len(self.layers) > self.depth:
            raise ValueError(
                f"attention.layers has {len(self.layers)} layers and the model has {self.depth} (model.depth): take as "
                "many or fewer, which are repeated"
            )
        for at, options in self.entries():
            options.check(causal=self.causal, at=at)
            if options.kind == "favor" and options.learned_share and not options.window:
                raise ValueError(f"{at}learned_share=true has no effect without {at}window, e.g. 64")

    def entries(self) -> Iterator[tuple[str, AttentionOptions]]:
        """The plan, or this spec where there is none; each after what stands before its keys in a configuration."""
        for number, options in enumerate(self.layers or (self,)):
            yield f"attention.layers[{number}]." if self.layers else "attention.", options

    @property
    def plan(self) -> tuple[AttentionOptions, ...]:
        """The attention of each layer."""
        layers = self.layers or (self,)
        return tuple(layers[number % len(layers)] for number in range(self.depth))

    def layer(self, number: int) -> PerformerSpec:
        """The spec of a model all of whose layers are as this one is here."""
        if not self.layers:
            return self
        return replace(self, layers=(), **{name: getattr(self.plan[number], name) for name in OPTIONS})

    def in_words(self, words: Callable[[PerformerSpec], str]) -> str:
        """What ``words`` says of the layers; in a plan, of which: "layers 0, 1: ...; layer 2: ..."."""
        if not self.layers:
            return words(self)
        numbers: dict[str, list[str]] = {}
        for number in range(self.depth):
            numbers.setdefault(words(self.layer(number)), []).append(str(number))
        return "; ".join(f"layer{'s' * (len(of) > 1)} {', '.join(of)}: {said}" for said, of in numbers.items())

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer: ``ffn_dim``, or with SwiGLU's three matrices in the place of two the two
        thirds of it that keep the number of weights, a multiple of 8 where that changes it by less than 2 %."""
        if self.ffn != "swiglu":
            return self.ffn_dim
        step = 8 if self.ffn_dim >= 384 else 1
        return max(1, round(2 * self.ffn_dim / (3 * step))) * step

    @property
    def made_of(self) -> str:
        """What blocks have beyond a plain Transformer's, for people; empty where they have nothing."""
        parts = {
            self.norm_kind: self.norm_kind != "layernorm",
            self.ffn: self.ffn != "gelu",
            "no biases": not self.bias,
            f"convolution of {self.conv}": self.conv > 0,
            "value residual": self.value_residual,
        }
        return ", ".join(name for name, there in parts.items() if there)

    @property
    def tile(self) -> int:
        """Positions a tile: a window and more, so that what a tile needs of those before it is in the last one."""
        window = max(options.window for _, options in self.entries())
        return max(self.sequence_tile, 2 * window, self.conv) if self.sequence_tile else 0

    @property
    def carries(self) -> bool:
        """Whether a tile can go through all layers before the next, with a fixed-size state per layer between them."""
        favor = all(options.kind == "favor" and not options.signed for options in self.plan)
        return bool(self.sequence_tile) and self.carry and self.causal and favor and not self.mask_scaling

    @property
    def reads_on(self) -> bool:
        """Whether a trained causal model goes through a sequence likewise, without gradients."""
        return bool(self.sequence_tile) and self.causal and all(options.kind == "favor" for options in self.plan)

    @property
    def sums_up(self) -> bool:
        """Whether bidirectional layers need nothing of other tiles but sums of their keys, and near neighbours."""
        return bool(self.sequence_tile) and not self.causal and all(options.kind == "favor" for options in self.plan)

    def recomputes(self, positions: int) -> bool:
        """Whether the backward pass computes layers again, of so many positions of a row in one process."""
        return self.activation_checkpointing or 0 < self.tile < positions

    @property
    def matrix_count(self) -> int:
        """Number of weights in the blocks' linear maps, without biases: Muon's."""
        mlp = (3 if self.ffn == "swiglu" else 2) * self.dim * self.hidden
        return self.depth * (4 * self.dim**2 + mlp)

    @property
    def gates(self) -> int:
        """Number of layers with forget gates."""
        return sum(options.forget_gate for options in self.plan)

    @property
    def parameter_count(self) -> int:
        """Number of weights a model of this spec has."""
        attention = 4 * self.dim**2 + 3 * self.dim * self.conv
        mlp = (3 if self.ffn == "swiglu" else 2) * self.dim * self.hidden
        norm = self.dim * (1 + (self.bias and self.norm_kind == "layernorm"))
        if self.bias:
            mlp += (2 if self.ffn == "swiglu" else 1) * self.hidden + self.dim
        if self.attention_bias:
            attention += 4 * self.dim
        ends = 2 * self.vocabulary * self.dim + self.max_positions * self.dim
        ends += norm * ((self.norm == "pre") + self.embedding_norm)
        if self.head == "transform":
            ends += self.dim**2 + 3 * self.dim + self.vocabulary
        per_head = sum(o.qk_norm + (o.learned_share and o.window > 0) + o.learned_decay for o in self.plan)
        per_head += self.depth - 1 if self.value_residual else 0
        per_head += (self.dim + 1) * self.gates
        per_head += self.head_dim**2 * sum(o.learned_covariance for o in self.plan)
        return self.depth * (attention + mlp + 2 * norm) + self.heads * per_head + ends
