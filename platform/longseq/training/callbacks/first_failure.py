"""What ended a training, kept from whatever fails afterwards."""

from __future__ import annotations

import lightning.pytorch as pl


class FirstFailure(pl.Callback):
    """Remembers the exception that ended the training. It belongs first among the callbacks.

    Lightning goes on with every callback's ``on_exception``, the logger and the strategy; one that fails there would
    hide the reason.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self.failure = exception
