"""Weights out of files. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longseq.errors import RunError
from longseq_data.os_errors import explained, of_library


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        RunError: if the file is damaged, cut short say, or holds what is no finite number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except OSError as error:
        raise RunError(f"{explained(error, path, 'cannot be read')}.") from None
    except SafetensorError as error:
        refused = of_library(error, path)
        if refused:
            raise RunError(f"{explained(refused, path, 'cannot be read')}.") from None
        raise RunError(f"{path}: no safetensors file, or damaged ({error}): copy or make it again.") from None
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hold the weights of a file to be numbers.

    Raises:
        RunError: naming the file and the first that is not.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RunError(f"{path}: {name} holds NaN or infinite numbers: copy the file again, or take another.")
