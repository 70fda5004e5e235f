"""The whole state of a training, for any strategy: into memory to be written, and back from a checkpoint.

Lightning asks its strategy to save and to load. Those of :mod:`longseq.training.strategy` answer through
:class:`Snapshots`, so that a checkpoint is the same whatever strategy, ZeRO stage or number of ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from longseq.models.weights import full_state_dict
from longseq.pinned import Copies
from longseq.runs.checkpoint import Checkpoint
from longseq.training import shards
from longseq.training.optimizer_state import (
    Holder,
    holder_of,
    loss_scale,
    optimizer_step,
    set_loss_scale,
    set_optimizer_step,
)

_LEFT_OUT = ("state_dict", "optimizer_states")  # ours are in the shards
# Where a callback puts, in on_save_checkpoint, what it wants written besides: path in the checkpoint: content.
FILES = "files"


class Snapshots:
    """A mixin, before one of Lightning's strategies: takes snapshots instead of writing files, and restores them."""

    snapshot: Mapping[str, shards.Content] = {}  # the last one: path in the checkpoint: content, of this rank
    copies: Copies | None = None  # those in it

    restore_checkpoint_after_setup = True  # the optimiser must be there, and sharded
    lightning_restore_optimizer = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by :meth:`load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by :meth:`load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Keep copies of everything in ``snapshot``. All ranks call it; nothing is written.

        The snapshot before is overwritten: it must be on the disk. ``copies`` says when those of a GPU are made.
        """
        task, rank, holder = self._task(), self.global_rank, self._holder()  # type: ignore[attr-defined]
        before = self.snapshot.get(shards.shard_name(rank))
        besides: Mapping[str, shards.Content] = checkpoint.pop(FILES, {})
        self.snapshot, self.copies = {}, Copies()
        pieces = shards.snapshot(holder, rank, before if isinstance(before, Mapping) else None, self.copies)
        files: dict[str, shards.Content] = {shards.shard_name(rank): pieces} if pieces else {}
        weights = full_state_dict(task.model, self._sharded_weights(), keep=rank == 0, by=self.copies)
        if rank == 0:
            files["model.safetensors"] = weights
            files[shards.LOOPS] = shards.pack(
                {
                    "lightning": {name: value for name, value in checkpoint.items() if name not in _LEFT_OUT},
                    "adam_step": optimizer_step(holder),
                    "loss_scale": loss_scale(self._optimizer()),
                    "buffers": {name: buffer.detach().cpu() for name, buffer in _kept_buffers(task.model).items()},
                }
            )
            files |= besides
        self.snapshot = files

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Bring model and optimiser to where a checkpoint was; gives what Lightning restores by itself."""
        folder, task, holder = Path(checkpoint_path), self._task(), self._holder()
        state = shards.unpack(folder / shards.LOOPS)
        shards.restore(holder, folder)
        set_optimizer_step(holder, state["adam_step"])
        set_loss_scale(self._optimizer(), state["loss_scale"])
        holder.refresh()
        for name, buffer in _kept_buffers(task.model).items():
            buffer.copy_(state["buffers"][name])
        position = Checkpoint(folder).position
        accumulate = task.config.trainer.accumulate
        self._count(position.step, accumulate)
        _shift_batches(state["lightning"]["loops"], position.step * (accumulate - position.accumulate))
        return state["lightning"]

    def _task(self) -> Any:
        return self.lightning_module  # type: ignore[attr-defined]

    def _holder(self) -> Holder:
        return holder_of(self._task(), self._optimizer())

    def _optimizer(self) -> Any:
        return self.optimizers[0]  # type: ignore[attr-defined]

    def _sharded_weights(self) -> bool:
        return False

    def _count(self, step: int, accumulate: int) -> None:
        """Tell whoever else counts steps."""


def _kept_buffers(model: nn.Module) -> dict[str, Any]:
    persistent = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _shift_batches(loops: dict[str, Any], by: int) -> None:
    """Lightning counts batches, and validates and steps by that count: with more of them a step, there were more."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += by
