"""Where the loss scale is found; fp16 itself needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from longseq.training.callbacks.gauges import loss_scale


def trainer(scaler=None, engine=None):
    return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), strategy=SimpleNamespace(model=engine))


def engine(enabled):
    return SimpleNamespace(fp16_enabled=lambda: enabled, optimizer=SimpleNamespace(loss_scale=4096))


def test_torchs_scale_is_its_scalers():
    assert loss_scale(trainer(torch.amp.GradScaler("cpu", init_scale=256.0))) == 256


def test_deepspeeds_scale_is_its_optimizers():
    assert loss_scale(trainer(engine=engine(enabled=True))) == 4096


def test_precisions_without_a_scale_have_no_curve():
    assert loss_scale(trainer(engine=engine(enabled=False))) is None
    assert loss_scale(trainer(engine=torch.nn.Linear(1, 1))) is None
