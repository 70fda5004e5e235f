"""The stated model of ``longseq bench context``: what a training step of slices costs, from FLOPs, bandwidth, latency.

With T tokens on P devices (T / P each), a device of F FLOP/s, a message of s bytes that takes α + s / β, n layers of h
heads with m features and value size e, and W weights:

    compute   T / P · (useful FLOPs per token + those computed again) / F
    passes    T / P · n · h · g · 2m(d + e + 1) / F       for P > 1: the states M of the keys and G of the queries
    states    g · n · (P − 1) · (α + s / β)               g gathers per layer of s = B · h · (m(e + 1) + 1) · 4 bytes
    gradient  2 (P − 1) · α + 2 (P − 1) / P · 4 W / β     ring all-reduce of fp32 gradients, once a step
    step      compute + passes + states + gradient

g is 2, M forward and G backward, or 3 where layers are computed again, and M with them: in slices longer than a tile.

Assumptions: nothing overlaps with anything (in fact most of the states' travel does), a ring of neighbours for both
collectives, the slowest link counts for all, every device has the same F whatever its share, and the optimiser's own
time is nothing. FLOPs are those of matrix products (``measure.model_flops``); what is computed again is a third more
of them, since layers run forward once more.

Constants are measured here (F from P = 1 at the longest length that was measured, α and β from all-gathers among this
machine's processes) or given. The defaults for GPUs are an NVIDIA H100's: 400 TFLOP/s, which is 40 % of the 989 of
dense bf16 products; inside a node NVLink with 450 GB/s each way and 3 µs a message, beyond 8 devices InfiniBand with
50 GB/s a device (400 Gb/s) and 6 µs.
"""

from __future__ import annotations

from dataclasses import dataclass

from longseq.measure.model_flops import training_flops
from longseq.models.spec import PerformerSpec

NODE = 8  # devices


@dataclass(frozen=True)
class Link:
    """A message of s bytes takes latency + s / bandwidth."""

    bandwidth: float  # bytes per second
    latency: float  # seconds

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Devices of ``flops`` FLOP/s each; the link inside a node and that between nodes."""

    flops: float
    inside: Link
    between: Link

    def link(self, processes: int) -> Link:
        return self.inside if processes <= NODE else self.between


H100 = Cluster(400e12, Link(450e9, 3e-6), Link(50e9, 6e-6))


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of one training step."""

    compute: float
    passes: float
    states: float
    gradient: float

    @property
    def seconds(self) -> float:
        return self.compute + self.passes + self.states + self.gradient


def state_bytes(spec: PerformerSpec, batch: int = 1) -> int:
    """What one rank hands over in one gather: sums and a log-scale a head, in fp32."""
    return batch * spec.heads * (spec.features * (spec.head_dim + 1) + 1) * 4


def gathers(spec: PerformerSpec, positions: int) -> int:
    """Of states, a layer and step, with so many positions of each sequence on a device."""
    return 3 if spec.recomputes(positions) else 2


def step_flops(spec: PerformerSpec, length: int, positions: int) -> float:
    """A token's of a sequence of ``length``, what is computed again included."""
    return training_flops(spec, length) * (4 / 3 if spec.recomputes(positions) else 1)


def predict(spec: PerformerSpec, cluster: Cluster, length: int, processes: int, batch: int = 1) -> Step:
    """A step of ``batch`` sequences of ``length`` tokens, sliced over ``processes`` devices."""
    positions = length // processes
    link, tokens = cluster.link(processes), batch * positions
    compute = tokens * step_flops(spec, length, positions) / cluster.flops
    if processes == 1:
        return Step(compute, 0.0, 0.0, 0.0)
    product = 2 * spec.features * (2 * spec.head_dim + 1)
    others, messages = processes - 1, gathers(spec, positions)
    return Step(
        compute,
        tokens * spec.depth * spec.heads * messages * product / cluster.flops,
        messages * spec.depth * others * link.seconds(state_bytes(spec, batch)),
        2 * others * link.seconds(4 * spec.parameter_count / processes),
    )
