"""The README speaks of what there is: verbs, options, keys and files."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

from longseq.cli import VERBS, main
from longseq.commands.bench import BENCHMARKS
from longseq.commands.data import ACTIONS
from longseq.config import Config
from longseq.config_loading import described_keys

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHERS = {"--logdir"}  # TensorBoard's


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_every_verb_benchmark_and_action_on_data_is_in_the_readme():
    for name in VERBS:
        assert re.search(rf"`(longseq )?{name}\b", README), name
    for name in (*BENCHMARKS, *ACTIONS):
        assert re.search(rf"\b{name}\b", README), name


def test_every_option_in_the_readme_is_one_of_a_verb(capsys):
    groups = [(verb,) for verb in VERBS], [("bench", name) for name in BENCHMARKS], [("data", name) for name in ACTIONS]
    known = set()
    for words in chain(*groups):
        known |= set(re.findall(r"--[a-z][a-z-]+", help_of(*words, capsys=capsys)))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert used - known - OTHERS == set()


def test_every_key_in_the_readme_is_one_of_a_configuration():
    known = {f"{section}.{name}" for section, name, _ in described_keys()}
    sections = "|".join(sorted(vars(Config())))
    used = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)\b(?![./(])", README))
    assert len(used) > 40
    files = {"data.json", "model.safetensors"}
    assert {name for name in used - known - files if not name.startswith("deepspeed.")} == set()


def test_every_configuration_is_in_the_readme_and_the_other_way_round():
    named = set(re.findall(r"[a-z0-9_-]+\.yaml", README))
    there = {path.name for path in (*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("slurm/sites/*.yaml"))}
    generic = {"config.yaml", "other.yaml", "mycluster.yaml"}
    assert named - there - generic == set()
    prepare = {path.name for path in ROOT.glob("configs/prepare/*.yaml")}  # named as a whole
    assert there - named - prepare == set()
