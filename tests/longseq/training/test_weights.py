"""Weights through a safetensors file: everything a model needs to be itself again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longseq.errors import RunError
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.models.weights import full_state_dict, load_weights, save_weights, whole_tensors

pytestmark = pytest.mark.interfaces

SPEC = PerformerSpec(
    vocabulary=11, dim=16, depth=2, heads=2, ffn_dim=32, causal=True, kernel="oprf", features=8, learned_decay=True
)


def trained() -> PerformerLM:
    torch.manual_seed(0)
    model = PerformerLM(SPEC)
    model(torch.randint(11, (2, 9)))  # fixes OPRF's constant
    return model.eval()


def test_a_saved_model_computes_the_same_again(tmp_path):
    model, tokens = trained(), torch.randint(11, (2, 9))
    save_weights(full_state_dict(model, sharded=False, keep=True), tmp_path / "w.safetensors")
    again = PerformerLM(SPEC).eval()
    load_weights(again, tmp_path / "w.safetensors")
    assert again.blocks[0].attention.oprf_a == model.blocks[0].attention.oprf_a < 0
    assert torch.equal(again(tokens), model(tokens))


def test_whole_weights_are_seen_without_a_copy_and_a_model_is_made_on_its_device():
    model = trained()
    own = model.state_dict()
    seen = dict(whole_tensors(model, sharded=False))
    assert {name: t.data_ptr() for name, t in seen.items()} == {name: t.data_ptr() for name, t in own.items()}
    state = torch.get_rng_state()
    with torch.device("meta"):
        made = PerformerLM(SPEC).state_dict()
    assert made.keys() == own.keys()
    assert all(tensor.is_meta for tensor in made.values())
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn in the CPU's memory"


@pytest.mark.parametrize("change", [{"kind": "exact"}, {"kernel": "softmax"}])
def test_the_weights_serve_other_attention_too(change, tmp_path):
    save_weights(full_state_dict(trained(), sharded=False, keep=True), tmp_path / "w.safetensors")
    other = PerformerLM(dataclasses.replace(SPEC, **change))
    load_weights(other, tmp_path / "w.safetensors")
    assert other(torch.randint(11, (2, 9))).isfinite().all()
    save_weights(full_state_dict(other, sharded=False, keep=True), tmp_path / "o.safetensors")
    load_weights(PerformerLM(SPEC), tmp_path / "o.safetensors")


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    save_weights(full_state_dict(trained(), sharded=False, keep=True), tmp_path / "w.safetensors")
    plain = PerformerLM(dataclasses.replace(SPEC, learned_decay=False))
    with pytest.raises(RunError, match=r"blocks.0.attention.log_decay is \(2,\), the configured model wants none"):
        load_weights(plain, tmp_path / "w.safetensors")
