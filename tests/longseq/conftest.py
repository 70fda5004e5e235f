from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.runs import checkpoint
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run
from longseq.training.shards import write
from positions import position

if TYPE_CHECKING:
    from longseq.trained_model import Source

FASTA = "".join(f">r{i}\n{'MKVLAACDEFGHIKLMNP'[i % 7 :]}{'QRSTVW'[i // 7]}\n" for i in range(40))  # no two alike
# Small enough to be refused in no time, and to be trained in no time if a refusal is missing.
SMALL = "model: {preset: tiny}\ndata: {length: 16, batch_tokens: 64}\ntrainer: {max_steps: 8, accelerator: cpu}\n"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors cost more to share among threads than to compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the FASTA file proteins.fasta and the configuration small.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proteins.fasta").write_text(FASTA)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    return load_config("small.yaml", [f"data.train={folder}/proteins.fasta", "run.name=one"])


@pytest.fixture
def run(config: Config) -> Run:
    """A run that no process has trained."""
    return Run.create(config, default_name="unused")


@pytest.fixture
def publish(run: Run) -> Callable[..., Checkpoint]:
    """publish(step): a checkpoint of ``run`` with two files, as one fp32 process would have written it."""

    def publish(step: int, valid_loss: float | None = None) -> Checkpoint:
        partial = checkpoint.partial_path(run.checkpoints_dir, step)
        contents = {"model.safetensors": bytes(range(256)) * step, "training/shard.pt": b"optimiser"}
        files = {name: asdict(write(partial / name, content)) for name, content in contents.items()}
        return checkpoint.publish(run.checkpoints_dir, position(step, valid_loss), files)

    return publish


TINY = ("model.dim=32", "model.depth=2", "model.heads=2", "model.ffn_dim=48", "attention.features=16")


@pytest.fixture
def trained(folder: Path) -> Callable[..., Run]:
    """trained(*overrides): a run whose checkpoint of step 8 holds weights far from their initial ones."""
    import torch

    from longseq.data import identities, vocabulary
    from longseq.models.performer import PerformerLM
    from longseq.models.weights import save_weights

    def trained(*overrides: str) -> Run:
        given = [f"data.train={folder}/proteins.fasta", "run.name=one", *TINY, *overrides]
        config = load_config("small.yaml", given)
        run = Run.create(config, default_name="unused")
        run.record_data(identities(config))
        torch.manual_seed(1)
        model = PerformerLM(config.performer_spec(vocabulary(config).size))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        partial = checkpoint.partial_path(run.checkpoints_dir, 8)
        partial.mkdir(parents=True)
        save_weights(model.state_dict(), partial / "model.safetensors")
        content = (partial / "model.safetensors").read_bytes()
        files = {"model.safetensors": asdict(write(partial / "model.safetensors", content))}
        checkpoint.publish(run.checkpoints_dir, position(8), files)
        return run

    return trained


@pytest.fixture
def table(folder) -> str:
    """A number for each of 90 sequences, their share of W, Y and F; how many of those as a class; a state a residue."""
    residues, rng = "ACDEFGHIKLMNPQRSTVWY", np.random.default_rng(1)
    rows = ["sequence,share,kind,states"]
    for _ in range(90):
        letters = "".join(rng.choice(list(residues), size=rng.integers(8, 30)))
        share = sum(map(letters.count, "WYF")) / len(letters)
        states = "".join("HE-"[residues.index(letter) % 3] for letter in letters)
        rows.append(f"{letters},{share:.4f},{'much' if share > 0.15 else 'little'},{states}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return "table.csv"


@pytest.fixture
def base(folder) -> Source:
    """An exported masked model, new."""
    import torch

    from longseq.data import vocabulary
    from longseq.interop.exporting import write_folder
    from longseq.models.performer import PerformerLM
    from longseq.trained_model import find

    config = load_config("small.yaml", ["data.train=proteins.fasta", *TINY, "model.objective=masked"])
    torch.manual_seed(1)
    model = PerformerLM(config.performer_spec(29))
    write_folder(folder / "base", model.state_dict(), config, vocabulary(config), 0, "", first=25)
    return find(folder / "base")


@pytest.fixture
def tuned(base, table) -> Callable[..., Run]:
    """tuned(label, learn, key=value, ..., steps=2): a run that has learned in this process."""
    from longseq.data import identities
    from longseq.evaluation.finetune import configured
    from longseq.training.callbacks.stopping import StopFlag
    from longseq.training.fit import fit

    def tuned(label: str, learn: str, *overrides: str, steps: int = 2) -> Run:
        alone = ("trainer.strategy=single", "trainer.accelerator=cpu", "trainer.log_every=1", "optim.warmup_steps=1")
        asked = {"table": table, "label": label, "learn": learn, "task": "auto"}
        lengths = (f"trainer.max_steps={steps}", f"trainer.valid_every={steps}")
        given = {word.partition("=")[0] for word in overrides}
        defaults = [word for word in (*alone, *lengths) if word.partition("=")[0] not in given]
        config = configured(base, asked, [*defaults, *overrides], batch=8)
        run = Run.create(config, default_name=f"{label}-{learn}")
        run.record_data(identities(config))
        assert fit(run, config, None, StopFlag(), origin=base.folder)
        return run

    return tuned
