"""trainer.benchmarks: the curves are what the commands say of the checkpoints, and the training is as without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import longseq as api
from command_line import curve
from longseq.config.loading import load_config
from longseq.data import identities, resolve_sources
from longseq.errors import ConfigError
from longseq.evaluation.field.chains import spread
from longseq.evaluation.field.measures import spearman
from longseq.runs.run import Run
from longseq.training.benchmarks import shared, watched
from longseq.training.callbacks import benchmarks
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread")

WILD = "MKVLAACDEFGHIKLMNPQRSTVWY"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
TINY = (
    *("model.dim=32", "model.depth=2", "model.heads=2", "model.ffn_dim=48", "model.dropout=0.1"),
    *("attention.features=16", "attention.redraw_every=3", "optim.lr=0.02", "optim.warmup_steps=1"),
    *("trainer.strategy=single", "trainer.max_steps=6", "trainer.checkpoint_every=2", "trainer.valid_every=4"),
    *("trainer.probe_every=0", "trainer.peak_tflops=1", "trainer.log_every=1", "trainer.keep_checkpoints=9"),
)
LISTED = """  benchmarks:
  - {kind: variants, path: scan.csv, wild_type: wild.fasta, every: 2}
  - {kind: proteingym, path: gym, every: 4, assays: [ONE], name: gym}
  - {kind: contacts, path: chains.jsonl, every: 4, train: 3, records: 5, method: jacobian}
  - {kind: structure, path: chains.jsonl, every: 3, train: 3, name: states}
"""


@pytest.fixture
def here(folder) -> Path:
    """What the benchmarks read."""
    rng = np.random.default_rng(3)
    rows = ["mutant,DMS_score"]
    for at, letter in enumerate(WILD, 1):
        rows += [f"{letter}{at}{new},{rng.normal():.4f}" for new in rng.choice(list(LETTERS), 2) if new != letter]
    (folder / "scan.csv").write_text("\n".join(rows) + "\n")
    (folder / "wild.fasta").write_text(f">w\n{WILD}\n")
    (folder / "gym").mkdir()
    (folder / "gym/one.csv").write_text("\n".join(rows) + "\n")
    reference = ["DMS_id,DMS_filename,target_seq,UniProt_ID,coarse_selection_type"]
    reference += [f"{name},{name.lower()}.csv,{WILD},P,Activity" for name in ("ONE", "TWO")]
    (folder / "gym/DMS_substitutions.csv").write_text("\n".join(reference) + "\n")
    with (folder / "chains.jsonl").open("w") as file:
        for number in range(7):
            letters = "".join(rng.choice(list(LETTERS), size=20 + number))
            pairs = [(i, j) for i in range(20) for j in range(i + 6, 20) if rng.random() < 0.2]
            states = "".join(rng.choice(list("HE-"), size=20 + number))
            row = {"id": f"c{number}", "sequence": letters, "contacts": pairs, "secondary_structure": states}
            file.write(json.dumps(row) + "\n")
    return folder


def trained(here: Path, name: str, *overrides: str, listed: str = LISTED, resumed: bool = False) -> Run:
    (here / "b.yaml").write_text((here / "small.yaml").read_text() + "extends: small.yaml\n" if not listed else listed)
    (here / "b.yaml").write_text("extends: small.yaml\n" + (f"trainer:\n{listed}" if listed else ""))
    config = load_config("b.yaml", [f"data.train={here}/proteins.fasta", f"run.name={name}", *TINY, *overrides])
    resolve_sources(config)
    run = Run.open(here / "runs" / name) if resumed else Run.create(config, default_name="unused")
    if not resumed:
        run.record_data(identities(config))
    assert fit(run, config, run.last_good() if resumed else None, StopFlag())
    return run


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_curves_are_those_of_the_checkpoints_and_change_no_weight(here, objective):
    given = f"model.objective={objective}"
    run, plain = trained(here, "with", given), trained(here, "without", given, listed="")
    for one, other in zip(run.checkpoints(), plain.checkpoints(), strict=True):
        for name in ("model.safetensors", "training/rank-00000.safetensors"):
            if name == "model.safetensors" or (one.path / name).exists():
                assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), (one.step, name)
    at = {each.step: each.path for each in run.checkpoints()}
    by_step = curve(run.path, "benchmark/scan/spearman")
    assert list(by_step) == [2, 4, 6]
    for step, value in by_step.items():
        rows = list(api.variant_effects(at[step], "wild.fasta", table="scan.csv"))
        effects, measured = np.array([(row.effect, row.measured) for row in rows]).T
        assert value == pytest.approx(spearman(measured, effects), abs=1e-7)
    assert len({round(value, 6) for value in by_step.values()}) == 3
    found = api.benchmark_proteingym("gym", at[4], assays=["ONE"], out=here / "kept")
    expected = found.models[0].averages("substitutions").average
    assert curve(run.path, "benchmark/gym/spearman") == pytest.approx({4: expected}, abs=1e-7)
    (model,) = api.benchmark_contacts("chains.jsonl", at[4], methods=["jacobian"], train=3, records=5).models
    assert len(model.chains["jacobian"]) == 5
    for name, share in (("short", "L"), ("all", "L/5")):
        points = curve(run.path, f"benchmark/chains/{name}_{share.replace('/', '')}")
        assert points == pytest.approx({4: model.precision["jacobian"][name][share]}, abs=1e-7)
    (model,) = api.benchmark_structure("chains.jsonl", at[6], train=3).models
    assert curve(run.path, "benchmark/states/accuracy")[6] == pytest.approx(model.probe.accuracy, abs=1e-7)
    assert sorted(curve(run.path, "time/benchmark_seconds")) == [2, 3, 5, 6]  # step 4's follow a validation
