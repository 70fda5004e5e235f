"""FAVOR+ linear attention. Knows tensors only and imports nothing else of the platform."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from longseq.attention.context.group import ContextGroup, SlicedDocuments
    from longseq.attention.functional import exact_attention, favor_attention
    from longseq.attention.module import FavorAttention
    from longseq.attention.options import KERNELS, AttentionOptions
    from longseq.attention.projections import projection_matrix
    from longseq.attention.recurrent import RecurrentState, decode, prefill, prefill_exact
    from longseq.attention.rotary import rotary_table

# name: the module that has it. Imported late: the options are read where there is no time to import torch.
_PUBLIC = {
    "AttentionOptions": "options",
    "ContextGroup": "context.group",
    "FavorAttention": "module",
    "KERNELS": "options",
    "RecurrentState": "recurrent",
    "SlicedDocuments": "context.group",
    "decode": "recurrent",
    "exact_attention": "functional",
    "favor_attention": "functional",
    "prefill": "recurrent",
    "prefill_exact": "recurrent",
    "projection_matrix": "projections",
    "rotary_table": "rotary",
}
__all__ = [
    "KERNELS",
    "AttentionOptions",
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


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'longseq.attention' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"longseq.attention.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
