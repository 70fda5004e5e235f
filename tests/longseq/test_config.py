"""What the schema says of itself, the arithmetic across keys, and every configuration that is shipped."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from longseq.config.flat import load_flat
from longseq.config.loading import described_keys, load_config
from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.models.presets import PRESETS
from longseq_data.prepare.config import PrepareConfig

SHIPPED = Path(__file__).parents[2] / "configs"
PREPARE = sorted((SHIPPED / "prepare").glob("*.yaml"))
EXPERIMENTS = sorted((SHIPPED / "experiments").glob("*.yaml"))
RUNS = sorted(path for path in SHIPPED.rglob("*.yaml") if path not in [*PREPARE, *EXPERIMENTS])
TRAIN = "data.train=proteins.fasta"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(SHIPPED)))
def test_a_shipped_configuration_loads_and_its_model_can_be_built(path):
    config = load_config(path, [TRAIN])
    assert config.data.train == ["proteins.fasta"]
    assert config.performer_spec(29).parameter_count > 0


def test_configurations_are_shipped():
    assert {path.parent.name for path in RUNS} == {"protein", "genome", "text", "pixels"}
    assert len(PREPARE) == 2


@pytest.mark.parametrize("path", PREPARE, ids=lambda path: path.name)
def test_a_shipped_preparation_loads_and_a_run_trains_on_what_it_makes(path):
    config = load_flat(PrepareConfig, path, [], "longseq data prepare --help")
    config.check()
    run = load_config(SHIPPED / "protein" / path.name, [])
    assert run.data.train == [config.output]
    for name in ("valid_fraction", "test_fraction"):  # those of the corpus, or not said
        assert getattr(run.data, name) in (getattr(config, name), getattr(Config().data, name))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(SHIPPED)))
def test_a_comment_beside_batch_tokens_is_their_arithmetic(path):
    """batch_tokens: N  # a things * b things: the product of the numbers is N."""
    for tokens, comment in re.findall(r"batch_tokens: (\d+) *# (.*\*.*)", path.read_text()):
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d|\d", comment)]
        assert math.prod(numbers) == int(tokens), comment


def test_every_key_says_what_it_means():
    described = list(described_keys())
    assert len(described) > 30
    assert [f"{s}.{k}" for s, k, about in described if len(about["meaning"]) < 10] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_tells_its_true_size(preset, folder):
    spec = load_config("small.yaml", [TRAIN, f"model.preset={preset}"]).performer_spec(29)
    said = float(re.search(r"([\d.]+) M parameters", PRESETS[preset].about)[1])
    assert spec.parameter_count / 1e6 == pytest.approx(said, rel=0.06)


def test_sizes_given_one_by_one_replace_those_of_the_preset(folder):
    sizes = ["model.dim=24", "model.depth=3", "model.heads=6", "model.ffn_dim=50"]
    spec = load_config("small.yaml", [TRAIN, *sizes]).performer_spec(29)
    assert (spec.dim, spec.depth, spec.heads, spec.ffn_dim, spec.head_dim) == (24, 3, 6, 50, 4)


def test_a_step_is_shared_among_processes_and_accumulated_batches(folder):
    config = load_config(
        "small.yaml",
        [TRAIN, "data.length=512", "data.batch_tokens=49152", "trainer.devices=3", "trainer.accumulate=4"],
    )
    assert config.samples_per_step == 96
    assert config.batch_sequences == 8


