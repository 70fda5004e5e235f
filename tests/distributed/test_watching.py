"""All that can be watched, written by real processes: the same whatever trains, and however often it stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from command_line import Command, checkpoint, curve, longseq
from longseq import variant_effects
from longseq.config.loading import load_config
from longseq.evaluation.field.measures import spearman
from longseq.training.benchmarks import live, watched
from longseq.training.task import LanguageModelling

pytestmark = pytest.mark.distributed

BENCHMARK = "trainer.benchmarks=[{kind: variants, path: scan.csv, wild_type: wild.fasta, every: 8}]"
# Everything on; decay and temperature are parameters that attention holds directly.
WATCHED = (
    *("trainer.devices=2", "trainer.probe_every=8", "trainer.sample_tokens=20", "trainer.histogram_every=8"),
    *("trainer.ema_decay=0.7", "trainer.length_warmup_steps=6", "trainer.length_warmup_start=16"),
    *("attention.qk_norm=true", "attention.learned_decay=true", "trainer.checkpoint_every=4"),
    BENCHMARK,
)
WILD = "MKVLAACDEFGHIKLMNPQRSTVWY" * 9  # a model reads a few of its variants at once: ranks have some each
NOISE = "trainer.noise_every=4"


def stream(run: Path) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=everything)
    events.Reload()
    return events


def texts(run: Path) -> dict[int, str]:
    return {p.step: p.tensor_proto.string_val[0].decode() for p in stream(run).Tensors("samples/text_summary")}


@pytest.fixture(scope="module")
def scan(folder: Path) -> None:
    mutants = [f"{letter}{at}{new}" for at, letter in enumerate(WILD[:25], 1) for new in "AW" if new != letter]
    rows = [f"{mutant},{at * 7 % 11}" for at, mutant in enumerate(mutants)]
    (folder / "scan.csv").write_text("\n".join(["mutant,DMS_score", *rows]))
    (folder / "wild.fasta").write_text(f">w\n{WILD}\n")


@pytest.fixture(scope="module")
def whole(scan: None, fit: Callable[..., Path]) -> Path:
    """20 steps of two processes under ZeRO-2, never stopped."""
    return fit("watched", *WATCHED, NOISE, "trainer.keep_checkpoints=9")


QUALITY = {f"{split}/{name}" for split in ("train", "valid") for name in ("loss", "perplexity", "bits", "accuracy")}
RATES = {"train/learning_rate", "train/gradient_norm", "train/tokens_per_second", "train/padded_tokens_per_second"}
MACHINE = {"machine/mfu", "machine/model_tflops_per_step", "machine/model_tflops_per_second", "machine/memory_gib"}
TIMES = {"time/data_ms", "time/step_ms", "time/checkpoint_seconds"}
RANKS = {"time/slowest_rank", "time/slowest_ratio"}  # where there are several
MEASURED = {"benchmark/scan/spearman", "time/benchmark_seconds"}


@pytest.mark.interfaces
def test_every_curve_is_there(whole: Path) -> None:
    scalars = set(stream(whole).Tags()["scalars"])
    noise = {f"gradient_noise/{name}" for name in ("noise", "signal", "noise_scale_tokens")}
    errors = {"attention_error/layer00", "attention_error/layer01"}
    assert QUALITY | RATES | MACHINE | TIMES | RANKS | noise | errors | MEASURED == scalars
    for tag in MACHINE | TIMES | errors:
        assert all(value > 0 for value in curve(whole, tag).values()), tag
    loss, bits = curve(whole, "valid/loss"), curve(whole, "valid/bits")
    assert bits == pytest.approx({step: value / math.log(2) for step, value in loss.items()}, rel=1e-5)


@pytest.fixture(scope="module")
def ddp(scan: None, fit: Callable[..., Path]) -> Path:
    saved = ("trainer.keep_checkpoints=9", "trainer.checkpoint_every=8")
    return fit("ddp", "trainer.strategy=ddp", "trainer.devices=2", *saved, BENCHMARK)


def test_every_strategy_has_the_same_curves(fit: Callable[..., Path], ddp: Path) -> None:
    single = fit("single", "trainer.strategy=single", "trainer.checkpoint_every=10")  # of other tests, too
    assert set(stream(single).Tags()["scalars"]) == QUALITY | RATES | MACHINE | TIMES
    assert set(stream(ddp).Tags()["scalars"]) == QUALITY | RATES | MACHINE | TIMES | RANKS | MEASURED


def test_checkpoints_have_their_time_at_their_step(whole: Path) -> None:
    assert list(curve(whole, "time/checkpoint_seconds")) == [4, 8, 12, 16, 20]


@pytest.mark.interfaces
def test_pictures_texts_and_histograms_are_there(whole: Path) -> None:
    events = stream(whole)
    for layer in ("attention/layer00", "attention/layer01"):
        assert [image.step for image in events.Images(layer)] == [8, 16]
        assert events.Images(layer)[0].width > 2 * 128
    assert list(texts(whole)) == [8, 16]
    assert all(len(text.splitlines()) == 4 for text in texts(whole).values())
    assert {tag for tag in events.Tags()["histograms"] if "blocks.1.attention.log_decay" in tag} == {
        "weights/blocks.1.attention.log_decay",
        "gradients/blocks.1.attention.log_decay",
    }


@pytest.mark.interfaces
def test_gradient_histograms_add_up_to_the_gradient_norm(whole: Path) -> None:
    events = stream(whole)
    tags = [tag for tag in events.Tags()["histograms"] if tag.startswith("gradients/")]
    for number, step in enumerate((8, 16)):
        histograms = [events.Histograms(tag)[number] for tag in tags]
        assert {histogram.step for histogram in histograms} == {step}
        squares = sum(histogram.histogram_value.sum_squares for histogram in histograms)
        assert math.sqrt(squares) == pytest.approx(curve(whole, "train/gradient_norm")[step], rel=1e-4)


@pytest.mark.parametrize("strategy", ["whole", "ddp"])
def test_a_benchmark_shared_by_ranks_is_that_of_the_checkpoint(
    folder: Path, strategy: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(strategy)
    config = load_config(run / "config.yaml", resolved=True)
    (scan,) = watched(config)
    assert len(scan.parts(live(config, 0))) > 2
    points = curve(run, "benchmark/scan/spearman")
    assert list(points) == [8, 16]
    for step, value in points.items():
        given = list(variant_effects(checkpoint(run, step), folder / "wild.fasta", table=folder / "scan.csv"))
        effects, measured = np.array([(row.effect, row.measured) for row in given]).T
        assert value == pytest.approx(spearman(measured, effects), abs=1e-6), step


def test_the_running_mean_is_that_of_the_weights_of_every_step(folder: Path, fit: Callable[..., Path]) -> None:
    """Every step's weights are kept here, so the mean can be computed from its definition."""
    every = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=9", "trainer.max_steps=6", "trainer.ema_decay=0.3")
    run = fit("every-step", *every, "trainer.valid_every=0")
    config = load_config(run / "config.yaml")
    mean = {name: p.detach().double() for name, p in LanguageModelling(config).model.named_parameters()}
    for step in range(1, 7):
        keep = min(0.3, (1 + step) / (10 + step))
        weights = load_file(checkpoint(run, step) / "model.safetensors")
        mean = {name: keep * mean[name] + (1 - keep) * weights[name] for name in mean}
        saved = load_file(checkpoint(run, step) / "ema.safetensors")
        assert max(float((saved[name] - mean[name]).abs().max()) for name in mean) < 1e-6, step
        assert saved.keys() == weights.keys()


