"""Every program in examples/ does what it says, and learns something."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from documentation.pages import ROOT
from longseq.attention import exact_attention, favor_attention, projection_matrix
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("proteins") / "proteins.fasta.gz"
    write_fasta(SyntheticSpec(families=4, records=300, seed=0, mean_length=60), path)
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("length", "size"), [(1, 0.5), (37, 0.5), (300, 1.0), (300, 4.0)])
def test_the_one_file_performer_computes_the_attention_of_longseq(length, size):
    module = load("performer")
    torch.manual_seed(0)
    q, k, v = (size * torch.randn(2, 3, length, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    omega = projection_matrix(24, 16, seed=5, dtype=torch.float64)
    ours = favor_attention(*leaves, causal=True, features=24, seed=5)
    theirs = module.attention(*leaves, omega, chunk=64)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(ours)
    expected = torch.autograd.grad((ours * weights).sum(), leaves)
    found = torch.autograd.grad((theirs * weights).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_its_projections_estimate_exact_attention_better_with_more_features():
    module = load("performer")
    torch.manual_seed(0)
    q, k, v = (0.5 * torch.randn(1, 2, 200, 16) for _ in range(3))
    exact = exact_attention(q, k, v, causal=True)
    errors = [(module.attention(q, k, v, module.projections(m, 16)) - exact).norm().item() for m in (16, 1024)]
    assert errors[1] < 0.3 * errors[0]
    block = module.projections(16, 16)
    directions = block / block.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-5, rtol=0)


def test_the_one_file_performer_is_short_and_learns(fasta, capsys):
    assert len((EXAMPLES / "performer.py").read_text().splitlines()) < 200
    module = load("performer")
    tokens = module.read(fasta)
    assert tokens.max() == module.END
    assert (tokens == module.END).sum() == 299  # between 300 proteins
    held_out = module.train(fasta, steps=40, size=4, length=64)
    frequencies = torch.bincount(tokens).double() / len(tokens)
    entropy = -(frequencies * frequencies.clamp(min=1e-12).log()).sum().item()
    assert held_out < entropy < math.log(module.VOCABULARY)  # more than the letters' frequencies
    assert "held out: loss" in capsys.readouterr().out


def test_its_outputs_do_not_depend_on_later_letters(fasta):
    module = load("performer")
    torch.manual_seed(0)
    model = module.Performer().eval()
    tokens = module.read(fasta)[None, :200]
    changed = tokens.clone()
    changed[:, 150:] = 3
    torch.testing.assert_close(model(tokens)[:, :150], model(changed)[:, :150], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(tokens)[:, 150:], model(changed)[:, 150:], atol=1e-3)


def test_the_classifier_hides_padding_and_learns():
    module = load("attention_in_your_model")
    torch.manual_seed(0)
    model = module.Encoder(vocabulary=6, classes=2)
    tokens, real, labels = module.batch(5, 60, torch.Generator().manual_seed(1))
    other = torch.where(real, tokens, 5 - tokens)
    assert not torch.equal(tokens, other)
    torch.testing.assert_close(model(tokens, real), model(other, real))
    planted = [row[row >= 4] for row in torch.where(real, tokens, 0)]
    assert [len(row) for row in planted] == [2] * 5
    assert [int(a == b) for a, b in planted] == labels.tolist()
    losses = module.train(steps=60, length=24)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_the_lightning_trainer_learns_and_validates(fasta):
    found = load("lightning_trainer").train(fasta, steps=12)
    assert len(found.losses) == 12
    assert len(found.valid) == 2
    assert sum(found.losses[-3:]) < sum(found.losses[:3]) - 0.5
    assert abs(found.valid[-1] - found.losses[-1]) < 0.5


def test_two_processes_of_torchrun_train_as_one_does(fasta):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    program = str(EXAMPLES / "lightning_trainer.py")
    done = subprocess.run([*launcher, program, fasta, "--steps=6"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one = load("lightning_trainer").train(fasta, steps=6)
    steps = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", done.stdout, re.MULTILINE)]
    valid = [float(loss) for loss in re.findall(r"^validation: loss (\S+) ", done.stdout, re.MULTILINE)]
    assert steps == pytest.approx(one.losses, abs=2e-4)  # it prints four digits
    assert valid == pytest.approx(one.valid, abs=2e-4)


def test_the_data_go_on_where_they_were(fasta):
    module = load("data_in_plain_pytorch")
    model, consumed, first = module.train(fasta, steps=6)
    assert consumed == 6 * 16
    _, consumed, second = module.train(fasta, 6, consumed, model)
    assert consumed == 12 * 16
    _, _, together = module.train(fasta, steps=12)
    assert first + second == together


def test_every_example_is_named_in_its_readme_and_shows_help(monkeypatch, capsys):
    programs = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    readme = (EXAMPLES / "README.md").read_text()
    assert [name for name in programs if f"]({name})" not in readme] == []
    for name in programs:
        if name.endswith(".py"):
            monkeypatch.setattr(sys, "argv", [name, "--help"])
            with pytest.raises(SystemExit):
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            assert "--steps" in capsys.readouterr().out


@pytest.mark.distributed
def test_the_notebook_runs_from_top_to_bottom(fasta, tmp_path, monkeypatch):
    notebook = json.loads((EXAMPLES / "embeddings.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            text = (
                "".join(cell["source"]).replace("STEPS = 200", "STEPS = 4").replace("RECORDS = 2000", "RECORDS = 200")
            )
            try:
                exec(compile(text, f"embeddings.ipynb, cell {number}", "exec"), found)
            except BaseException as error:
                with contextlib.suppress(AttributeError):
                    error.add_note(f"in cell {number}")
                raise
    assert found["vectors"].shape == (200, 64)
    assert found["plane"].shape == (200, 2)
    assert Path("embeddings.png").stat().st_size > 1000