def test_processes_of_a_group_share_their_sequences(folder):
    step = ["data.length=510", "data.batch_tokens=8160", "trainer.devices=8", "trainer.context_parallel=4"]
    config = load_config("small.yaml", [TRAIN, *step, "trainer.accumulate=2"])
    assert config.samples_per_step == 16
    assert config.replicas == 2
    assert config.batch_sequences == 4
    assert config.slice_length == 128


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.length=100", "data.batch_tokens=1050"], ["1050", "100"]),
        (["data.length=16", "data.batch_tokens=64", "trainer.devices=3"], ["64", "16", "4 sequences", "3 processes"]),
        (["data.length=7", "data.batch_tokens=70", "trainer.devices=4", "trainer.accumulate=3"], ["10 sequences"]),
        (["data.length=512", "data.batch_tokens=17"], ["17", "512"]),
        (
            ["data.length=16", "data.batch_tokens=48", "trainer.devices=4", "trainer.context_parallel=2"],
            ["3 sequences", "2 groups of trainer.context_parallel=2 processes"],
        ),
    ],
)
def test_a_step_that_cannot_be_shared_is_refused_with_numbers_that_work(folder, overrides, said):
    with pytest.raises(ConfigError) as refused:
        load_config("small.yaml", [TRAIN, *overrides])
    sentence = str(refused.value)
    assert all(words in sentence for words in [*said, "data.batch_tokens", "data.length"]), sentence
    suggested = re.search(r"take (?:data\.batch_tokens=)?(\d+)\.$", sentence)
    assert suggested, sentence
    config = load_config("small.yaml", [TRAIN, *overrides, f"data.batch_tokens={suggested[1]}"])
    ranks = config.trainer.devices // config.trainer.context_parallel * config.trainer.accumulate
    assert config.batch_sequences * ranks * config.data.length == int(suggested[1])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.train=[]"], "data.train is empty"),
        (
            ["trainer.devices=6", "trainer.context_parallel=4"],
            r"trainer.context_parallel=4 does not divide the number of processes, 6 \(trainer.devices\)",
        ),
        (["trainer.context_parallel=2"], "trainer.context_parallel=2 does not divide the number of processes, 1 "),
        (
            ["trainer.devices=2", "trainer.context_parallel=2", "trainer.noise_every=5", "data.batch_tokens=4096"],
            "trainer.noise_every=5 and trainer.context_parallel=2: .*set trainer.noise_every=0",
        ),
        (["data.valid_fraction=0.6", "data.test_fraction=0.4"], r"0.6 \+ 0.4 leaves nothing to train on"),
        (["data.valid_fraction=0"], "nothing is held out to validate on"),
        (["optim.betas=[0.9]"], "two numbers"),
        (["optim.betas=[0.9, 1.0]"], "two numbers"),
        (
            ["model.position=learned", "model.max_positions=64", "model.rotary_base=1e6"],
            r"model.rotary_base=1e\+06 and model.position=learned: .* leave it out",
        ),
        (["model.dim=10", "model.heads=3"], "model.dim=10 is not divisible by model.heads=3"),
        (["model.dim=15", "model.heads=3"], "15 / 3 = 5 is odd"),
        (["data.reset=true", "data.packing=crop"], "data.reset=true and data.packing=crop: .*take data.packing=concat"),
        (["data.reverse=0.5", "model.objective=masked"], "a masked model reads both sides in any case; leave it out"),
        (["data.reverse=0.5", "model.objective=fim"], "=fim: what is filled in has one direction; leave it out"),
        (["data.fim_rate=0.3"], "data.fim_rate=0.3 is about model.objective=fim, .*=causal .*leave data.fim_rate out"),
        (["data.crop=first"], "data.crop=first and data.packing=concat: .*take data.packing=crop"),
        (["data.tokenizer=byte"], r"data.tokenizer=byte: choose from auto, protein, .* Did you mean bytes\?"),
        (["data.tokenizer=zzz"], "or name a tokenizer's .json file"),
        (["data.format=fasta", "data.tokenizer=bytes"], "data.format=fasta cannot be read as data.tokenizer=bytes"),
        (["data.format=text", "data.tokenizer=protein"], "choose from bytes, a tokenizer's file"),
        (["data.format=jsonl", "data.tokenizer=pixels"], "choose from bytes, a tokenizer's file, protein"),
        (["data.format=images", "data.tokenizer=a.json"], "choose from pixels"),
        (["data.format=text", "data.column=body"], "only jsonl, parquet, hub have columns; leave it out"),
        (["data.format=images"], "data.packing=concat with pixels: .* take data.packing=crop"),
        (
            ["data.format=images", "data.packing=crop", "data.image_size=4", "data.length=64", "data.batch_tokens=64"],
            r"data.length=64 .* data.image_size=4 makes 4 × 4 × 3 = 48 tokens; take data.length=48",
        ),
        (
            ["data.reset=true", "model.objective=masked", "attention.kernel=gelu"],
            "data.reset=true and attention.kernel=gelu with a masked objective",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(folder, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("small.yaml", [TRAIN, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.tokenizer=FILE.json", "data.format=lines"],
        ["data.format=parquet", "data.tokenizer=protein", "data.column=sequence"],
        ["data.format=images", "data.packing=crop", "data.image_size=4", "data.length=48", "data.batch_tokens=48"],
        ["data.reset=true", "model.objective=masked", "attention.kernel=gelu", "attention.kind=exact"],
        ["data.packing=crop", "data.crop=first"],
    ],
)
def test_other_data_than_proteins_can_be_asked_for(folder, overrides):
    load_config("small.yaml", [TRAIN, *overrides])


def test_a_format_that_is_nearly_right_is_guessed(folder):
    with pytest.raises(ConfigError, match=r"data.format=json': choose from auto, fasta, .* Did you mean jsonl\?"):
        load_config("small.yaml", [TRAIN, "data.format=json"])


@pytest.mark.parametrize("remedy", ["data.valid=proteins.fasta", "trainer.valid_every=0"])
def test_without_a_held_out_share_validation_needs_files_or_none_of_it(folder, remedy):
    load_config("small.yaml", [TRAIN, "data.valid_fraction=0", remedy])


def test_the_defaults_lack_nothing_but_data(folder):
    (folder / "empty.yaml").write_text("")
    expected = Config()
    expected.data.train = ["proteins.fasta"]
    assert load_config("empty.yaml", [TRAIN]) == expected


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("zero_optimization", {"stage": 3}, "trainer.zero_stage"),
        ("gradient_clipping", 1.0, "optim.clip"),
        ("gradient_accumulation_steps", 2, "trainer.accumulate"),
        ("bf16", {"enabled": True}, "trainer.precision"),
        ("optimizer", {"type": "Adam"}, "optim section"),
    ],
)
def test_deepspeed_settings_that_contradict_our_keys_are_refused(name, value, ours):
    config = Config()
    config.data.train = ["a.fasta"]
    config.deepspeed = {name: value}
    with pytest.raises(ConfigError, match=rf"deepspeed\.{name}.* is set from .*{ours}"):
        config.check()


def test_other_deepspeed_settings_pass_through():
    config = Config()
    config.data.train = ["a.fasta"]
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    config.check()


@pytest.mark.parametrize(("length", "parts", "tile"), [(32_767, 1, 0), (32_768, 1, 4096), (2**20, 64, 0)])
def test_long_slices_are_computed_in_tiles_unless_it_is_said(folder, length, parts, tile):
    sizes = [f"data.length={length}", f"data.batch_tokens={length}", f"trainer.devices={parts}"]
    long = [TRAIN, *sizes, f"trainer.context_parallel={parts}"]
    assert load_config("small.yaml", long).performer_spec(29).tile == tile
    assert load_config("small.yaml", [*long, "model.sequence_tile=0"]).performer_spec(29).tile == 0
    on_gpus = load_config("small.yaml", long).performer_spec(29, on_cuda=True)
    assert on_gpus.tile == (65_536 if tile else 0)  # fewer and larger launches
    wide = [*long, "model.sequence_tile=100", "attention.window=64"]
    assert load_config("small.yaml", wide).performer_spec(29).tile == 128  # two windows
