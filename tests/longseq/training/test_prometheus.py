"""The text file of ``trainer.prometheus``, read by a strict parser of Prometheus's text format 0.0.4."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longseq.config.loading import load_config
from longseq.runs.run import Run
from longseq.training.callbacks import prometheus
from longseq.training.callbacks.prometheus import METRICS, Prometheus, exposition
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit

_NAME, _LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"[a-zA-Z_][a-zA-Z0-9_]*"
_PAIR = rf'({_LABEL})="((?:[^"\\\n]|\\[\\"n])*)"'
_SAMPLE = re.compile(rf"({_NAME})\{{({_PAIR}(?:,{_PAIR})*)\}} (\S+)")
Samples = dict[str, tuple[dict[str, str], float]]


def parsed(text: str) -> Samples:
    """Gauges with one sample each; anything else is refused."""
    assert text.endswith("\n")
    found: Samples = {}
    lines = text[:-1].split("\n")
    for about, kind, line in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        sample = _SAMPLE.fullmatch(line)
        assert sample, line
        name = sample[1]
        assert re.fullmatch(rf"# HELP {name} [^\n]+", about)
        assert kind == f"# TYPE {name} gauge"
        assert name not in found
        pairs = re.findall(_PAIR, sample[2])
        assert len({label for label, _ in pairs}) == len(pairs)
        labels = {label: re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value) for label, value in pairs}
        found[name] = labels, float(sample.groups()[-1])
    return found


def test_labels_may_hold_any_letter_and_nan_is_left_out():
    labels = {"run": 'a"b\\c\nd', "node": "nó{1},x=2"}
    values = {"longseq_step": 3.0, "longseq_loss": math.nan, "longseq_tokens_per_second": 1e21}
    assert parsed(exposition(values, labels)) == {
        "longseq_step": (labels, 3.0),
        "longseq_tokens_per_second": (labels, 1e21),
    }


@pytest.mark.parametrize(
    "text",
    ["x 1", '# HELP x y\n# TYPE x gauge\nx{a="\\q"} 1\n', '# HELP x y\n# TYPE y gauge\nx{a="b"} 1\n', "\n"],
)
def test_the_parser_is_strict(text):
    with pytest.raises((AssertionError, ValueError)):
        parsed(text)


@pytest.fixture
def kept(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Prometheus]:
    """kept(local_rank=0): the callback of a training at step 4 of 8 on node n7, writing all the time."""
    monkeypatch.setattr(prometheus, "_SECONDS", 0.005)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")

    def kept(local_rank: int = 0, of: Run = run) -> Prometheus:
        config = load_config("small.yaml", ["data.train=a.fasta", f"trainer.prometheus={folder}/textfiles"])
        callback = Prometheus(of, config, SimpleNamespace(shown={}))
        trainer = SimpleNamespace(local_rank=local_rank, global_step=4, accumulate_grad_batches=1)
        callback.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
        return callback

    return kept


def wait_for(path: Path, what: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + 30
    while True:
        if path.exists() and what(found := parsed(path.read_text())):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_file_follows_the_training_and_goes_when_it_ends(kept, folder):
    callback = kept()
    path = callback.path
    found = wait_for(path, lambda samples: True)
    labels = {"run": "one", "node": "n7", "folder": str(folder / "runs" / "one")}
    assert set(found) == set(METRICS) - {"longseq_loss", "longseq_tokens_per_second"}  # before the first point
    assert (found["longseq_step"], found["longseq_last_step"]) == ((labels, 4.0), (labels, 8.0))
    resident = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    assert resident / 10 < found["longseq_memory_bytes"][1] <= resident
    callback.curves.shown = {"loss": 2.5, "tokens_per_second": 1e6}
    callback.stepped -= 1000  # a training that hangs
    found = wait_for(path, lambda samples: samples["longseq_seconds_since_last_step"][1] >= 1000)
    assert found["longseq_loss"][1] == 2.5
    assert found["longseq_tokens_per_second"][1] == 1e6
    trainer = SimpleNamespace(local_rank=0, global_step=5, accumulate_grad_batches=1)
    callback.on_train_batch_end(trainer, None, None, None, 0)
    found = wait_for(path, lambda samples: samples["longseq_step"][1] == 5)
    assert found["longseq_seconds_since_last_step"][1] < 1000
    callback.teardown(trainer, None, "fit")
    assert list(path.parent.iterdir()) == []


def test_runs_of_one_name_have_files_and_labels_of_their_own(kept, folder):
    config = load_config("small.yaml", ["data.train=a.fasta", f"run.dir={folder}/others", "run.name=one"])
    one, other = kept(), kept(of=Run.create(config, default_name="one"))
    for callback in (one, other):
        wait_for(callback.path, lambda samples: True)
    assert one.path != other.path
    one.teardown(None, None, "fit")
    found = wait_for(other.path, lambda samples: True)
    labels = [{"run": "one", "node": "n7", "folder": f"{folder}/{place}/one"} for place in ("runs", "others")]
    assert [one.labels, found["longseq_step"][0]] == labels
    other.teardown(None, None, "fit")
    assert list((folder / "textfiles").iterdir()) == []


def test_one_process_of_a_node_writes(kept, folder):
    kept(local_rank=1).teardown(None, None, "fit")
    assert not (folder / "textfiles").exists()


def test_a_folder_that_cannot_be_is_said_once_and_no_reason_to_stop(kept, folder, capsys):
    (folder / "textfiles").write_text("a file")
    callback = kept()
    time.sleep(0.05)
    callback.teardown(None, None, "fit")
    said = capsys.readouterr().err
    assert said.startswith(f"longseq: warning: {callback.path}: ")
    assert re.fullmatch(r"longseq-one-n7-[0-9a-f]{8}\.prom", callback.path.name)
    assert said.endswith("(trainer.prometheus)\n")
    assert said.count("\n") == 1


def test_a_training_keeps_it(folder, monkeypatch):
    texts: list[str] = []
    monkeypatch.setattr(prometheus, "exposition", lambda *given: texts.append(exposition(*given)) or texts[-1])
    tiny = ("model.dim=16", "model.depth=1", "model.heads=2", "model.ffn_dim=16", "attention.features=8")
    alone = ("trainer.strategy=single", "trainer.max_steps=2", "trainer.valid_every=0", "trainer.probe_every=0")
    asked = "trainer.peak_tflops=1", f"trainer.prometheus={folder}/textfiles"
    config = load_config("small.yaml", [f"data.train={folder}/proteins.fasta", *tiny, *alone, *asked])
    assert fit(Run.create(config, default_name="one"), config, None, StopFlag())
    assert parsed(texts[0])["longseq_step"][1] <= parsed(texts[0])["longseq_last_step"][1] == 2
    assert list((folder / "textfiles").iterdir()) == []
