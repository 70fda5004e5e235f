"""One process of ``longseq bench context``: training steps on its slice of a sequence. Rank 0 prints what all measured.

``python -m longseq.benchmarks.context_rank`` with a request as JSON on the command line, in the environment of a rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from longseq.allocator import keep_freed_memory
from longseq.benchmarks.context_model import state_bytes
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.training.collectives import context_group

_SHORT = 2048  # tokens of a slice in a step before those that are timed
_LARGE = 2**24  # bytes: of the message that tells the bandwidth


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    keep_freed_memory()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = PerformerSpec(**request["spec"])
    torch.manual_seed(0)
    model = PerformerLM(spec).to(getattr(torch, request["dtype"]))
    context = context_group(world) if world > 1 else None
    model.set_context(context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = request["length"] // world
    rng = torch.Generator().manual_seed(request["length"])
    tokens = torch.randint(spec.vocabulary, (request["batch"], request["length"] + 1), generator=rng)
    mine = slice(rank * size, (rank + 1) * size)
    tokens, targets = tokens[:, :-1][:, mine].contiguous(), tokens[:, 1:][:, mine].contiguous()
    clock: list[float] = []
    cpu: list[float] = []
    sent: dict[str, int] = {}
    for number in range(request["warmups"] + request["rounds"]):
        # A short step is enough for the optimiser's state, the kernels and the memory that is kept.
        short = _SHORT if number < request["warmups"] else size
        batch = tokens[:, :short], targets[:, :short]
        dist.barrier()
        traffic = {} if context is None else dict(vars(context.traffic))
        began, began_cpu = time.perf_counter(), time.process_time()
        loss = _train_step(model, optimizer, *batch, request["length"])
        dist.barrier()
        if number >= request["warmups"]:
            clock.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
        if context is not None:
            sent = {name: count - traffic[name] for name, count in vars(context.traffic).items()}
    found = {
        "seconds": clock,
        "cpu": median(cpu),
        "memory": _most_memory(),
        "loss": loss,
        "gathers": sent.get("gathers", 0) / spec.depth,
        "gathered": sent.get("gathered", 0) / max(1, sent.get("gathers", 0)),
        "halo": sent.get("halo", 0) / spec.depth,
    }
    everyone: list[dict[str, object] | None] = [None] * world
    dist.all_gather_object(everyone, found)
    latency, bandwidth = _link(spec, request["batch"]) if world > 1 else (0.0, 0.0)
    if rank == 0:
        print(json.dumps({"ranks": everyone, "latency": latency, "bandwidth": bandwidth}))
    dist.destroy_process_group()


def _train_step(
    model: PerformerLM, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor, length: int
) -> float:
    """One step on this rank's slice of sequences of ``length``; the sum of its losses."""
    loss, _ = model(tokens, targets=targets)
    (loss / length).backward()
    if dist.get_world_size() > 1:
        parameters = list(model.parameters())
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(summed := gradient.float())
        gradient.copy_(summed)
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _link(spec: PerformerSpec, batch: int) -> tuple[float, float]:
    """Seconds of a small message and bytes per second of a large one, by all-gathers like those of the states."""
    small = _gather_seconds(1, 30)
    size = max(_LARGE, 4 * state_bytes(spec, batch))
    large = _gather_seconds(size // 4, 5)
    hops = dist.get_world_size() - 1
    return small / hops, size * hops / max(large - small, 1e-9)


def _gather_seconds(floats: int, times: int) -> float:
    message = torch.zeros(floats)
    everyone = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    taken = []
    for _ in range(times):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather(everyone, message)
        taken.append(time.perf_counter() - began)
    return median(taken)


def _most_memory() -> int:
    """The largest resident set that this process has had, in bytes, interpreter and libraries included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
