"""model.init_from: what a training takes over from the model that it begins with."""

from __future__ import annotations

import shutil

import pytest
import torch

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import identities, resolve_sources, vocabulary
from longseq.errors import ConfigError, RunError
from longseq.interop.exporting import write_folder
from longseq.launch.before import check_origin
from longseq.launch.slurm.task import _begin
from longseq.models.performer import PerformerLM
from longseq.runs.run import Run
from longseq.training.fit import begin_with

SPEC = (
    "model.dim=32",
    "model.depth=1",
    "model.heads=4",
    "model.ffn_dim=48",
    "model.norm=post",
    "model.objective=masked",
    "model.rotary_base=500",
)
DATA = "data.train=proteins.fasta"


@pytest.fixture
def exported(folder):
    """Folder of a model of exact attention with 4 heads; and its state dict."""
    config = load_config("small.yaml", [DATA, *SPEC, "attention.kind=exact", "attention.features=24"])
    model = PerformerLM(config.performer_spec(29))
    write_folder(folder / "model", model.state_dict(), config, vocabulary(config), 0, "", first=25)
    return folder / "model", model.state_dict()


def test_sizes_and_family_come_from_the_model_and_attention_from_the_configuration(exported):
    config = load_config("small.yaml", [DATA, "model.init_from=model", "attention.kind=favor"])
    spec = config.performer_spec(29)
    assert (spec.dim, spec.depth, spec.heads, spec.norm, spec.causal) == (32, 1, 4, "post", False)
    assert spec.rotary_base == 500
    assert (spec.kind, spec.features) == ("favor", 24)
    torch.manual_seed(1)
    model = PerformerLM(spec)
    begin_with(model, check_origin(config))
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in model.state_dict().items())


def test_learned_parts_of_attention_that_the_model_lacks_begin_as_new_ones(exported):
    config = load_config(
        "small.yaml", [DATA, "model.init_from=model", "attention.kind=favor", "attention.qk_norm=true"]
    )
    model = PerformerLM(config.performer_spec(29))
    begin_with(model, check_origin(config))
    assert model.state_dict()["blocks.0.attention.log_temperature"].exp() == pytest.approx(2.0)


def test_a_run_goes_on_when_the_folder_it_began_with_is_gone(exported, folder):
    config = load_config("small.yaml", [DATA, "model.init_from=model", "run.name=new"])
    resolve_sources(config)
    run = Run.create(config, "unused")
    shutil.rmtree(folder / "model")
    assert Run.open(run.path).config(("trainer.max_steps=9",)).performer_spec(29) == config.performer_spec(29)


def test_a_job_begins_with_the_model_until_it_has_a_checkpoint_of_its_own(exported, folder, publish):
    config = load_config("small.yaml", [DATA, "model.init_from=model", "run.name=new"])
    resolve_sources(config)
    run = Run.create(config, "unused").begin("slurm job 1, restart 0, on node1")
    run.record_data(identities(config))
    assert _begin(run, run.config()) == ("", str(folder / "model"))
    shutil.copytree(publish(3).path, run.checkpoints_dir / "step-00000003.ckpt")
    assert _begin(run, run.config()) == ("step-00000003.ckpt", "")


def test_what_differs_from_the_model_is_said_at_the_start(exported, capsys):
    changed = ("attention.kind=favor", "model.objective=causal", "model.rotary_base=1e6")
    check_origin(load_config("small.yaml", [DATA, "model.init_from=model", *changed]))
    said = capsys.readouterr().err
    assert "objective masked → causal" in said
    assert "attention exact → favor softmax" in said
    assert "rotary_base 500.0 → 1000000.0" in said


def test_a_model_that_does_not_fit_is_refused_in_one_sentence(exported, folder):
    with pytest.raises(ConfigError, match=r"model\.init_from: nowhere: no such run folder"):
        load_config("small.yaml", [DATA, "model.init_from=nowhere"])
    config = load_config("small.yaml", [DATA, "model.init_from=model"])
    shutil.move("model", "away")  # between a configuration's making and its start
    with pytest.raises(ConfigError, match=r"model\.init_from: model: no such run folder"):
        check_origin(config)
    shutil.move("away", "model")
    (folder / "book.txt").write_text("some text\n" * 50)
    config = load_config("small.yaml", ["data.train=book.txt", "model.init_from=model", "data.tokenizer=bytes"])
    with pytest.raises(ConfigError, match=r"a model of 29 protein tokens, but the data are read as 260 bytes tokens"):
        check_origin(config)
    config = load_config("small.yaml", [DATA, "model.init_from=model", "model.objective=fim"])
    with pytest.raises(ConfigError, match=r"=masked is not trained on with model\.objective=fim: .* take .*=causal"):
        check_origin(config)
    config = load_config("small.yaml", [DATA, "model.init_from=model", "model.dim=64"])
    with pytest.raises(RunError, match=r"is \(48, 32\), the configured model wants \(48, 64\)|wants"):
        begin_with(PerformerLM(config.performer_spec(29)), check_origin(config))


def test_more_positions_than_the_model_has_are_refused(folder, capsys):
    learned = ("model.position=learned", "model.max_positions=8")
    assert main(["fit", "small.yaml", DATA, *learned]) == 1
    assert "data.length=16 is more than the model has positions for (model.max_positions=8)" in capsys.readouterr().err
