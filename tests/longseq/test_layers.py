"""The key attention.layers: what is inherited, what is refused and where, and what becomes of it in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.attention.options import AttentionOptions
from longseq.config.loading import load_config, save_config
from longseq.config.schema import Config
from longseq.errors import ConfigError
from longseq.launch.before import _attention

DATA = "model: {preset: small}\ndata: {train: [proteins.fasta]}\n"  # a depth of 4; what a test adds begins on line 3


@pytest.fixture
def load(folder):
    """load(text, *overrides): the configuration of c.yaml with this text after DATA."""

    def load(text: str = "", *overrides: str) -> Config:
        Path("c.yaml").write_text(DATA + text)
        return load_config("c.yaml", overrides)

    return load


def options(config: Config) -> list[tuple[str, int, int, str]]:
    return [(o.kind, o.window, o.features, o.kernel) for o in config.performer_spec(29).plan]


def test_a_layer_has_of_the_section_what_it_does_not_name(load):
    text = "attention:\n  window: 32\n  layers: [favor, {features: 64, kernel: relu}, {window: 0}, exact]\n"
    assert options(load(text)) == [
        ("favor", 32, 256, "softmax"),
        ("favor", 32, 64, "relu"),
        ("favor", 0, 256, "softmax"),
        ("exact", 32, 256, "softmax"),
    ]
    over = ("attention.layers=[exact,{kind: favor, features: 0}]", "attention.kernel=elu", "model.depth=5")
    kinds = [("exact", 32, 256, "elu"), ("favor", 32, 0, "elu")]
    assert options(load(text, *over)) == [kinds[n % 2] for n in range(5)]
    modern = load("attention: {layers: [favor, {qk_norm: false}]}\n", "model.block=modern").performer_spec(29)
    assert [o.qk_norm for o in modern.plan] == [True, False] * 2


def test_without_a_plan_the_layers_are_the_section(load):
    config = load("attention: {window: 8}\n")
    spec = config.performer_spec(29)
    assert (config.attention.layers, spec.layers, spec.plan) == (None, (), (spec,) * 4)
    assert load("attention: {layers: [favor, exact]}\n", "attention.layers=null").performer_spec(29).layers == ()


def test_a_plan_comes_back_from_the_file_that_a_run_keeps(load):
    config = load("attention:\n  layers: [{kind: favor, window: 64, learned_decay: yes}, exact]\n")
    save_config(config, Path("kept.yaml"))
    assert load_config("kept.yaml", resolved=True) == config
    assert config.performer_spec(29).layers[0] == AttentionOptions(window=64, learned_decay=True)
    assert _attention(config) == "layers 0, 2: favor softmax; layers 1, 3: exact"


@pytest.mark.parametrize(
    ("layers", "line", "sentence"),
    [
        ("[favor, performer]", 4, "attention.layers[1]=performer: choose from favor, exact."),
        ("\n  - favor\n  - exat", 6, "attention.layers[1]=exat: choose from favor, exact. Did you mean exact?"),
        ("[]", 4, "attention.layers=[]: an empty plan; write kinds, or mappings"),
        ("[favor, [exact]]", 4, "attention.layers[1]=['exact']: not a layer; write kinds"),
        ("[favor, {}]", 4, "attention.layers[1]={}: not a layer"),
        ("\n  - favor\n  - kind: favor\n    windw: 3", 7, "unknown key 'attention.layers[1].windw'. Did you mean"),
        ("[{backend: torch}]", 4, "unknown key 'attention.layers[0].backend'. A layer has kind, kernel, features, "),
        ("[{window: wide}]", 4, "attention.layers[0].window=wide is not a whole number: exact attention to keys"),
        ("[{window: 1.5}]", 4, "attention.layers[0].window=1.5 is not a whole number"),
        ("[{learned_decay: maybe}]", 4, "attention.layers[0].learned_decay=maybe is not true or false"),
        ("[{window: -1}]", 4, "attention.layers[0].window=-1 must be at least 0"),
        ("[{kind: favour}]", 4, "attention.layers[0].kind=favour: choose from favor, exact. Did you mean favor?"),
    ],
)  # fmt: skip
def test_what_no_layer_can_be_is_refused_with_its_file_and_line(load, layers, line, sentence):
    with pytest.raises(ConfigError) as refused:
        load(f"attention:\n  layers: {layers}\n")
    assert str(refused.value).startswith(f"c.yaml:{line}: {sentence}")
    assert "\n" not in str(refused.value)
    if "\n" not in layers:
        with pytest.raises(ConfigError) as refused:
            load("", argument := f"attention.layers={layers}")
        assert str(refused.value).startswith(f"argument {argument!r}: ")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["attention.layers=[favor,exact,favor,exact,favor]"], "attention.layers has 5 layers and the model has 4"),
        (["attention.layers=[exact,{features: 0}]"], "attention.layers[1].features must be an integer from 1"),
        (
            ["attention.layers=[exact,{kernel: gelu}]", "model.objective=masked", "data.reset=true"],
            "data.reset=true and attention.layers[1].kernel=gelu with a masked objective",
        ),
    ],
)
def test_layers_that_do_not_go_with_other_keys_are_refused(load, overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        load("", *overrides)
    assert sentence in str(refused.value)


def test_a_key_that_every_layer_has_of_its_own_is_refused_on_top_of_the_plan(load):
    plan = "attention:\n  kind: exact\n  layers: [favor, {kind: exact, window: 3}]\n"
    assert options(load(plan, "attention.window=7")) == [("favor", 7, 256, "softmax"), ("exact", 3, 256, "softmax")] * 2
    with pytest.raises(ConfigError) as refused:
        load(plan, "attention.kind=exact")
    assert str(refused.value) == (
        "argument 'attention.kind=exact': attention.kind would change nothing: each of attention.layers (c.yaml:5) has "
        "a kind of its own; change it there, or set attention.layers=null too."
    )
    assert {kind for kind, *_ in options(load(plan, "attention.kind=exact", "attention.layers=null"))} == {"exact"}


def test_a_number_of_layers_is_still_called_depth(load):
    for key in ("model.layers", "layers", "n_layers"):
        with pytest.raises(ConfigError, match=r"Did you mean model\.depth"):
            load("", f"{key}=12")
    with pytest.raises(ConfigError, match=r"Did you mean attention\.layers"):
        load("", "attention.layer_types=[favor]")
