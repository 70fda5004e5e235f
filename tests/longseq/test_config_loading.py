"""YAML files and overrides: what is read, in which order, and how what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.config.loading import described_keys, load_config, save_config
from longseq.config.schema import Config
from longseq.errors import ConfigError

pytestmark = pytest.mark.interfaces

DATA = "data:\n  train: [proteins.fasta]\n"  # two lines: what a test adds begins on line 3


@pytest.fixture
def load(folder: Path):
    """load(text, *overrides): the configuration of c.yaml with this text after DATA."""

    def load(text: str = "", *overrides: str, data: str = DATA) -> Config:
        Path("c.yaml").write_text(data + text)
        return load_config("c.yaml", overrides)

    return load


@pytest.fixture
def refusal(load):
    """refusal(text, *overrides): the one sentence that refuses it."""

    def refusal(text: str = "", *overrides: str, data: str = DATA) -> str:
        with pytest.raises(ConfigError) as refused:
            load(text, *overrides, data=data)
        sentence = str(refused.value)
        assert "\n" not in sentence
        assert sentence.endswith((".", "?"))
        return sentence

    return refusal


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def meaning(key: str) -> str:
    return next(about["meaning"] for section, name, about in described_keys() if f"{section}.{name}" == key)


# extends


def test_a_file_goes_before_what_it_extends_and_the_last_override_before_all(load):
    write("base.yaml", "optim: {lr: 0.1, clip: 2.0, eps: 0.5}\n")
    config = load("extends: base.yaml\noptim: {lr: 0.2, clip: 3.0}\n", "optim.lr=0.3", "optim.lr=0.4")
    assert (config.optim.lr, config.optim.clip, config.optim.eps) == (0.4, 3.0, 0.5)
    assert config.optim.weight_decay == Config().optim.weight_decay


def test_of_several_bases_the_later_goes_first(load):
    write("a.yaml", "optim: {lr: 0.1, clip: 1.5}\n")
    write("b.yaml", "optim: {lr: 0.2}\n")
    config = load("extends: [a.yaml, b.yaml]\n")
    assert (config.optim.lr, config.optim.clip) == (0.2, 1.5)


def test_a_base_is_found_beside_the_file_that_names_it(load):
    write("deep/er/base.yaml", "extends: ../common.yaml\noptim: {clip: 1.5}\n")
    write("deep/common.yaml", "optim: {lr: 0.2}\n")
    config = load("extends: deep/er/base.yaml\n")
    assert (config.optim.lr, config.optim.clip) == (0.2, 1.5)


def test_a_base_may_be_reached_on_two_ways(load):
    write("common.yaml", "optim: {lr: 0.2}\n")
    write("a.yaml", "extends: common.yaml\n")
    write("b.yaml", "extends: common.yaml\n")
    assert load("extends: [a.yaml, b.yaml]\n").optim.lr == 0.2


@pytest.mark.parametrize("via", ["c.yaml", "a.yaml"])
def test_files_that_extend_each_other_in_a_circle_are_refused(refusal, via):
    write("a.yaml", "extends: c.yaml\n")
    sentence = refusal(f"extends: {via}\n")
    assert "extends itself" in sentence
    assert via in sentence


@pytest.mark.parametrize("bases", ["missing.yaml", "[missing.yaml]", "."])
def test_a_base_that_is_no_file_is_refused_with_the_line_that_names_it(refusal, bases):
    sentence = refusal(f"extends: {bases}\n")
    assert sentence.startswith("c.yaml:3: extends")
    assert "no such file" in sentence


@pytest.mark.parametrize("bases", ["", "3", "{a: 1}", "[3]"])
def test_a_base_is_a_name_or_a_list_of_names(refusal, bases):
    sentence = refusal(f"extends: {bases}\n")
    assert sentence.startswith("c.yaml:3: extends")
    assert "name a YAML file" in sentence


def test_an_unknown_key_in_a_base_is_shown_in_the_base(refusal):
    write("base.yaml", "optim:\n  lr: 0.1\n  clipp: 2.0\n")
    assert refusal("extends: base.yaml\n").startswith("base.yaml:3: unknown key 'optim.clipp'")


# unknown names


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trainer.device", "trainer.devices"),
        ("trainer.max_step", "trainer.max_steps"),
        ("optim.learning_rate", "optim.lr"),  # by its meaning
        ("optim.warmup", "optim.warmup_steps"),
        ("data.batch_size", "data.batch_tokens"),
        ("model.features", "attention.features"),  # in the wrong section
        ("trainer.lr", "optim.lr"),
        ("devices", "trainer.devices"),  # without its section
        ("run.root", "run.dir"),  # a word of other keys' meanings too: root mean square
        ("trainer.default_root_dir", "run.dir"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_key_and_its_meaning(refusal, wrong, right):
    section, _, name = wrong.rpartition(".")
    text = f"{section}:\n  {name}: 1\n" if section else f"\n{name}: 1\n"
    hint = f"unknown key {wrong!r}. Did you mean {right} ({meaning(right)})?"
    if section != "data":
        assert refusal(text) == f"c.yaml:4: {hint}"
    assert refusal("", f"{wrong}=1") == f"argument '{wrong}=1': {hint}"


def test_a_key_like_no_other_gets_no_far_fetched_suggestion(refusal):
    sentence = refusal("model:\n  zzqq: 1\n")
    assert sentence == "c.yaml:4: unknown key 'model.zzqq'. `longseq fit --help` lists the keys."


@pytest.mark.parametrize(("wrong", "right"), [("trainr", "trainer"), ("optimizer", "optim"), ("Model", "model")])
def test_an_unknown_section_is_refused_with_the_nearest_section_and_its_keys(refusal, wrong, right):
    sentence = refusal(f"{wrong}:\n  x: 1\n")
    assert sentence.startswith(f"c.yaml:3: unknown section {wrong!r}. Did you mean {right} (")
    first = next(name for section, name, _ in described_keys() if section == right)
    assert first in sentence


@pytest.mark.parametrize("text", ["model:\n", "model: 3\n", "model: [dim]\n", "deepspeed:\n", "deepspeed: 3\n"])
def test_a_section_without_keys_is_refused(refusal, text):
    section = text.partition(":")[0]
    assert refusal(text) == f"c.yaml:3: {section} is a section, it needs keys below it."


@pytest.mark.parametrize("argument", ["trainer.devices", "=3", "fast"])
def test_an_argument_that_is_no_override_is_refused(refusal, argument):
    assert refusal("", argument).startswith(f"argument '{argument}': an override is section.key=value")


# values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.devices", "two", "a whole number"),
        ("trainer.devices", "2.5", "a whole number"),
        ("trainer.devices", "true", "a whole number"),
        ("trainer.devices", "[2]", "a whole number"),
        ("trainer.devices", "null", "a whole number"),
        ("optim.lr", "fast", "a number"),
        ("attention.qk_norm", "maybe", "true or false"),
        ("optim.betas", "0.9", "a list of numbers"),
        ("optim.betas", "[0.9, much]", "a list of numbers"),
        ("model.preset", "[tiny]", "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_and_the_meaning(refusal, key, value, expected):
    section, _, name = key.partition(".")
    for sentence in (refusal(f"{section}:\n  {name}: {value}\n"), refusal("", f"{key}={value}")):
        assert sentence.startswith(("c.yaml:4: ", f"argument '{key}={value}': "))
        assert f"{key}=" in sentence
        assert f"is not {expected}: {meaning(key)}." in sentence


@pytest.mark.parametrize(
    ("key", "value", "bounds"),
    [
        ("trainer.devices", "0", "at least 1"),
        ("model.dropout", "1.0", "at least 0 and below 1"),
        ("trainer.zero_stage", "4", "at least 0 and below 4"),
        ("run.seed", "-1", "at least 0"),
        ("optim.lr", ".inf", "a finite number"),
        ("optim.lr", ".nan", "a finite number"),
    ],
)
def test_a_value_beyond_its_limits_is_refused_with_them(refusal, key, value, bounds):
    section, _, name = key.partition(".")
    sentence = refusal(f"{section}:\n  {name}: {value}\n")
    assert sentence.startswith(f"c.yaml:4: {key}=")
    assert f"must be {bounds}: {meaning(key)}." in sentence
    assert f"must be {bounds}" in refusal("", f"{key}={value}")


def test_the_place_shown_is_that_of_the_value_that_counts(refusal):
    write("base.yaml", "trainer: {devices: 2}\n")
    assert refusal("extends: base.yaml\ntrainer: {devices: 0}\n").startswith("c.yaml:4: trainer.devices=0")
    assert refusal("trainer: {devices: 2}\n", "trainer.devices=0").startswith(
        "argument 'trainer.devices=0' must be at least 1"
    )


def test_a_value_that_is_no_choice_is_refused_with_the_choices_and_the_nearest(refusal):
    sentence = refusal("attention:\n  kernel: sofmax\n")
    assert sentence.startswith("c.yaml:4: attention.kernel=sofmax: choose from softmax, hyperbolic, ")
    assert sentence.endswith("identity, elu. Did you mean softmax?")


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_a_number_may_be_written_as_scientists_do(load, written):
    assert load(f"optim:\n  lr: {written}\n").optim.lr == 0.001
    assert load("", f"optim.lr={written}").optim.lr == 0.001


@pytest.mark.parametrize(
    ("written", "sources"),
    [
        ("a.fasta", ["a.fasta"]),
        ("[a.fasta,b.fasta.gz]", ["a.fasta", "b.fasta.gz"]),
        ("*.fasta.gz", ["*.fasta.gz"]),
        ('["*.fasta.gz", b.fasta]', ["*.fasta.gz", "b.fasta"]),
        ("/a=b/c.fasta", ["/a=b/c.fasta"]),
        ("https://host/a.fasta?x=1", ["https://host/a.fasta?x=1"]),
        ("~/a.fasta", ["~/a.fasta"]),
    ],
)
def test_sources_are_written_as_a_shell_or_a_list_would(load, written, sources):
    assert load("", f"data.train={written}").data.train == sources


TEXTS = ["my #1.fasta", "2024", "@at.fasta", "0123", "NO", "1e3", "2024-01-01", "null", "true", "12:30", "1_000"]
TEXTS += [
    "%.fasta",
    "&a.fasta",
    "!x",
    "a: b",
    "`x`",
    "it's.fasta",
    "a]b",
    "[ab]*.fasta",
    "[ab][cd]",
    "- x",
    "{a}",
    "a,b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_is_written(load, text):
    assert load("", f"data.train={text}").data.train == [text]
    assert load("", f"data.train='{text}'" if "'" not in text else f'data.train="{text}"').data.train == [text]
    if text != "null":
        assert load("", f"run.name={text}").run.name == text
    quoted = text.replace("'", "''")
    assert load("", f"data.train=['{quoted}', b]").data.train == [text, "b"]
    assert load(f"  valid: ['{quoted}', b]\n", data=DATA).data.valid == [text, "b"]


@pytest.mark.parametrize("text", [text for text in TEXTS if not any(letter in text for letter in "[],")])
def test_a_text_in_a_list_needs_no_quotes(load, text):
    assert load("", f"data.train=[{text}, b.fasta,{text}]").data.train == [text, "b.fasta", text]


PLAIN = ["0123", "NO", "012", "1e3", "2024-01-01", "null", "true", "12:30", "1_000", "~", "0x1F", ".5"]


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_in_a_file_is_what_is_written_and_survives_the_run(load, folder, text):
    config = load(f"  valid: [{text}, b]\n  ood: {text}\n")
    assert (config.data.valid, config.data.ood) == ([text, "b"], [text])
    if text not in ("null", "~"):
        config.run.name = load(f"run: {{name: {text}}}\n").run.name
        assert config.run.name == text
    save_config(config, folder / "saved.yaml")
    assert load_config("saved.yaml") == config


def test_a_list_in_an_argument_may_hold_brackets_commas_and_escapes(load):
    assert load("", "data.train=[a[1,2].fasta, 'b, c', \"d\\u00e9\"]").data.train == ["a[1,2].fasta", "b, c", "d\u00e9"]
    assert load("", "data.ood=[]").data.ood == []
    assert load("", "data.ood=[a,]").data.ood == ["a"]


@pytest.mark.parametrize(
    ("written", "why"),
    [("012", "octal"), ("1:30", "base of 60"), ("NO", "whole number"), ("2024-01-01", "whole number")],
)
def test_a_number_that_yaml_reads_otherwise_than_people_is_refused(refusal, written, why):
    for key in ("trainer.devices", "optim.lr") if why != "whole number" else ("trainer.devices",):
        section, _, name = key.partition(".")
        sentence = refusal(f"{section}:\n  {name}: {written}\n")
        assert sentence.startswith(f"c.yaml:4: {key}")
        assert why in sentence
        assert why in refusal("", f"{key}={written}")


def test_a_switch_is_true_or_false_and_no_other_number(load, refusal):
    assert load("  strict: NO\n").data.strict is False
    assert load("attention: {qk_norm: yes}\n").attention.qk_norm is True
    assert "is not true or false" in refusal("attention: {qk_norm: 2}\n")
    assert "is not true or false" in refusal("", "attention.qk_norm=012")


@pytest.mark.parametrize("key", ["run.name", "run.dir", "data.column", "data.train", "data.tokenizer"])
def test_an_empty_text_is_refused(refusal, key):
    assert refusal("", f"{key}=").startswith(f"argument '{key}=': {key}")


def test_a_text_with_a_nul_or_half_a_letter_is_refused(refusal):
    assert "a NUL" in refusal('run: {name: "a\\0b"}\n')
    assert "not UTF-8" in refusal("", "data.train=prot\udce9ines.fasta")


@pytest.mark.parametrize(("flat", "nested"), [
    ("optim.lr: 0.1\n", "write optim: with lr: below it"),
    ("optim: {optim.lr: 0.1}\n", "write optim: with lr: below it"),
    ("deepspeed.fp16.loss_scale: 3\n", "write deepspeed: with fp16: with loss_scale: below it"),
])  # fmt: skip
def test_a_key_written_flat_in_a_file_is_told_how_to_nest(refusal, flat, nested):
    sentence = refusal(flat)
    assert sentence.startswith("c.yaml:3: ")
    assert nested in sentence


def test_a_whole_number_beyond_64_bits_is_refused(refusal):
    assert "at most 2**63 - 1" in refusal("", f"run.seed={10**30}")


def test_a_single_path_in_a_file_needs_no_brackets(load):
    assert load(data="data:\n  train: a.fasta\n").data.train == ["a.fasta"]


def test_text_that_looks_like_a_number_stays_text(load):
    assert load("", "run.name=123").run.name == "123"


def test_deepspeed_takes_anything(load):
    config = load("deepspeed:\n  zero_optimization: {overlap_comm: true}\n  new: [1, {x: y}]\n", "deepspeed.a.b=3")
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}, "new": [1, {"x": "y"}], "a": {"b": 3}}


def test_a_value_may_refer_to_another(load):
    config = load("run: {seed: 7, name: 'seed-${run.seed}'}\n", "run.seed=8")
    assert config.run.name == "seed-8"


def test_a_reference_to_nothing_is_refused_with_its_place(refusal):
    sentence = refusal("run:\n  name: seed-${run.sed}\n")
    assert sentence.startswith("c.yaml:4: run.name: ")
    assert "run.sed" in sentence
    assert "run.sed" in refusal("run:\n  name: seed-${run.sed\n")


# files


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {dim: 4\n", "c.yaml:4: not valid YAML: "),
        ("model:\n\tdim: 3\n", "c.yaml:4: not valid YAML: "),
        ("model:\n  dim: 4\n  dim: 8\n", "c.yaml:5: not valid YAML: while constructing a mapping, found duplicate key"),
        ("data:\n  length: 4\n", "c.yaml:3: not valid YAML: while constructing a mapping, found duplicate key data"),
        ("---\nmodel: {dim: 4}\n", "c.yaml:3: not valid YAML: expected a single document in the stream, but found"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(refusal, text, sentence):
    assert refusal(text).startswith(sentence)


def test_an_override_that_is_no_yaml_is_refused_with_what_to_do(refusal):
    for value in ("[a.fasta,b.fasta", "['a.fasta,b.fasta]", "[a[.fasta,b.fasta]"):
        sentence = refusal("", f"data.train={value}")
        assert sentence.startswith(f"argument {f'data.train={value}'!r}: not valid YAML: a ")
        assert "is opened and not closed. Close what is opened" in sentence
    assert "not valid YAML" in refusal("", "optim.betas=[0.9, 0.98")


def test_an_empty_file_is_the_defaults(load, refusal):
    assert load("", "data.train=a.fasta", data="").optim == Config().optim
    assert "data.train is empty" in refusal("", data="# nothing but a remark\n")


def test_a_list_or_a_word_is_no_configuration(refusal):
    assert refusal(data="- model\n") == "c.yaml: a configuration is a mapping of sections, this is a list."
    assert refusal(data="hello\n") == "c.yaml: unknown key 'hello'. `longseq fit --help` lists the keys."


def test_a_file_that_cannot_be_read_is_refused(folder):
    Path("latin.yaml").write_bytes(b"# \xe9\n")
    for name, sentence in {
        "missing.yaml": "missing.yaml: no such file",
        ".": "cannot be read",
        "latin.yaml": "latin.yaml: cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            load_config(name)


# and back


def test_a_saved_configuration_is_read_back_as_it_was(load, folder):
    odd = ["null", "1e5", "no", "a: b", "#c", "*.fa", "12:30:45", "it's", "é"]
    config = load(
        "deepspeed: {a: {b: [1, 2.5, null, true]}}\n", "optim.lr=1e-7", "model.dim=24", "attention.qk_norm=true"
    )
    config.data.train, config.run.name = odd, "true"
    save_config(config, folder / "saved.yaml")
    assert load_config("saved.yaml") == config
    assert [path.name for path in folder.glob("*saved*")] == ["saved.yaml"]


# saving


def test_the_file_of_a_run_gets_no_keys_of_later_versions_but_those_that_say_something(load):
    """Jobs go on with the code of their submission, which refuses what it does not know."""
    save_config(load(), Path("run.yaml"))
    whole = Path("run.yaml").read_text()
    later = ("  fim_rate: null\n", "  reverse: 0.0\n", "  base_dim: null\n", "  benchmarks: []\n")
    before = whole
    for line in later:
        assert before.count(line) == 1
        before = before.replace(line, "")
    Path("run.yaml").write_text(before)
    save_config(load_config("run.yaml", ["trainer.max_steps=77"], resolved=True), Path("run.yaml"))
    assert Path("run.yaml").read_text() == before.replace("max_steps: 1000", "max_steps: 77")
    save_config(load_config("run.yaml", ["data.reverse=0.5"], resolved=True), Path("run.yaml"))
    assert load_config("run.yaml", resolved=True).data.reverse == 0.5
    assert "fim_rate" not in Path("run.yaml").read_text()
