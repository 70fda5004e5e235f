"""What a training tells its watcher, and what that costs."""

from __future__ import annotations

import time

import torch

from longseq.config.loading import load_config
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.callbacks.times import Clock
from longseq.training.fit import fit
from longseq.training.vitals import Vitals

TINY = ("model.dim=16", "model.depth=1", "model.heads=2", "model.ffn_dim=16", "attention.features=8")
ALONE = (
    *("trainer.strategy=single", "trainer.max_steps=6", "trainer.valid_every=2", "trainer.checkpoint_every=3"),
    *("trainer.probe_every=0", "trainer.accumulate=2"),
)


class Kept(Vitals):
    """Notes how much longer than a step everything may take when it begins, and whether it waits for data."""

    def __init__(self) -> None:
        super().__init__()
        self.may: dict[str, list[float]] = {}
        self.waits: set[str] = set()

    def sees(self, action: str) -> None:
        self.may.setdefault(action.rpartition(".")[2] if "Strategy" in action else action, []).append(self.limit() / 60)
        if self.in_data:
            self.waits.add(action)


def test_a_training_says_where_it_is_and_how_long_that_may_take(folder, monkeypatch):
    """Steps have a usual time; what is between them, the first ones and compilers have more of it."""
    config = load_config("small.yaml", [f"data.train={folder}/proteins.fasta", *TINY, *ALONE])
    vitals, real = Kept(), Clock.start

    def start(clock: Clock, action: str) -> None:
        real(clock, action)
        vitals.sees(action)

    monkeypatch.setattr(Clock, "start", start)
    assert fit(Run.create(config, default_name="one"), config, None, StopFlag(), vitals)
    assert vitals.batch == 12
    assert vitals.device == ("cuda:0" if torch.cuda.is_available() else "cpu")
    may = vitals.may
    assert may["forward"] == [30, 30, *[1] * 10]
    assert set(may["backward"][2:]) == {1}
    validations = next(may[name] for name in may if name.endswith("validation_step"))
    assert set(validations) == {10}
    data = next(name for name in may if name.endswith("train_dataloader_next"))
    assert may[data][:3] == [30, 30, 30]
    assert set(may[data][3:]) == {10}
    assert data in vitals.waits
    assert not [name for name in vitals.waits if "dataloader" not in name]
    assert may["save_checkpoint"] == [10, 10]


def test_a_step_in_which_torch_compiles_may_take_as_long_as_the_first_one():
    vitals, seen = Vitals(), []
    for _ in range(3):
        vitals.begin_batch()
    assert vitals.limit() == 60

    def compiler(graph, _):
        seen.append(vitals.limit())
        return graph.forward

    vitals.watch_compiler()
    torch.compile(lambda x: x + 1, backend=compiler)(torch.zeros(3))
    assert seen == [1800]
    assert vitals.limit() == 60


def test_the_marks_of_a_step_cost_next_to_nothing():
    """A step makes about a hundred, and takes half a second of the CPU with the small model."""
    clock = Clock(Vitals())
    names = [f"[Callback]Number{number}.on_train_batch_end" for number in range(100)]
    before = time.process_time()
    for _ in range(20):
        for name in names:
            clock.start(name)
            clock.stop(name)
    assert (time.process_time() - before) / 20 < 0.005  # measured: 0.06 ms
