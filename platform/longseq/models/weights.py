"""The model's whole weights, out of whatever ZeRO made of them, into a safetensors file and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from longseq.errors import RunError
from longseq.models.spec import EXPORTED
from longseq.models.weight_files import read_weights
from longseq.pinned import Copies
from longseq_data.files import aside
from longseq_data.os_errors import explained, of_library

# qk_norm, learned_share, learned_decay, forget_gate, learned_covariance; and model.conv, which begins as the identity.
_GATE = ("attention.gate.weight", "attention.gate.bias")
_LEARNED = ("log_temperature", "log_share", "log_decay", "frame.covariance", "attention.conv.weight", *_GATE)
_CONSTANTS = ("oprf_constant", "frame.constants")


def whole_tensors(model: nn.Module, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """The whole state dict, each tensor where the model has it, and there until the next one is asked for. All ranks
    must go through it.

    sharded: whether DeepSpeed has cut the weights up (ZeRO-3).
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}  # the same on all ranks
    yield from ((name, buffer.detach()) for name, buffer in buffers.items())
    for name, parameter in model.named_parameters():
        if sharded:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()
        else:
            yield name, parameter.detach()


def full_state_dict(model: nn.Module, sharded: bool, keep: bool, by: Copies | None = None) -> dict[str, Tensor]:
    """Copies of the whole state dict, on the CPU. All ranks must call it; those that do not ``keep`` get an empty one.

    sharded: as of :func:`whole_tensors`. by: makes the copies, and knows when they are made.
    """
    by = by or Copies()
    return {name: by.of(tensor) for name, tensor in whole_tensors(model, sharded) if keep}


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Into a safetensors file.

    Raises:
        RunError: if it cannot be written, on a full disk say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with aside(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    except SafetensorError as error:
        refused = of_library(error, path)
        if refused:
            raise RunError(f"{explained(refused, path, 'cannot be written')}.") from None
        raise RunError(f"{path}: cannot be written ({error}).") from None


def load_weights(model: nn.Module, path: Path, *, may_learn_more: bool = False) -> list[str]:
    """Load a safetensors file, a checkpoint's or an exported folder's, into a model, weights in fp32. Nothing is
    unpickled.

    Args:
        may_learn_more: let learned parts of attention that the file lacks keep the values that the model has.

    Returns:
        The names of these.

    Raises:
        RunError: if the file is damaged, or holds the weights of another architecture.
    """
    state = _read(path)
    own = model.state_dict()
    fresh = [name for name in own if may_learn_more and name not in state and name.endswith(_LEARNED)]
    state |= {name: own[name] for name in fresh}
    _refuse_others(path, state, own)
    model.load_state_dict(state)
    return fresh


def load_body(model: nn.Module, path: Path) -> None:
    """Load a language model's weights but for those of its head, which ``model`` has replaced; LoRA's factors stay.

    Raises:
        RunError: as :func:`load_weights` does.
    """
    own = model.state_dict()
    names = {name.replace(".base_layer.", "."): name for name in own}
    body = {name: own[there] for name, there in names.items() if not name.startswith("head.") and ".lora_" not in name}
    state = {name: t for name, t in _read(path).items() if not name.startswith("head.")}
    state |= {name: t for name, t in body.items() if name not in state and name.endswith(_LEARNED)}
    _refuse_others(path, state, body)
    # Not strictly, as the head and LoRA's factors stay; modules decide what becomes of another kernel's constants.
    model.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """In fp32, by the names that longseq has for them."""
    return {
        name.removeprefix(EXPORTED): t.float() if t.is_floating_point() else t for name, t in read_weights(path).items()
    }


def _refuse_others(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Refuse the weights of another architecture."""
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name in sorted(wanted.keys() | have.keys()):
        # A kernel's constants are no weights: FavorAttention does without them, or drops them.
        if not name.endswith(_CONSTANTS) and have.get(name) != wanted.get(name):
            raise RunError(
                f"{path}: {name} is {have.get(name, 'missing')}, the configured model wants "
                f"{wanted.get(name, 'none')}: leave model.* and the learned parts of attention.* as the run has them."
            )
