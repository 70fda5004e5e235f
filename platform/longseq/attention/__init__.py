"""FAVOR+ linear attention. Knows tensors only and imports nothing else of the platform."""

from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.feature_maps import KERNELS
from longseq.attention.functional import exact_attention, favor_attention
from longseq.attention.module import FavorAttention
from longseq.attention.projections import projection_matrix
from longseq.attention.recurrent import RecurrentState, decode, prefill, prefill_exact
from longseq.attention.rotary import rotary_table

__all__ = [
    "KERNELS",
    "ContextGroup",
    "FavorAttention",
    "RecurrentState",
    "SlicedDocuments",
    "decode",
    "exact_attention",
    "favor_attention",
    "prefill",
    "prefill_exact",
    "projection_matrix",
    "rotary_table",
]
