"""The model's whole weights, out of whatever ZeRO made of them, into a safetensors file and back."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from longseq.errors import RunError


def full_state_dict(model: nn.Module, sharded: bool, keep: bool) -> dict[str, Tensor]:
    """Copies of the whole state dict, on the CPU. All ranks must call it; those that do not ``keep`` get an empty one.

    sharded: whether DeepSpeed has cut the weights up (ZeRO-3).
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}  # the same on all ranks
    state = {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()} if keep else {}
    for name, parameter in model.named_parameters():
        if sharded:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
        elif keep:
            state[name] = parameter.detach().cpu().clone()
    return state


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model, weights in fp32. Nothing is unpickled.

    Raises:
        RunError: if the file holds the weights of another architecture.
    """
    from safetensors.torch import load_file

    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | have.keys()):
        # A kernel's constant is no weight: FavorAttention does without it, or drops it.
        if not name.endswith("oprf_constant") and have.get(name) != wanted.get(name):
            raise RunError(
                f"{path}: {name} is {have.get(name, 'missing')}, the configured model wants "
                f"{wanted.get(name, 'none')}: leave model.* and the learned parts of attention.* as the run has them."
            )
    model.load_state_dict(state)