def test_the_running_mean_can_be_evaluated(folder: Path, whole: Path, one_process: Path) -> None:
    plain, mean = (longseq("evaluate", whole, *option, folder=folder) for option in ((), ("--ema",)))
    assert mean.code == 0, mean.err
    assert "running mean of the weights" in mean.out
    rows = [next(line for line in ended.out.splitlines() if line.startswith("test")) for ended in (plain, mean)]
    assert rows[0] != rows[1]
    assert len(list((whole / "evaluations").glob("step-00000020-test-ood*.json"))) == 2

    none = longseq("evaluate", one_process, "--ema", folder=folder)
    assert none.code == 1
    assert "holds no running mean" in none.sentence


def test_shards_and_accumulation_show_the_same(whole: Path, fit: Callable[..., Path]) -> None:
    other = fit("watched-zero-3", *WATCHED, "trainer.zero_stage=3", "trainer.accumulate=2")
    assert texts(other) == texts(whole)
    benchmark = "benchmark/scan/spearman"
    for tag in ("train/loss", "valid/loss", "attention_error/layer00", "attention_error/layer01", benchmark):
        assert curve(other, tag) == pytest.approx(curve(whole, tag), abs=1e-4), tag
    mine, theirs = stream(whole), stream(other)
    assert mine.Tags()["histograms"] == theirs.Tags()["histograms"]
    for tag in mine.Tags()["histograms"]:
        for a, b in zip(mine.Histograms(tag), theirs.Histograms(tag), strict=True):
            squares = b.histogram_value.sum_squares
            assert a.histogram_value.sum_squares == pytest.approx(squares, rel=1e-3, abs=1e-12), tag
    means = [load_file(checkpoint(run, 20) / "ema.safetensors") for run in (whole, other)]
    assert max(float((means[0][name] - means[1][name]).abs().max()) for name in means[0]) < 1e-5


def test_a_killed_and_resumed_run_shows_what_an_unbroken_one_does(folder: Path, whole: Path) -> None:
    """kill -9 after step 9: one warm-up, one probe and two checkpoints lie behind it."""
    command = Command("fit", "tiny.yaml", "run.name=watched-killed", *WATCHED, NOISE, folder=folder)
    command.wait_for("step 9/")
    command.kill(command.workers()[0])
    assert command.end().code == 1
    run = folder / "runs" / "watched-killed"
    assert max(curve(run, "train/loss")) >= 9, "flushed before the kill"
    resumed = longseq("resume", run, folder=folder)
    assert resumed.code == 0, resumed.err
    for tag in stream(whole).Tags()["scalars"]:
        if "tokens_per" not in tag and tag.split("/")[0] not in ("machine", "time"):
            assert curve(run, tag) == curve(whole, tag), tag
    assert texts(run) == texts(whole)
    assert [image.step for image in stream(run).Images("attention/layer00")] == [8, 16]
    mean, expected = (load_file(checkpoint(r, 20) / "ema.safetensors") for r in (run, whole))
    assert all(mean[name].equal(expected[name]) for name in expected)


@pytest.mark.interfaces
def test_runs_compare_by_their_keys_and_final_metrics(whole: Path) -> None:
    def content(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(stream(whole).SummaryMetadata(tag).plugin_data.content)

    start = content("_hparams_/session_start_info").session_start_info
    assert start.hparams["optim.lr"].number_value == 0.003
    assert start.hparams["attention.kernel"].string_value == "softmax"
    assert "run.name" not in start.hparams
    assert start.hparams["attention.learned_decay"].string_value == "true"
    experiment = content("_hparams_/experiment").experiment
    first = [info.name for info in experiment.hparam_infos if info.differs]
    assert len(first) == 5, "as many as TensorBoard shows by itself"
    assert "optim.lr" in first
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"valid/loss", "train/loss"} <= metrics <= set(stream(whole).Tags()["scalars"])
    assert content("_hparams_/session_end_info").HasField("session_end_info")
