"""One training process inside a benchmark: the training's own trainer, on synthetic proteins, alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.launch.local import environment_of, free_port
from longseq.training.callbacks.stopping import StopRequested
from longseq.training.worker import quiet
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

_RECORDS = SyntheticSpec(families=4, records=400, mean_length=120)


@contextmanager
def one_process() -> Iterator[Path]:
    """A folder with ``proteins.fasta`` for runs, in an environment like that of the one process of a training."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    ours = environment_of(0, 1, free_port())
    os.environ.clear()
    os.environ.update(ours)
    quiet()
    try:
        with TemporaryDirectory(prefix="longseq-bench-") as folder:
            lay_out(Path(folder))
            yield Path(folder)
    except StopRequested:  # Ctrl-C, which a training takes for "save and stop"
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(before)


def lay_out(folder: Path) -> None:
    """What :func:`configuration` reads."""
    write_fasta(_RECORDS, folder / "proteins.fasta")
    (folder / "bench.yaml").write_text("trainer: {accelerator: cpu}\n")


def configuration(folder: Path, overrides: Sequence[str]) -> Config:
    """The defaults with overrides, for a run in ``folder``."""
    ours = (f"data.train={folder / 'proteins.fasta'}", f"run.dir={folder / 'runs'}", "trainer.devices=1")
    return load_config(folder / "bench.yaml", [*ours, *overrides])
