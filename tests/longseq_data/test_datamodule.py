"""Lightning trains and validates from the data module, and gets the batches that it should."""

from __future__ import annotations

import lightning
import pytest
import torch

from longseq_data.datamodule import SequenceDataModule
from longseq_data.errors import DataError
from longseq_data.samples.batches import TrainingBatches
from plain_samples import evaluation_samples


class Recorder(lightning.LightningModule):
    """A model that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.trained: list[torch.Tensor] = []
        self.validated = 0

    def training_step(self, batch, index):
        self.trained.append(batch["tokens"])
        return self.scale * batch["tokens"].float().mean()

    def validation_step(self, batch, index):
        self.validated += len(batch["tokens"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data: SequenceDataModule, folder, **options) -> Recorder:
    model = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, datamodule=data)
    return model


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_trains_on_the_stream_from_its_start_on_and_validates(workers, make_spec, tmp_path):
    spec = make_spec()
    data = SequenceDataModule(spec, spec, batch_sequences=3, accumulate=2, workers=workers, start=12, valid_samples=9)
    # 8 micro-batches; the check before training and the pass after 6 of them: 2 x 9 samples
    model = fit(data, tmp_path, val_check_interval=6, check_val_every_n_epoch=None)
    expected = TrainingBatches(spec, batch_sequences=3, accumulate=2, rank=0, world=1, start=12)
    assert len(model.trained) == 8
    for tokens, batch in zip(model.trained, expected, strict=False):
        assert torch.equal(tokens, batch["tokens"])
    assert len(list(evaluation_samples(spec, 9))) == 9
    assert model.validated == (6 + 9)  # the check before training takes two batches, the pass all three


def test_without_validation_data_training_runs(make_spec, tmp_path):
    model = fit(SequenceDataModule(make_spec(), None, batch_sequences=3, accumulate=2), tmp_path)
    assert len(model.trained) == 8
    assert model.validated == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_error_ends_training_as_it_is(workers, make_spec, write, tmp_path):
    spec = make_spec(sources=(write("empty.fasta", ""),))
    with pytest.raises(DataError, match=r"is empty; give a file with FASTA records, or remove it from the list\.$"):
        fit(SequenceDataModule(spec, None, batch_sequences=1, workers=workers), tmp_path)


def test_a_module_without_a_trainer_says_so(make_spec):
    with pytest.raises(RuntimeError, match="needs its Trainer"):
        SequenceDataModule(make_spec(), None, batch_sequences=1).train_dataloader()
