"""Slices of a batch for processes that hold its sequences together."""

from __future__ import annotations

import torch

from longseq_data.samples.slices import sliced
from longseq_data.vocabulary import IGNORE


def test_slices_put_together_are_the_batch_with_padding_behind() -> None:
    batch = {name: torch.arange(14).view(2, 7) + 100 * i for i, name in enumerate(("tokens", "targets", "segments"))}
    batch["step_targets"] = torch.tensor(14)
    slices = [sliced(batch, rank, 3, pad=27) for rank in range(3)]
    for name, fill in (("tokens", 27), ("targets", IGNORE), ("segments", -1)):
        whole = torch.cat([part[name] for part in slices], dim=1)
        assert whole.shape == (2, 9)
        assert torch.equal(whole[:, :7], batch[name])
        assert (whole[:, 7:] == fill).all()
    assert all(part["step_targets"] == 14 for part in slices)


def test_a_sequence_shorter_than_its_slices_leaves_some_empty() -> None:
    batch = {"tokens": torch.tensor([[1, 2]]), "targets": torch.tensor([[2, 3]])}
    last = sliced(batch, 3, 4, pad=0)
    assert last["tokens"].tolist() == [[0]]
    assert last["targets"].tolist() == [[IGNORE]]
