"""Decoding in memory that stays where it is, so that on a GPU a token is one CUDA graph.

Its hundreds of small kernels take a host longer to launch than a GPU to run.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from longseq.attention import RecurrentState
from longseq.models.performer import DecodingState, PerformerLM

_log = logging.getLogger(__name__)
WARM_UP = 3  # tokens before the capture: kernels are compiled, and libraries ask for their memory


class Decoder:
    """Decodes a batch token by token, as :meth:`PerformerLM.decode` does.

    Args:
        model: causal, in evaluation mode. Its weights must stay where they are.
        state: after the prompt.
        in_place: whether the state is kept in buffers of its own, each step written over the one before; on a GPU
            steps are then captured. Default: on GPUs.

    Where a graph cannot be had, that is said once, with the reason, and steps are launched one operation at a time.
    """

    def __init__(self, model: PerformerLM, state: DecodingState, *, in_place: bool | None = None):
        self.model, self.on_gpu = model, state.positions.device.type == "cuda"
        self.in_place = self.on_gpu if in_place is None else in_place
        if self.in_place and any(options.kind == "exact" for options in model.spec.plan):
            _say_once("exact attention's state grows with every token")
            self.in_place = False
        self.captures = self.in_place and self.on_gpu
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # Buffers that are written to in inference mode and out of it.
        with torch.inference_mode(False), torch.no_grad():
            self.state = state.select(torch.arange(len(state.positions), device=state.positions.device))
            self.token = torch.zeros_like(state.positions)
        self.logits: Tensor | None = None
        self.begin(state)

    @torch.no_grad()
    def begin(self, state: DecodingState) -> None:
        """Go on from this state, of as many sequences as the first.

        Raises:
            ValueError: for another number of sequences.
        """
        if state.positions.shape != self.token.shape:
            raise ValueError(f"the decoder has {len(self.token)} sequences; got a state of {len(state.positions)}")
        self.position = int(state.positions.max()) if self.in_place and len(state.positions) else 0
        if self.in_place:
            torch._foreach_copy_(_moving(self.state), _moving(state))
        else:
            self.state = state

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """token (B,) to the logits of its successor (B, vocabulary), which hold until the next step.

        Raises:
            LongseqError: for a position that the model has not learned.
        """
        if not self.in_place:
            logits, self.state = self.model.decode(token, self.state)
            return logits
        self.model.check_position(self.position)  # a graph does not look
        self.position += 1
        self.token.copy_(token)
        if self.captures and self.graph is None and self.steps == WARM_UP:
            self._capture()
        self.steps += 1
        if self.graph is None:
            return self._advance()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _advance(self) -> Tensor:
        """One step from buffers to buffers."""
        logits, after = self.model.decode(self.token, self.state)
        torch._foreach_copy_(_moving(self.state), _moving(after))
        return logits

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._advance()
        except RuntimeError as error:
            self.captures = False
            _say_once((str(error).strip() or type(error).__name__).splitlines()[0])
            return
        self.graph = graph


def _moving(state: DecodingState) -> list[Tensor]:
    """What changes with every token."""
    return [state.positions, *(x for layer in state.layers for x in _of_layer(layer))]


def _of_layer(layer: RecurrentState) -> list[Tensor]:
    found: list[Tensor] = []
    if layer.far is not None:
        found += [layer.far.state.sums, layer.far.state.log_scale]
    if layer.before is not None:
        found.append(layer.before)
    if layer.recent is not None:
        found += [layer.recent.k, layer.recent.values, layer.recent.log_weight]
    return found


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("Decoding launches every operation of a token by itself, not a CUDA graph: %s.", reason.rstrip("."))
