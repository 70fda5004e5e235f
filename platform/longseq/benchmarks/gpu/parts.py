"""The parts of `longseq bench gpu`, in their order. No torch here, for the sake of ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

# Limits are for a machine with a GPU and the cores that come with one; a CPU alone, and a busy one, takes longer.
CPU_PATIENCE = 3


@dataclass(frozen=True)
class Part:
    """One process of the benchmark.

    Attributes:
        about: what it looks at.
        seconds: after which it is cut.
        correct: whether it proves something: then its failure is that of the command, and a CPU can run it.
        alone: whether nothing else may run, as it takes times.
        program: the module that is run, with the part's name and where its rows go.
    """

    name: str
    about: str
    seconds: float
    correct: bool = True
    alone: bool = False
    program: str = "longseq.benchmarks.gpu.worker"


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("kernels-bf16", "every kernel in bf16 against float64 with the same ω", 210),
        Part("kernels-fp32", "the same in fp32", 210),
        Part("kernels-fp16", "the same in fp16", 210),
        Part("blocks", "heads, rotary positions, sums and norms against float64", 60),
        Part("later-keys", "causal outputs whatever the later keys are, bit for bit", 120),
        Part("strategies", "20 steps of single, DDP and ZeRO 0-3 in fp32, against those of a CPU", 240),
        Part("precisions", "20 steps in bf16 and fp16 against the CPU's in fp32", 150),
        Part("compile", "20 steps with trainer.compile, against the CPU's", 240),
        Part("resume", "a checkpoint, kill -9, and the run that goes on from it", 150),
        Part("preflight", "longseq check, and a task of a job", 120),
        Part("attention", "attention next to SDPA (flash) and flash-linear-attention", 120, correct=False, alone=True),
        Part("step", "a Regular model's step next to OPT's", 100, correct=False, alone=True),
        Part("million", "a step on 2^20 tokens next to steps on 8,192", 80, correct=False, alone=True),
        Part("decode", "decoding: the forward pass's logits, and tokens per second", 60, alone=True),
    )
}
