"""`longseq bench` as a person meets it, and the attention contenders."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from command_line import Command, Ended, longseq
from longseq.benchmarks import attention, report
from longseq.benchmarks.ladder import Ladder, Task
from longseq.benchmarks.request import ATTENTION_CONTENDERS, AttentionRequest
from longseq.benchmarks.results import Results
from longseq.commands.bench import BENCHMARKS
from longseq.measure.timing import Gemm

SMALL = ["--heads", 2, "--head-dim", 16, "--features", 32, "--window", 20, "--rounds", 3, "--threads", 1]
REQUEST = AttentionRequest(
    lengths=(48, 96),
    directions=("causal", "bidirectional"),
    contenders=tuple(ATTENTION_CONTENDERS),
    heads=2,
    head_dim=16,
    features=32,
    window=20,
    rounds=3,
    gemm_size=64,
)
EVERYWHERE = {"favor", "window", "exact", "performer-pytorch", "opt"}


class Silence:
    def now(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("bench")
    return folder, longseq("bench", "attention", "--lengths", "96,48", *SMALL, "--out", "kept", folder=folder)


def test_every_contender_is_in_the_numbers_at_every_length(run):
    folder, done = run
    assert done.code == 0, done.err
    numbers = json.loads((folder / "kept/attention.json").read_text())
    found = {(m["direction"], m["work"], m["length"], m["contender"]) for m in numbers["measurements"]}
    assert found >= {
        (direction, work, length, name)
        for direction in ("causal", "bidirectional")
        for work in ("forward", "forward + backward")
        for length in (48, 96)
        for name in EVERYWHERE
    }
    for m in numbers["measurements"]:
        assert len(m["seconds"]) == 3
        assert min(m["seconds"]) <= m["median"] <= max(m["seconds"])
        if m["contender"] != "opt":
            assert m["memory"] > 0
            assert 0 < m["strict_share_of_gemm"] <= m["share_of_gemm"]
    # Two at the ends of each direction, one a round and length.
    assert len(numbers["gemm"]["flops_per_second"]) == 2 * (2 + 2 * 3)
    assert numbers["machine"]["torch"] == torch.__version__
    assert numbers["machine"]["threads"] == 1
    assert numbers["request"]["lengths"] == [48, 96]
    assert {s["direction"] for s in numbers["summary"]} == {"causal", "bidirectional"}
    assert numbers["summary"][0]["speedup"].keys() >= {"favor over exact", "favor over performer-pytorch"}


def test_the_table_names_contenders_speedups_and_files(run):
    _, done = run
    for name, about in ATTENTION_CONTENDERS.items():
        assert f"{name:<20} {about}" in done.out
    assert "Causal, forward + backward" in done.out
    assert "favor over exact: " in done.out
    assert "memory, KiB a token and head: favor " in done.out
    assert "kept in kept/attention.json and kept/attention.png" in done.out
    assert "unable to import cuda code" not in done.out  # performer-pytorch's remark


@pytest.mark.skipif(find_spec("fast_transformers") is not None, reason="fast-transformers is installed here")
def test_a_contender_that_is_not_installed_is_listed(run):
    folder, done = run
    assert "fast-transformers    not measured (causal and bidirectional): not installed" in done.out
    notes = json.loads((folder / "kept/attention.json").read_text())["notes"]
    assert {n["direction"] for n in notes if n["contender"] == "fast-transformers"} == {"causal", "bidirectional"}


def test_the_picture_shows_a_line_a_contender(run):
    from matplotlib.image import imread

    picture = imread(run[0] / "kept/attention.png")[..., :3]
    assert min(picture.shape[:2]) > 400
    for colour in ("0072B2", "D55E00", "E69F00"):  # favor, exact, performer-pytorch
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        near = (torch.from_numpy(picture) - wanted).abs().amax(-1) < 0.02
        assert near.sum() > 200, f"no line of colour #{colour}"


def test_without_matplotlib_the_numbers_are_kept_and_a_sentence_says_what_is_missing(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none/matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib here')\n")
    arguments = ["--lengths", "32", "--causal", "--contenders", "favor,exact", *SMALL]
    done = longseq(
        "bench", "attention", *arguments, folder=tmp_path, environment={"PYTHONPATH": str(tmp_path / "none")}
    )
    assert done.code == 0
    assert "matplotlib is not installed: pip install 'longseq[bench]'" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in (tmp_path / "bench/attention").iterdir()] == ["attention.json"]


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    arguments = ["--lengths", "64,65536", "--causal", "--contenders", "exact,favor", *SMALL, "--seconds", 10_000]
    command = Command("bench", "attention", *arguments, folder=tmp_path)
    command.wait_for("causal, 64 tokens")
    command.interrupt()
    done = command.end()
    assert done.code == 130
    assert "what was measured until then is written" in done.err
    assert "Interrupted" in done.out
    numbers = json.loads((tmp_path / "bench/attention/attention.json").read_text())
    assert numbers["interrupted"]
    assert {m["length"] for m in numbers["measurements"]} == {64}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["attention", "--contenders", "favor,reformer"],
            "'reformer' is not one of favor, window",
        ),
        (["step", "--contenders", "fla"], "'fla' is not one of favor"),
        (["attention", "--lengths", "1024,many"], "'many' is not a whole number from 1 on"),
        (["attention", "--rounds", "0"], "'0' is not a whole number from 1 on"),
        (["attention", "--seconds", "-1"], "'-1' is not a number above 0"),
        (["attention", "--causal", "--bidirectional"], "not allowed with argument"),
        (["attention", "--kernel", "sotfmax"], "invalid choice: 'sotfmax'"),
        (["attnetion"], "invalid choice: 'attnetion'"),
    ],
)
def test_a_command_that_is_not_understood_exits_with_2(tmp_path, arguments, sentence):
    done = longseq("bench", *arguments, folder=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "cuda"], "--backend cuda: no such backend; choose from auto, torch, native, triton"),
        (["--contenders", "window", "--window", 0], "nothing was measured: window asked for with --window 0"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, arguments, sentence):
    done = longseq("bench", "attention", "--lengths", 32, *arguments, folder=tmp_path)
    assert done.code == 1
    assert sentence in done.sentence
    assert not (tmp_path / "bench").exists()


def test_help_of_every_benchmark_imports_no_torch(tmp_path):
    program = (
        "import sys\n"
        "from longseq.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'matplotlib', 'numpy'} & sys.modules.keys())"
    )
    for arguments in ([], *([name] for name in BENCHMARKS)):
        command = [sys.executable, "-c", program, "bench", *arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.stdout.startswith("usage: longseq bench")
        assert done.stdout.endswith("set()\n")


def test_features_are_reported(tmp_path):
    arguments = ["--draws", 100, "--length", 64, "--repeats", 2, "--threads", 1]
    done = longseq("bench", "features", *arguments, folder=tmp_path)
    assert done.code == 0, done.err
    assert "orthogonal" in done.out
    assert json.loads((tmp_path / "bench/features/features.json").read_text()).keys() == {
        "estimators",
        "attention",
        "sharper",
    }
    assert (tmp_path / "bench/features/features.png").stat().st_size > 10_000


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", sorted(EVERYWHERE))
def test_contenders_make_an_output_and_three_gradients(name, causal):
    if name == "performer-pytorch":
        pytest.importorskip("performer_pytorch")
    inputs = attention.make_inputs(REQUEST, 40)
    built = attention._build(name, REQUEST, causal)
    assert not isinstance(built, attention.Absent)
    tasks = attention._tasks(REQUEST, causal, name, built, inputs)
    (out,) = tasks["forward"].call()
    assert not out.requires_grad
    again, *gradients = tasks["forward + backward"].call()
    torch.testing.assert_close(out, again.detach())
    assert [g.shape for g in gradients] == [inputs.v.shape] * (1 if name == "opt" else 3)


@pytest.mark.parametrize("causal", [True, False])
def test_contenders_approximate_the_exact_one(causal):
    """They are given what they need: a wrong scale, layout or mask would not come near."""
    request = dataclasses.replace(REQUEST, features=4096, window=8)
    inputs = attention.make_inputs(request, 40)
    exact = attention._build("exact", request, causal)(inputs.q, inputs.k, inputs.v)
    for name in sorted(EVERYWHERE - {"exact", "opt"}):
        built = attention._build(name, request, causal)
        if not isinstance(built, attention.Absent):
            difference = (built(inputs.q, inputs.k, inputs.v) - exact).square().mean() / exact.square().mean()
            assert difference < 0.01, name


def climb(request: AttentionRequest, contenders: dict, **settings: float) -> Results:
    results = Results("attention", (1, "token"), {name: name for name in contenders})
    device = torch.device("cpu")
    ladder = Ladder(
        direction="causal",
        make_inputs=lambda length: length,
        contenders=contenders,
        rounds=3,
        seconds=settings.get("seconds", 60.0),
        device=device,
        gemm=Gemm(32, torch.float32, device, results.gemm_rates),
        results=results,
        progress=Silence(),
    )
    ladder.climb(request.lengths)
    return results


def allocates(bytes_at: object) -> object:
    return lambda length: {"work": Task(lambda: (torch.empty(bytes_at(length), dtype=torch.uint8),))}  # type: ignore[operator]


def test_a_contender_stops_before_the_length_that_would_take_too_long():
    request = dataclasses.replace(REQUEST, lengths=(256, 1 << 30))
    slow = {
        "slow": lambda length: {"work": Task(lambda: (torch.ones(length * 64).exp(),))},
        "quick": allocates(lambda n: 8),
    }
    results = climb(request, slow, seconds=0.5)
    (note,) = results.notes
    assert note.contender == "slow"
    assert 256 < note.length < 1 << 30
    assert note.text.startswith("stopped: predicted ")
    assert note.text.endswith("above --seconds 0.5")
    assert [(m.contender, m.length) for m in results.measurements] == [
        ("slow", 256),
        ("quick", 256),
        ("quick", 1 << 30),
    ]
    told = report.table(request, results, report.machine("cpu"))
    assert f"{note.length:>9,}  slow                stopped: predicted" in told


def test_a_contender_stops_before_the_length_that_would_not_fit():
    request = dataclasses.replace(REQUEST, lengths=(256, 1 << 40))
    results = climb(request, {"large": allocates(lambda n: n * 1024)}, seconds=1e9)
    (note,) = results.notes
    assert "GiB of memory, and" in note.text
    assert [m.length for m in results.measurements] == [256]


def test_a_contender_that_fails_is_noted_and_the_others_go_on():
    def fails(length: int) -> dict[str, Task]:
        raise NotImplementedError("no kernel for this device\nwith a long story")

    results = climb(REQUEST, {"fails": fails, "works": allocates(lambda n: n)})
    assert [(n.contender, n.length, n.text) for n in results.notes] == [
        ("fails", 48, "failed: no kernel for this device")
    ]
    assert [m.length for m in results.measurements] == [48, 96]
