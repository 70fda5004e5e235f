"""Model sizes and blocks by name. No torch here: the command line reads them before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockRecipe:
    """What a block is made of, under the names of the configuration."""

    norm_kind: str
    ffn: str
    bias: bool
    conv: int
    value_residual: bool
    qk_norm: bool  # of the section attention


BLOCK_KEYS = ("norm_kind", "ffn", "bias", "conv", "value_residual")  # of the section model
# A run is what its recipe says: another one gets another name, and these stay.
BLOCKS: dict[str, BlockRecipe] = {
    "classic": BlockRecipe("layernorm", "gelu", bias=True, conv=0, value_residual=False, qk_norm=False),
    "modern": BlockRecipe("rmsnorm", "swiglu", bias=False, conv=4, value_residual=True, qk_norm=True),
}


@dataclass(frozen=True)
class Size:
    """The four numbers that fix a model's size, and what it is for."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    about: str

    @property
    def sizes(self) -> dict[str, Any]:
        """The numbers by name."""
        return {"dim": self.dim, "depth": self.depth, "heads": self.heads, "ffn_dim": self.ffn_dim}


PRESETS: dict[str, Size] = {
    "tiny": Size(128, 2, 2, 512, "tests and the quickstart: 0.4 M parameters"),
    "small": Size(256, 4, 4, 1024, "a few hours on a laptop: 3.2 M parameters"),
    # "Rethinking Attention with Performers", section 4.1: the Regular model, also that of the concatenated proteins.
    "regular": Size(512, 6, 8, 2048, "the paper's Regular model: 19 M parameters"),
    # Same paper, appendix A.3: the protein models of Table 2.
    "protein36": Size(512, 36, 8, 1024, "the paper's 36-layer protein model: 76 M parameters"),
}
