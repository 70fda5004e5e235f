"""Which layer was the first whose output, or gradient, was not finite."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

_NAMES = ("attention", "mlp")  # within a block


class LayerWatch:
    """Notes the extremes of every layer's output and of its gradient, in the order in which they are computed.

    That is one reduction a layer and pass, and nothing is read back from the device before something has gone wrong.
    """

    def __init__(self, model: nn.Module):
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        for name, module in model.named_modules():
            at_the_top = name and "." not in name and not isinstance(module, (nn.ModuleList, nn.Dropout))
            if at_the_top or name.rpartition(".")[2] in _NAMES:
                module.register_forward_hook(partial(self._watch, name))

    def begin(self) -> None:
        """Forget the step before."""
        self._seen.clear()

    def first(self) -> str | None:
        """The first layer since :meth:`begin` with a value that is not finite, after its place in the order."""
        for place, (what, low, high) in enumerate(self._seen):
            if not (low.isfinite() & high.isfinite()):
                return f"{place:08d} {what}"
        return None

    def _watch(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not module.training or not isinstance(output, Tensor):
            return
        self._note(f"the output of {name}", output.detach())
        if output.requires_grad:
            output.register_hook(partial(self._note, f"the gradient of {name}'s output"))

    def _note(self, what: str, values: Tensor) -> None:
        low, high = values.aminmax()
        self._seen.append((what, low, high))
