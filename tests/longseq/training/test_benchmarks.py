"""trainer.benchmarks: the curves are what the commands say of the checkpoints, and the training is as without them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import longseq as api
from command_line import curve
from longseq.config.loading import load_config, save_config
from longseq.config.schema import Config
from longseq.config.training import TrainerConfig
from longseq.data import identities, resolve_sources
from longseq.errors import ConfigError, LongseqError
from longseq.evaluation.field.chains import spread
from longseq.evaluation.field.measures import spearman
from longseq.launch.before import check_benchmarks
from longseq.models.performer import PerformerLM
from longseq.runs.run import Run
from longseq.training.benchmarks import live, shared, watched
from longseq.training.callbacks.benchmarks import _as_read
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit
from longseq.training.vitals import Vitals

pytestmark = pytest.mark.usefixtures("one_thread")

WILD = "MKVLAACDEFGHIKLMNPQRSTVWY"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
OF_KEYS = {each.name: each for each in dataclasses.fields(TrainerConfig)}
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


def config_of(here: Path, listed: str, *overrides: str) -> Config:
    (here / "b.yaml").write_text("extends: small.yaml\n" + (f"trainer:\n{listed}" if listed else ""))
    config = load_config("b.yaml", [f"data.train={here}/proteins.fasta", *TINY, *overrides])
    resolve_sources(config)
    return config


class Told(Vitals):
    """Remembers what it is told. stop: is set at the third pass of benchmark chains."""

    def __init__(self, stop: StopFlag | None = None):
        super().__init__()
        self.stop = stop

    def at(self, doing: str) -> None:
        super().at(doing)
        said[doing] += 1
        if self.stop and said["benchmark chains"] == 3:
            self.stop.requested = True


said: Counter[str] = Counter()


def trained(here: Path, name: str, *overrides: str, listed: str = LISTED) -> Run:
    config = config_of(here, listed, f"run.name={name}", *overrides)
    run = Run.create(config, default_name="unused")
    run.record_data(identities(config))
    assert fit(run, config, None, StopFlag(), Told())
    return run


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_curves_are_those_of_the_checkpoints_and_change_no_weight(here, objective):
    given = f"model.objective={objective}"
    said.clear()
    run, plain = trained(here, "with", given), trained(here, "without", given, listed="")
    for one, other in zip(run.checkpoints(), plain.checkpoints(), strict=True):
        for name in ("model.safetensors", "training/rank-00000.safetensors"):
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), (one.step, name)
    assert said["benchmark chains"] > 5 * 20 * 20 * 26 // 4096, "each pass is a sign of life"
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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LongseqError("no number."), "no number."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the device's memory is too small for it (CUDA out of"),
    ],
)
def test_a_benchmark_that_cannot_be_measured_has_no_point_and_the_training_goes_on(
    here, capfd, monkeypatch, error, reason
):
    from longseq.evaluation import work

    def refused(*_):
        raise error

    monkeypatch.setattr(work.Effects, "rows", refused)
    run = trained(here, "one", listed=LISTED.replace("every: 3", "every: 2"))
    assert list(curve(run.path, "benchmark/states/accuracy")) == [2, 4, 6]
    with pytest.raises(KeyError):
        curve(run.path, "benchmark/scan/spearman")
    assert f"benchmark scan has no point at step 2: {reason}" in (warned := capfd.readouterr().err)
    assert " The training goes on." in warned


@pytest.mark.parametrize(
    ("entry", "refusal"),
    [
        ("{kind: variants, path: none.csv, wild_type: wild.fasta}", r"path=none\.csv: no such file"),
        ("{kind: proteingym, path: wild.fasta}", r"path=wild\.fasta: no such folder"),
        ("{kind: contact, path: chains.jsonl}", "choose from proteingym, variants, contacts, structure"),
        ("{kind: contacts, path: chains.jsonl, every: 0}", r"every=0 must be at least 1"),
        ("{kind: contacts, path: chains.jsonl, every: often}", "is not a whole number"),
        ("{kind: contacts, path: chains.jsonl, evry: 3}", "Did you mean every"),
        ("{kind: contacts, path: chains.jsonl, assays: [ONE]}", "assays is of proteingym, and kind is contacts"),
        ("{kind: variants, path: scan.csv}", "has no wild_type"),
        ("{kind: structure}", "has no path"),
        ("{kind: structure, path: chains.jsonl, name: a/b}", "it names curves"),
        ("chains.jsonl", "not a benchmark"),
    ],
)
def test_what_no_benchmark_can_be_is_refused_with_its_line(here, entry, refusal):
    listed = f"  max_steps: 6\n  benchmarks:\n  - {entry}\n"
    with pytest.raises(ConfigError, match=refusal) as refused:
        config_of(here, listed)
    assert str(refused.value).startswith("b.yaml:5: trainer.benchmarks[0]") or "b.yaml:5: unknown" in str(refused.value)


def test_files_are_read_before_the_training_begins(here):
    chains = (here / "chains.jsonl").read_text().splitlines()
    (here / "chains.jsonl").write_text("\n".join([*chains[:2], "{}"]))
    with pytest.raises(ConfigError, match=r"benchmarks\[0\]: .*/chains\.jsonl, line 3: no JSON object"):
        check_benchmarks(config_of(here, "  benchmarks: [{kind: contacts, path: chains.jsonl, train: 1}]\n"))
    (here / "chains.jsonl").write_text("\n".join(chains))
    check_benchmarks(config_of(here, "  benchmarks: [{kind: contacts, path: chains.jsonl, method: jacobian}]\n"))
    for kind in ("contacts", "structure"):
        with pytest.raises(ConfigError, match=r"benchmarks\[0\]: 7 chains, and 20 to learn from"):
            check_benchmarks(config_of(here, f"  benchmarks: [{{kind: {kind}, path: chains.jsonl}}]\n"))
    (here / "scan.csv").write_text("mutant,DMS_score\nA1V,3\n")
    with pytest.raises(ConfigError, match=r"scan\.csv, line 2: A1V does not fit"):
        check_benchmarks(config_of(here, LISTED))
    text = ("data.tokenizer=bytes", "data.format=lines")
    with pytest.raises(ConfigError, match=r"benchmarks\[0\]: about proteins, and the data are read as bytes"):
        check_benchmarks(config_of(here, LISTED, *text))
    positions = ("model.position=learned", "model.max_positions=26")
    with pytest.raises(ConfigError, match="27 tokens with its ends, and the model has positions for 26"):
        check_benchmarks(config_of(here, ONE, *positions))


ONE = "  benchmarks: [{kind: proteingym, path: gym, assays: [ONE]}]\n"


def test_assays_are_held_against_the_model_before_the_training_begins(here, capsys):
    one = here / "gym/one.csv"
    rows = one.read_text()
    one.write_text(f"{rows}A999V,3\n")
    with pytest.raises(ConfigError, match=r"one\.csv, line 51: A999V does not fit: ONE has 25 residues"):
        check_benchmarks(config_of(here, ONE))
    one.write_text(f"mutated_sequence,DMS_score\n{WILD[1:]},1\n{WILD}ACDEFACDEF,2\n")
    check_benchmarks(config_of(here, ONE))
    positions = ("model.position=learned", "model.max_positions=36")
    with pytest.raises(ConfigError, match="a protein of 37 tokens with its ends, and the model has positions for 36"):
        check_benchmarks(config_of(here, ONE, *positions))
    one.write_text(f"mutated_sequence,DMS_score\n{WILD[1:]},1\nMK?,2\n")
    with pytest.raises(ConfigError, match=r"one\.csv, line 3: .*'\?'"):
        check_benchmarks(config_of(here, ONE))
    one.write_text(rows)
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="gym: assay TWO has no file here: unpack it, or leave it out"):
        check_benchmarks(config_of(here, ONE.replace("[ONE]", "[ONE, TWO]")))
    check_benchmarks(config_of(here, ONE.replace(", assays: [ONE]", "")))
    assert "benchmark gym: 1 assays of" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["{kind: variants, path: scan.csv, wild_type: wild.fasta", ONE[15:-3]])
def test_mutants_without_an_order_are_refused(here, entry):
    check_benchmarks(config_of(here, f"  benchmarks: [{entry}, records: 2}}]\n"))
    with pytest.raises(ConfigError, match=r"\.csv: 1 mutants of one DMS_score, which have no rank correlation"):
        check_benchmarks(config_of(here, f"  benchmarks: [{entry}, records: 1}}]\n"))
    for path in ("scan.csv", "gym/one.csv"):
        (here / path).write_text("mutant,DMS_score\nM1A,2\nK2A,2\n")
    with pytest.raises(ConfigError, match=r"\.csv: 2 mutants of one DMS_score"):
        check_benchmarks(config_of(here, f"  benchmarks: [{entry}}}]\n"))


def test_a_curve_without_a_value_is_said_once(here, capfd):
    rows = [json.loads(line) for line in (here / "chains.jsonl").read_text().splitlines()]
    (here / "chains.jsonl").write_text(
        "".join(
            json.dumps({**row, **{name: row[name][:20] for name in ("sequence", "secondary_structure")}}) + "\n"
            for row in rows
        )
    )
    trained(here, "one", listed="  benchmarks: [{kind: contacts, path: chains.jsonl, every: 3, train: 3}]\n")
    said = [line for line in capfd.readouterr().err.splitlines() if "benchmark chains has no" in line]
    assert len(said) == 1, said
    assert "benchmark chains has no long_L, long_L2, long_L5 at step 3: not defined for what it found." in said[0]


def test_the_example_of_the_key_is_a_configuration(here):
    shown = OF_KEYS["benchmarks"].metadata["meaning"].partition(": ")[2]
    (here / "FOLDER").mkdir()
    names = [entry["name"] for entry in config_of(here, f"  benchmarks: {shown}\n").trainer.benchmarks]
    assert names == ["FOLDER", "scan", "contacts", "structure"]


def test_a_stop_waits_for_no_benchmark(here, capfd):
    said.clear()
    listed = LISTED.replace("every: 3", "every: 5")
    config = config_of(here, listed, "run.name=one", "trainer.checkpoint_every=100")
    run = Run.create(config, default_name="unused")
    run.record_data(identities(config))
    stop = StopFlag()
    assert not fit(run, config, None, stop, Told(stop))
    assert said["benchmark chains"] == 3, "the pass under way was the last one"
    assert [each.step for each in run.checkpoints()] == [4]
    with pytest.raises(KeyError):
        curve(run.path, "benchmark/chains/all_L")
    assert list(curve(run.path, "benchmark/scan/spearman")) == [2, 4], "what was measured before has its point"
    assert "benchmark chains has no point at step 4: the training is to stop." in capfd.readouterr().err
    stop = StopFlag()
    stop.time_limit = 0.0
    assert not fit(run, config, run.newest_checkpoint()[0], stop, Told())
    assert [each.step for each in run.checkpoints()] == [4, 5]
    assert said["benchmark states"] == 0
    assert "benchmark states: no point at step 5: the training is to stop." in capfd.readouterr().err


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_scan_reads_its_wild_type_once(here, objective):
    wild = WILD * 60  # 1,502 tokens: two at once
    (here / "wild.fasta").write_text(f">w\n{wild}\n")
    given = f"model.objective={objective}"
    config = config_of(
        here, "  benchmarks: [{kind: variants, path: scan.csv, wild_type: wild.fasta, records: 9}]\n", given
    )
    source = live(config, 0)
    model = PerformerLM(source.reading_spec("cpu")).eval()
    passes: list[int] = []
    model.embedding.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    (each,) = watched(config)
    parts = each.parts(live(config, 0, model))
    found = [part() for part in parts]
    assert passes == ([1] if objective == "causal" else []) + [2, 2, 2, 2, 1]
    passes.clear()
    alone = [each.parts(live(config, 0, model))[number]() for number in range(len(parts))]
    assert alone == found
    effects = dict(row for part in found for row in part)
    assert sorted(effects) == list(range(9))
    assert len(set(effects.values())) == 9


def test_a_copy_asks_no_other_gpu_for_its_random_state(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with _as_read(torch.device("cpu")):
            torch.rand(3)
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_opens_where_its_benchmarks_are_not(here):
    config = config_of(here, LISTED)
    save_config(config, here / "config.yaml")
    (here / "scan.csv").unlink()
    assert load_config("config.yaml", resolved=True).trainer.benchmarks == config.trainer.benchmarks
    assert config.trainer.benchmarks[0]["path"] == str(here / "scan.csv")
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: trainer\.benchmarks\[0\]\.path"):
        load_config("config.yaml")
    assert load_config("config.yaml", ["trainer.benchmarks=[]"]).trainer.benchmarks == []  # on a machine without them


def test_every_part_has_one_rank_and_records_are_spread():
    for world in (1, 2, 3, 7):
        dealt = [each for rank in range(world) for each in shared([3, 1, 4], rank, world)]
        assert sorted(dealt) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert list(shared([3, 1, 4], 1, 3)) == [(0, 1), (2, 0), (2, 3)]
    assert spread(list("abcdefg"), 3) == ["a", "c", "e"]
    assert spread(list("abc"), 0) == spread(list("abc"), 9) == ["a", "b", "c"]


def test_records_limit_each_scan(here):
    config = config_of(
        here, LISTED.replace("every: 2}", "every: 2, records: 10}").replace("assays: [ONE], ", "records: 7, ")
    )
    (here / "gym/two.csv").write_text("mutated_sequence,DMS_score\n" + "".join(f"{WILD[i:]},{i}\n" for i in range(9)))
    first, gym, *_ = watched(config)
    assert len(first.asked.variants) == 10
    assert [len(each.mutants) for each in gym.scans] == [7, 7]
    assert len(gym.parts(live(config, 0))) == 2
    assert gym.points([0.5, 0.25]) == {"spearman": 0.5, "spearman_indels": 0.25}
