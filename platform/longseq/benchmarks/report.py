"""A benchmark's results as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from longseq import __version__
from longseq.benchmarks.request import OURS, Request
from longseq.benchmarks.results import Measurement, Results, crossover, memory_slope, ratios, time_a_token
from longseq.training.environment import version_of

_PACKAGES = ("torch", "triton", "performer-pytorch", "pytorch-fast-transformers", "flash-linear-attention")


def machine(device: str) -> dict[str, str | int | None]:
    """What the numbers depend on besides the code."""
    found: dict[str, str | int | None] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "longseq": __version__,
    }
    return found | {package: version_of(package) for package in _PACKAGES}


def table(request: Request, results: Results, about: Mapping[str, str | int | None]) -> str:
    """Everything a person wants to know, as plain text."""
    lines = [
        f"longseq bench {results.benchmark}: {_sizes(request)}",
        f"on {about['processor']}, cores: {about['cores']}, threads: {about['threads']}"
        + (f", {about['device']}" if about["device"] != "cpu" else "")
        + f"; torch {about['torch']}",
    ]
    rates = [rate / 1e9 for rate in results.gemm_rates]
    if rates:
        lines.append(
            f"matrix product {request.gemm_size}² {request.dtype}: median {median(rates):,.1f} GFLOP/s, "
            f"max {max(rates):,.1f}, of {len(rates)} samples among the rounds"
        )
    lines += [f"median (min … max) of {request.rounds} rounds in which the contenders take turns", ""]
    for direction, work in results.parts():
        lines += [*_part(request, results, direction, work), ""]
    lines += _unmeasured(results)
    lines += [f"{name:<20} {text}" for name, text in results.about.items()]
    if results.benchmark == "attention":
        lines += [
            "",
            "memory: peak of tensors beyond inputs, outputs and their gradients. GFLOP/s: the matrix products that the",
            "algorithm needs, causal squares by half; of GEMM: their share of the median matrix-product rate; strict:",
            "the same without what the backward pass computes a second time. The JSON file has the formulas.",
        ]
    else:
        lines += ["", "memory: peak of tensors in a step beyond weights and optimiser state; gradients are in it."]
    if results.interrupted:
        lines += ["", "Interrupted: lengths that were not finished are missing."]
    return "\n".join(lines)


def as_dict(request: Request, results: Results, about: Mapping[str, str | int | None]) -> dict[str, object]:
    """The same with every raw time."""
    rate = median(results.gemm_rates) if results.gemm_rates else None
    return {
        "benchmark": results.benchmark,
        "interrupted": results.interrupted,
        "request": asdict(request),
        "machine": dict(about),
        "contenders": dict(results.about),
        "flops": results.formula,
        "gemm": {
            "size": request.gemm_size,
            "dtype": request.dtype,
            "median": rate,
            "max": max(results.gemm_rates, default=None),
            "flops_per_second": results.gemm_rates,
        },
        "measurements": [
            {
                **asdict(m),
                "median": m.median,
                "flops_per_second": m.flops and m.flops.needed / m.median,
                "share_of_gemm": m.flops and rate and m.flops.needed / m.median / rate,
                "strict_share_of_gemm": m.flops and rate and m.flops.strict / m.median / rate,
            }
            for m in results.measurements
        ],
        "notes": [asdict(note) for note in results.notes],
        "summary": [
            {"direction": direction, "work": work, **_summary(results, direction, work)}
            for direction, work in results.parts()
        ],
    }


def _summary(results: Results, direction: str, work: str) -> dict[str, object]:
    names = results.contenders(direction, work)
    series = {name: results.series(direction, work, name) for name in names}
    ours, others = [n for n in names if n in OURS], [n for n in names if n not in (*OURS, "opt")]
    speedups = {(a, b): ratios(series[b], series[a]) for a in ours for b in others}
    crossovers = {(a, b): crossover(found) for (a, b), found in speedups.items() if b == "exact"}
    return {
        "speedup": {f"{a} over {b}": found for (a, b), found in speedups.items()},
        "crossover": {f"{a} over {b}": found and asdict(found) for (a, b), found in crossovers.items()},
        "ratio_to_opt": {n: ratios(series[n], series["opt"]) for n in names if "opt" in series and n != "opt"},
        "time_a_token": {n: time_a_token(series[n]) for n in names if n != "opt"},
        "memory_slope": {n: memory_slope(series[n], results.rows[0]) for n in names if n != "opt"},
        "memory_slope_unit": f"bytes a {results.rows[1]}",
    }


def _part(request: Request, results: Results, direction: str, work: str) -> Iterator[str]:
    counted = any(m.flops for m in results.measurements)
    rate = median(results.gemm_rates)
    yield f"{direction.capitalize()}, {work}"
    head = f"{'length':>9}  {'contender':<20}{'ms':>10}  {'(min … max)':<23}{'memory MiB':>11}"
    yield head + (f"{'GFLOP/s':>10}{'of GEMM':>9}{'strict':>8}" if counted else f"{'× OPT':>8}")
    found = {name: results.series(direction, work, name) for name in results.about}
    by_place = {(m.length, name): m for name, series in found.items() for m in series}
    to_opt = {name: ratios(series, found.get("opt", [])) for name, series in found.items()}
    stops = {(n.length, n.contender): n.text for n in results.notes if n.direction == direction and n.length}
    for length in sorted({length for length, _ in by_place} | {length for length, _ in stops if length}):
        for name in results.about:
            if (length, name) in stops:
                yield f"{length:>9,}  {name:<20}{stops[length, name]}"
            elif (length, name) in by_place:
                m = by_place[length, name]
                line = _row(m)
                if counted and m.flops:
                    needed, strict = m.flops.needed / m.median, m.flops.strict / m.median
                    line += f"{needed / 1e9:>10,.1f}{needed / rate:>9.1%}{strict / rate:>8.1%}"
                elif not counted and length in to_opt[name]:
                    line += f"{to_opt[name][length]:>8.2f}"
                yield line
    yield from _findings(request, results, direction, work)


def _row(m: Measurement) -> str:
    low, high = min(m.seconds) * 1e3, max(m.seconds) * 1e3
    spread = f"({_digits(low)} … {_digits(high)})"
    return f"{m.length:>9,}  {m.contender:<20}{_digits(m.median * 1e3):>10}  {spread:<23}{m.memory / 2**20:>11,.1f}"


def _findings(request: Request, results: Results, direction: str, work: str) -> Iterator[str]:
    summary = _summary(results, direction, work)
    speedup, crossovers, token, slope = (
        summary[key] for key in ("speedup", "crossover", "time_a_token", "memory_slope")
    )
    assert isinstance(speedup, dict)
    assert isinstance(crossovers, dict)
    assert isinstance(token, dict)
    assert isinstance(slope, dict)
    for pair, by_length in speedup.items():
        if by_length:
            yield f"  {pair}: " + ", ".join(f"{_digits(x)}× at {length:,}" for length, x in by_length.items())
        if crossovers.get(pair):
            words = {"=": "faster from about", "<": "faster at all lengths, from", ">": "not faster up to"}
            relation, length = crossovers[pair]["relation"], crossovers[pair]["length"]
            about = round(length, -1) if relation == "=" else length
            yield f"  {pair}: {words[relation]} {about:,.0f} tokens"
    for name, relative in token.items():
        if len(relative) > 1:
            base = next(iter(relative))
            steps = ", ".join(f"{x:.2f} at {length:,}" for length, x in relative.items() if length != base)
            yield f"  {name}: time per token, 1 at {base:,}: {steps}"
    slopes = ", ".join(f"{name} {x / 1024:,.2f}" for name, x in slope.items() if x is not None)
    if slopes:
        yield f"  memory, KiB a {results.rows[1]}: {slopes}"


def _unmeasured(results: Results) -> list[str]:
    """Contenders that never started, once each."""
    where: dict[tuple[str, str], list[str]] = {}
    for note in results.notes:
        if note.length is None:
            where.setdefault((note.contender, note.text), []).append(note.direction)
    lines = [f"{name:<20} not measured ({' and '.join(found)}): {text}" for (name, text), found in where.items()]
    return [*lines, ""] if lines else []


def _sizes(request: Request) -> str:
    shown = {
        key: value
        for key, value in asdict(request).items()
        if key not in ("lengths", "directions", "contenders", "rounds", "seconds", "gemm_size")
    }
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _digits(x: float) -> str:
    """Three digits, whole numbers above."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
