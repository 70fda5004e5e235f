"""Measure this machine: speed and memory against the length, side by side with the exact Transformer and peers.

Every benchmark prints a table. ``attention``, ``step`` and ``features`` keep every raw number as JSON and a picture in
a folder (--out), ``data`` without the picture; pictures need matplotlib (pip install 'longseq[bench]'). ``quality`` and
``recall`` keep a JSON file a model. Ctrl-C keeps what was measured until then, but for ``features`` and ``data``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longseq.allocator import keep_freed_memory
from longseq.benchmarks.request import (
    ATTENTION_CONTENDERS,
    BIDIRECTIONAL,
    CAUSAL,
    STEP_CONTENDERS,
    AttentionRequest,
    Request,
    StepRequest,
)
from longseq.benchmarks.variants import VARIANTS
from longseq.errors import LongseqError
from longseq.models.presets import PRESETS
from longseq.models.spec import KERNELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longseq.benchmarks.results import Results

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what it does, its options, and what runs it."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        child = benchmarks.add_parser(
            name,
            help=benchmark.about,
            description=f"{benchmark.about[0].upper()}{benchmark.about[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        benchmark.add_arguments(child)
        child.add_argument("--out", type=Path, default=Path("bench", name), metavar="DIR", help="folder of the results")
        child.set_defaults(act=benchmark.run)


def run(args: argparse.Namespace) -> int:
    try:
        return args.act(args)
    except ValueError as error:  # attention options that exclude each other
        raise LongseqError(f"{error}.") from None


# --- attention and step: against the length ---


def _attention_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, ATTENTION_CONTENDERS, (1024, 2048, 4096, 8192, 16384), seconds=60)
    parser.add_argument("--heads", type=_positive, default=8, metavar="N", help="attention heads")
    parser.add_argument("--head-dim", type=_positive, default=64, metavar="N", help="width of a head")


def _attention(args: argparse.Namespace) -> int:
    request = AttentionRequest(**_shared(args), heads=args.heads, head_dim=args.head_dim)
    _set_up(request, args.threads)

    from longseq.benchmarks import attention

    results = attention.empty_results(request)
    return _measure(args, request, results, attention.measure)


def _step_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, STEP_CONTENDERS, (1024, 2048, 4096, 8192, 16384, 32768), seconds=300)
    parser.add_argument("--preset", choices=PRESETS, default="regular", help="the model's size")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="keep one activation a block: more time, less memory"
    )


def _step(args: argparse.Namespace) -> int:
    request = StepRequest(**_shared(args), preset=args.preset, activation_checkpointing=args.activation_checkpointing)
    _set_up(request, args.threads)

    from longseq.benchmarks import step

    results = step.empty_results(request)
    return _measure(args, request, results, step.measure)


def _length_arguments(
    parser: argparse.ArgumentParser, contenders: Mapping[str, str], lengths: tuple[int, ...], *, seconds: float
) -> None:
    default = ",".join(map(str, lengths))
    parser.add_argument("--lengths", type=_lengths, default=default, metavar="L,L,…", help="sequence lengths")
    parser.set_defaults(directions=(CAUSAL, BIDIRECTIONAL))
    direction = parser.add_mutually_exclusive_group()
    for name in (CAUSAL, BIDIRECTIONAL):
        direction.add_argument(
            f"--{name}",
            dest="directions",
            action="store_const",
            const=(name,),
            default=argparse.SUPPRESS,
            help=f"{name} attention only, not both",
        )
    parser.add_argument(
        "--contenders",
        type=_names(contenders),
        default=",".join(contenders),
        metavar="NAME,…",
        help="; ".join(f"{name}: {about}" for name, about in contenders.items()),
    )
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at a time")
    parser.add_argument("--features", type=_positive, default=256, metavar="M", help="random features")
    parser.add_argument("--window", type=_natural, default=128, metavar="W", help="of the contender of that name")
    parser.add_argument("--kernel", choices=KERNELS, default="softmax", help="kernel of FAVOR+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the inputs")
    parser.add_argument("--backend", default="auto", help="of longseq's attention: auto, torch, native, triton")
    _threads_argument(parser)
    parser.add_argument("--rounds", type=_rounds, default=5, metavar="N", help="times each is timed, 3 or more")
    limit = "stop a contender before a length at which it would take longer, all its rounds together"
    parser.add_argument("--seconds", type=_seconds, default=seconds, metavar="S", help=limit)


def _threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=None)
    about = "CPU threads; torch chooses by default"
    parser.add_argument("--threads", type=_positive, default=argparse.SUPPRESS, metavar="N", help=about)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    given = vars(args)
    return {field.name: given[field.name] for field in fields(Request) if field.name in given}


def _set_up(request: Request, threads: int | None) -> None:
    """Refuse what cannot be measured here, before anything is."""
    import torch

    from longseq.attention.backends import BACKENDS

    if request.backend not in BACKENDS:
        raise LongseqError(
            f"--backend {request.backend}: there is none of that name; choose from {', '.join(BACKENDS)}."
        )
    if request.device == "cuda" and not torch.cuda.is_available():
        raise LongseqError("--device cuda: torch finds no CUDA device here; measure with --device cpu.")
    if request.device == "cpu":
        keep_freed_memory()  # as training does
    _set_threads(threads)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _measure(
    args: argparse.Namespace, request: Any, results: Results, measure: Callable[[Any, Results, Any], None]
) -> int:
    """Run a benchmark against the length, and keep what it found even if it is cut short."""
    from longseq.benchmarks import plot, report

    _check_folder(args.out)
    about = report.machine(request.device)
    progress, failure = _Progress(), ""
    try:
        measure(request, results, progress)
    except KeyboardInterrupt:
        results.interrupted = True
    except (RuntimeError, MemoryError) as error:  # out of memory, mostly: keep what was measured until then
        failure = f"stopped: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if not results.measurements:
            raise LongseqError(f"nothing was measured; {failure}.") from None
    finally:
        progress.close()
    if not results.measurements:
        if results.interrupted:
            print("longseq: interrupted before anything was measured; nothing is written.", file=sys.stderr)
            return EXIT_INTERRUPTED
        reasons = "; ".join(f"{note.contender} {note.text}" for note in results.notes)
        raise LongseqError(f"nothing was measured: {reasons}.")
    print(report.table(request, results, about))
    print()
    title = f"longseq bench {results.benchmark}: {about['device'] if request.device == 'cuda' else about['processor']}"
    if request.device == "cpu":
        title += f", threads: {about['threads']}"
    numbers = report.as_dict(request, results, about)
    _keep(args.out, results.benchmark, numbers, lambda: plot.figure(request, results, title))
    if failure:
        raise LongseqError(f"{failure}; what was measured until then is written.")
    if results.interrupted:
        print("longseq: interrupted: what was measured until then is written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


# --- features: the quality of the estimators ---


def _features_arguments(parser: argparse.ArgumentParser) -> None:
    draws = "projection matrices for an estimator's error"
    parser.add_argument("--draws", type=_positive, default=100_000, metavar="N", help=draws)
    parser.add_argument("--length", type=_positive, default=4096, metavar="L", help="length of the attention")
    repeats = "draws of inputs and projections for the attention's error"
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help=repeats)
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of all of it")
    _threads_argument(parser)


def _features(args: argparse.Namespace) -> int:
    _set_threads(args.threads)

    from longseq.benchmarks import features

    _check_folder(args.out)
    progress = _Progress()
    progress.now("estimators beside their closed forms")
    estimators = features.measure_estimators(draws=args.draws, seed=args.seed)
    progress.now("attention error against the number of features")
    errors = features.measure_attention_error(length=args.length, draws=args.repeats, seed=args.seed)
    progress.close()
    print(features.table(estimators, errors))
    print()
    _keep(args.out, "features", dict(features.as_dict(estimators, errors)), lambda: features.figure(errors))
    return 0


# --- quality and recall: what the attention variants learn ---


def _quality_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text; each one's last tenth is held out"
    )
    _training_arguments(parser, window=64, features=128)
    parser.add_argument("--seeds", type=_seeds, default="0", metavar="N,…", help="one model a seed and variant")
    parser.add_argument("--length", type=_positive, default=512, metavar="L", help="characters a sequence")
    parser.add_argument("--batch", type=_positive, default=8, metavar="N", help="sequences a step")
    parser.add_argument("--steps", type=_positive, default=1000, metavar="N", help="optimiser steps")


def _quality(args: argparse.Namespace) -> int:
    _set_threads(args.threads)

    from longseq.benchmarks import quality

    request = quality.QualityRequest(
        length=args.length, batch=args.batch, steps=args.steps, window=args.window, features=args.features
    )
    text = quality.read_text(args.text)
    progress = _Progress()
    try:
        quality.measure(request, text, args.variants, args.seeds, args.out / "trials", progress.now)
    except KeyboardInterrupt:
        print(
            "longseq: interrupted: the models that were finished are kept; the same command goes on.", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    found = quality.trials(request, text, args.out / "trials")
    print(quality.table(request, found))
    return 0


def _recall_arguments(parser: argparse.ArgumentParser) -> None:
    _training_arguments(parser, window=32, features=128)
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of weights, projections and sequences")
    parser.add_argument(
        "--distances", type=_lengths, default="64,256,1024,2048", metavar="L,L,…", help="between answer and question"
    )
    parser.add_argument("--steps", type=_positive, default=2500, metavar="N", help="at most, at the first distance")
    more = "at most, at each further distance"
    parser.add_argument("--more-steps", type=_positive, default=300, metavar="N", help=more)


def _recall(args: argparse.Namespace) -> int:
    _set_threads(args.threads)

    from longseq.benchmarks import recall

    request = recall.RecallRequest(
        distances=args.distances,
        steps=args.steps,
        more_steps=args.more_steps,
        window=args.window,
        features=args.features,
    )
    if min(request.distances) < request.pairs:
        raise LongseqError(f"--distances {min(request.distances)}: {request.pairs} pairs need at least as many.")
    progress = _Progress()
    try:
        found = recall.measure(request, args.variants, args.seed, args.out / "trials", progress.now)
    except KeyboardInterrupt:
        print(
            "longseq: interrupted: the variants that were finished are kept; the same command goes on.", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    print(recall.table(request, found))
    return 0


def _training_arguments(parser: argparse.ArgumentParser, *, window: int, features: int) -> None:
    parser.add_argument(
        "--variants",
        type=_names({name: variant.about for name, variant in VARIANTS.items()}),
        default="exact,local,softmax,relu,window,window-relu,window-share-decay",
        metavar="NAME,…",
        help="; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items()),
    )
    parser.add_argument("--window", type=_positive, default=window, metavar="W", help="of the variants that have one")
    parser.add_argument("--features", type=_positive, default=features, metavar="M", help="random features")
    _threads_argument(parser)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_natural(part) for part in text.split(","))


# Another benchmark is a row here, its arguments and its function.
# --- data: how fast batches come ---


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE", help="FASTA to read instead of synthetic")
    parser.add_argument("--megabytes", type=_positive, default=64, metavar="N", help="of synthetic FASTA")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="times each contender is timed")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="of reading from a corpus, each time: it has no end"
    )
    parser.add_argument("--contenders", default="", metavar="NAME,…", help="some of them; empty: all")


def _data(args: argparse.Namespace) -> int:
    _check_folder(args.out)

    from longseq.benchmarks import data
    from longseq_data.sources import expand_sources

    names = tuple(name.strip() for name in args.contenders.split(",") if name.strip()) or tuple(data.CONTENDERS)
    for name in names:
        if name not in data.CONTENDERS:
            raise LongseqError(f"--contenders: {name!r} is none of {', '.join(data.CONTENDERS)}.")
    request = data.DataRequest(
        folder=args.out,
        files=tuple(expand_sources(args.files)),
        megabytes=args.megabytes,
        rounds=args.rounds,
        seconds=args.seconds,
        contenders=names,
    )
    results = data.measure(request, lambda text: print(text, file=sys.stderr, flush=True))
    print(data.table(results))
    _keep_numbers(args.out, "data", data.numbers(request, results))
    return 0


# --- overhead: what the platform costs beside a plain loop ---


def _overhead_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model's size")
    parser.add_argument("--length", type=_positive, default=512, metavar="L", help="tokens a sequence")
    parser.add_argument("--batch", type=_positive, default=2, metavar="N", help="sequences a step")
    parser.add_argument("--steps", type=_positive, default=10, metavar="N", help="of each turn")
    parser.add_argument("--rounds", type=_rounds, default=5, metavar="N", help="turns of each that are counted")
    _threads_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.zero_stage=3")


def _overhead(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    _check_folder(args.out)

    from longseq.benchmarks import overhead

    request = overhead.OverheadRequest(
        preset=args.preset,
        length=args.length,
        batch=args.batch,
        steps=args.steps,
        rounds=args.rounds,
        overrides=tuple(args.overrides),
    )
    progress = _Progress()
    try:
        results = overhead.measure(request, progress.now)
    finally:
        progress.close()
    print(overhead.table(request, results))
    _keep_numbers(args.out, "overhead", overhead.numbers(request, results))
    return 0


# --- memory: the estimate beside what a training takes ---


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets", type=_names(dict.fromkeys(PRESETS, "")), default="tiny,small", metavar="NAME,…", help="sizes"
    )
    parser.add_argument("--lengths", type=_lengths, default="512,2048", metavar="L,L,…", help="tokens a sequence")
    for name, choices in (("attention", "favor,exact"), ("objectives", "causal,masked"), ("checkpointing", "no,yes")):
        known = dict.fromkeys(choices.split(","), "")
        parser.add_argument(f"--{name}", type=_names(known), default=choices, metavar="NAME,…", help="one or both")
    stages = dict.fromkeys(("single", "0", "1", "2", "3"), "")
    what = "ZeRO stages; single: without DeepSpeed"
    parser.add_argument("--zero-stages", type=_names(stages), default="2", metavar="N,…", help=what)
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at a time")
    _threads_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.precision=bf16")


def _memory(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    _check_folder(args.out)

    from longseq.benchmarks import training_memory

    request = training_memory.MemoryRequest(
        presets=args.presets,
        lengths=args.lengths,
        attention=args.attention,
        objectives=args.objectives,
        checkpointing=tuple(name == "yes" for name in args.checkpointing),
        zero_stages=args.zero_stages,
        batch=args.batch,
        overrides=tuple(args.overrides),
    )
    found: list[training_memory.CellResult] = []

    def note(result: training_memory.CellResult) -> None:
        found.append(result)
        print(training_memory.row(result), flush=True)

    print(training_memory.HEAD)
    code = 0
    try:
        training_memory.measure(request, note)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    good = sum(result.good for result in found)
    print(f"\n{good} of {len(found)} estimates within {training_memory.GOAL:.0%} of the measured peak of tensors")
    _keep_numbers(args.out, "memory", training_memory.numbers(request, found))
    return code


BENCHMARKS: dict[str, Benchmark] = {
    "attention": Benchmark("time and memory of an attention call against the length", _attention_arguments, _attention),
    "step": Benchmark("time and memory of a training step against the length", _step_arguments, _step),
    "quality": Benchmark("held-out loss of a small model with each kind of attention", _quality_arguments, _quality),
    "recall": Benchmark("associative recall at distances beyond the window", _recall_arguments, _recall),
    "data": Benchmark("how fast data come: streamed and prepared, beside decompression alone", _data_arguments, _data),
    "memory": Benchmark("the memory estimate beside what two steps take", _memory_arguments, _memory),
    "overhead": Benchmark("a training step and a checkpoint beside a bare loop", _overhead_arguments, _overhead),
    "features": Benchmark("error of the random features, beside their closed forms", _features_arguments, _features),
}


def _check_folder(folder: Path) -> None:
    """Refuse a folder that could not take the results, before an hour is spent on them."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise LongseqError(f"--out {folder}: {there} is not a folder that can be written to.")


def _keep(folder: Path, name: str, numbers: Mapping[str, object], draw: Callable[[], Figure]) -> None:
    """Write NAME.json and NAME.png, and say so; without matplotlib, say what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers_path, picture_path = folder / f"{name}.json", folder / f"{name}.png"
    numbers_path.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        draw().savefig(picture_path, dpi=130)
    except ImportError:
        print(f"kept in {numbers_path}")
        print(
            "longseq: warning: no picture, since matplotlib is not installed: pip install 'longseq[bench]'.",
            file=sys.stderr,
        )
    else:
        print(f"kept in {numbers_path} and {picture_path}")


def _keep_numbers(folder: Path, name: str, numbers: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nkept in {path}")


class _Progress:
    """What is being done, on a terminal in one line that changes; what was found, a line each. Both on stderr."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{desc}  {elapsed}", disable=not sys.stderr.isatty(), leave=False)

    def now(self, text: str) -> None:
        self._bar.set_description_str(text)

    def line(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _names(known: Mapping[str, str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in asked)

    return names


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _rounds(text: str) -> int:
    return _whole(text, 3)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)
