"""The attention variants that ``bench quality`` and ``bench recall`` compare, by name. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longseq.attention.options import AttentionOptions


@dataclass(frozen=True)
class Variant:
    """One kind of attention: what it is, and the fields of a PerformerSpec that make it."""

    about: str
    spec: Mapping[str, str | int | bool] = field(default_factory=dict)
    half: bool = False  # attention rounds as a GPU's bf16 kernels do
    last_exact: bool = False  # but softmax attention over all keys in the last layer

    def fields(self, window: int, features: int, depth: int) -> dict[str, Any]:
        """The spec's fields, for a benchmark's window, number of features and of layers."""
        fields: dict[str, Any] = {"features": features, "window": 0, **self.spec}
        fields["window"] = window if fields["window"] else 0
        if self.last_exact:
            own = AttentionOptions(**fields)
            fields["layers"] = (*[own] * (depth - 1), replace(own, kind="exact", learned_share=False))
        return fields


_SHARE = {"window": True, "learned_share": True}

VARIANTS: dict[str, Variant] = {
    "exact": Variant("softmax attention over all keys", {"kind": "exact"}),
    "exact-decay": Variant("exact, a learned decay per head", {"kind": "exact", "learned_decay": True}),
    "exact-gate": Variant("exact, forget gates", {"kind": "exact", "forget_gate": True}),
    "local": Variant("the exact window alone, no features", {"window": True, "features": 0}),
    "local-decay": Variant(
        "the exact window alone, a learned decay per head", {"window": True, "features": 0, "learned_decay": True}
    ),
    "softmax": Variant("FAVOR+ softmax"),
    "softmax-qk": Variant("FAVOR+ softmax, QK normalisation, learned temperature", {"qk_norm": True}),
    "softmax-iid": Variant("FAVOR+ softmax, independent rows", {"projection": "iid"}),
    "softmax-redraw": Variant("FAVOR+ softmax, redrawn every 100 steps", {"redraw_every": 100}),
    "softmax-gate": Variant("FAVOR+ softmax, forget gates", {"forget_gate": True}),
    "softmax-decay": Variant("FAVOR+ softmax, a learned decay per head", {"learned_decay": True}),
    "softmax-qk-decay": Variant(
        "FAVOR+ softmax, QK normalisation, a learned decay per head", {"qk_norm": True, "learned_decay": True}
    ),
    "hyperbolic": Variant("FAVOR+ hyperbolic", {"kernel": "hyperbolic"}),
    "oprf": Variant("FAVOR++ (OPRF)", {"kernel": "oprf"}),
    "sderf": Variant("FAVOR# (SDERF)", {"kernel": "sderf"}),
    "aderf": Variant("FAVOR# (ADERF)", {"kernel": "aderf"}),
    "softmax-covariance": Variant("FAVOR+ softmax, a learned covariance (DARKFormer)", {"learned_covariance": True}),
    "oprf-decay": Variant("FAVOR++ (OPRF), a learned decay per head", {"kernel": "oprf", "learned_decay": True}),
    "relu": Variant("FAVOR+ ReLU", {"kernel": "relu"}),
    "relu-decay": Variant("FAVOR+ ReLU, a learned decay per head", {"kernel": "relu", "learned_decay": True}),
    "window": Variant("exact window, softmax features beyond", {"window": True}),
    "window-relu": Variant("exact window, ReLU features beyond", {"window": True, "kernel": "relu"}),
    "window-qk": Variant("exact window, softmax features, QK normalisation", {"window": True, "qk_norm": True}),
    "window-share": Variant("exact window, softmax features, a learned share per head", dict(_SHARE)),
    "window-share-qk": Variant(
        "exact window, softmax features, a learned share, QK normalisation", _SHARE | {"qk_norm": True}
    ),
    "window-decay": Variant(
        "exact window, softmax features, a learned decay per head", {"window": True, "learned_decay": True}
    ),
    "window-share-decay": Variant(
        "exact window, softmax features, a learned share and decay per head", _SHARE | {"learned_decay": True}
    ),
    "window-share-gate": Variant(
        "exact window, softmax features, a learned share per head, forget gates", _SHARE | {"forget_gate": True}
    ),
    "softmax-exact": Variant("FAVOR+ softmax, and exact attention in the last layer", last_exact=True),
    "window-share-decay-exact": Variant(
        "window-share-decay, and exact attention with a learned decay in the last layer",
        _SHARE | {"learned_decay": True},
        last_exact=True,
    ),
    "window-share-decay-bf16": Variant(
        "window-share-decay with bf16 operands, as GPUs multiply them (emulated)",
        _SHARE | {"learned_decay": True},
        half=True,
    ),
    "window-share-qk-decay": Variant(
        "exact window, softmax features, a learned share and decay per head, QK normalisation",
        _SHARE | {"learned_decay": True, "qk_norm": True},
    ),
}
