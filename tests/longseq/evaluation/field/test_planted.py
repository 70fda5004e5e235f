"""The whole way of a check whose truth is known: families drawn, a Performer trained, its contacts found."""

from __future__ import annotations

import pytest

import longseq as api
from longseq_data.synth import potts

pytestmark = pytest.mark.long


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_a_trained_performer_finds_planted_contacts(folder, objective):
    """At the coupling where the true parameters find 0.94 of them: at least 0.8, by either method. Chance is 0.09."""
    spec = potts.PottsSpec(families=1, records=4000, length=32)
    assert 0.9 <= potts.precision(spec) < 0.95
    potts.write(spec, folder / "planted.fasta")
    training = api.fit(
        "protein/base",
        [
            *("data.train=planted.fasta", "run.name=planted", f"model.objective={objective}", "model.preset=tiny"),
            *("model.heads=4", "model.position=learned", "model.max_positions=64", "attention.features=64"),
            *("data.packing=crop", "data.length=34", "data.batch_tokens=4352", "data.valid_fraction=0.02"),
            *("data.test_fraction=0.02", "optim.lr=3.0e-3", "optim.warmup_steps=30", "optim.clip=1.0"),
            *("trainer.accelerator=cpu", "trainer.strategy=single", "trainer.devices=1", "trainer.max_steps=350"),
            *("trainer.valid_every=0", "trainer.checkpoint_every=350"),
        ],
    )
    found = api.benchmark_contacts(folder / "planted.contacts.jsonl", training.run.path)
    assert found.chance["all"]["L"] < 0.1
    for method, precision in found.models[0].precision.items():
        assert precision["all"]["L"] >= 0.8, method
