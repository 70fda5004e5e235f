"""A folder with a small corpus and a tiny model's configuration, and runs that several tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import checkpoint, checkpoints, longseq
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

# 2 blocks of width 32; 8 sequences × 64 tokens = 512 tokens a step; projections are drawn anew at steps 7, 14, ...
# The constant schedule makes a step independent of the last step, so runs of different lengths compare.
TINY = """
model: {dim: 32, depth: 2, heads: 2, ffn_dim: 64}
attention: {features: 32, redraw_every: 7}
data: {train: proteins.fasta, ood: others.fasta, length: 64, batch_tokens: 512}
optim: {lr: 0.003, warmup_steps: 5, schedule: constant}
trainer: {accelerator: cpu, max_steps: 20, valid_every: 10, checkpoint_every: 0, log_every: 1}
"""
HALFWAY = "trainer.checkpoint_every=10"  # of the 20 steps


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a person would stand: ``tiny.yaml`` and two FASTA files, 200 records of other families each."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "tiny.yaml").write_text(TINY)
    for name, seed in (("proteins", 0), ("others", 1)):
        write_fasta(SyntheticSpec(families=4, records=200, seed=seed, mean_length=60), folder / f"{name}.fasta")
    return folder


@pytest.fixture(scope="session")
def fit(folder: Path) -> Callable[..., Path]:
    """fit(name, *overrides, **settings): train a run to its end; gives its folder. Leave it as it is.

    The same overrides train once, whatever the name: a start costs seconds.
    """
    done: dict[object, Path] = {}

    def fit(name: str, *overrides: str, **settings: object) -> Path:
        what = (frozenset(overrides), repr(settings))
        if what not in done:
            ended = longseq("fit", "tiny.yaml", f"run.name={name}", *overrides, folder=folder, **settings)
            assert ended.code == 0, ended.err
            done[what] = folder / "runs" / name
        return done[what]

    return fit


@pytest.fixture(scope="session")
def stopped() -> Callable[..., Path]:
    """stopped(run, name, step): a copy of a finished run, as if it had been stopped at one of its checkpoints."""

    def stopped(run: Path, name: str, step: int) -> Path:
        copy = run.with_name(name)
        shutil.copytree(run, copy, symlinks=True)
        (copy / "FINISHED").unlink()
        for saved in checkpoints(copy):
            if saved > step:
                shutil.rmtree(checkpoint(copy, saved))
        last = copy / "checkpoints" / "last"
        last.unlink()
        last.symlink_to(checkpoint(copy, step).name)
        return copy

    return stopped


@pytest.fixture(scope="session")
def one_process(fit: Callable[..., Path]) -> Path:
    """20 causal steps of one process, with a checkpoint in the middle."""
    return fit("one-process", "trainer.devices=1", "trainer.zero_stage=1", HALFWAY)


@pytest.fixture(scope="session")
def two_processes(fit: Callable[..., Path]) -> Callable[[int], Path]:
    """two_processes(stage): the same 20 steps on two processes under a ZeRO stage."""
    return lambda stage: fit(f"zero-{stage}", "trainer.devices=2", f"trainer.zero_stage={stage}", HALFWAY)
