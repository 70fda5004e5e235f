"""Loss, perplexity and accuracy of a checkpoint, beside the empirical baseline.

The test split is scored, and the OOD files where data.ood names them. Results are printed as a table and kept in the
run's folder under evaluations/. Weights are read from safetensors; nothing is unpickled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.checkpoint import Checkpoint
from longseq.commands.training import FIXED, check_data, refuse_changes
from longseq.config import Config
from longseq.data import corpus_of, resolve_sources, split_spec, vocabulary
from longseq.errors import RunError
from longseq.run import Run

if TYPE_CHECKING:
    from longseq.evaluation.scoring import Scores
    from longseq.models.performer import PerformerLM

# What the weights fit, and which records were trained on.
_FIXED = tuple(
    key
    for key in FIXED
    if key not in ("data.test", "data.length", "data.packing", "data.reset", "data.crop", "data.batch_tokens")
)
_EMA = "ema.safetensors"  # of longseq.training.callbacks.ema
# Enough targets to know the frequencies of 29 tokens to 0.1 %, in a few seconds of reading. Tokenizers are slower.
_BASELINE_TARGETS = 20_000_000
_BASELINE_TARGETS_TOKENIZED = 2_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|CHECKPOINT", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        default=[],
        help="e.g. data.ood=viruses.fasta.gz or attention.kind=exact",
    )
    parser.add_argument(
        "--split",
        action="append",
        choices=("train", "valid", "test", "ood"),
        help="may be repeated; default: test, ood",
    )
    parser.add_argument(
        "--sequences", type=_at_least_one, metavar="N", help="score a sample of N sequences of each split"
    )
    parser.add_argument("--ema", action="store_true", help="score the running mean of the weights (trainer.ema_decay)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    run, checkpoint = _find(args.target)
    config = run.config(tuple(args.overrides))
    resolve_sources(config)
    refuse_changes(run.config(), config, run, _FIXED)
    _weights(checkpoint, args.ema)  # said now if there are none
    splits = list(
        dict.fromkeys(args.split or (["test", "ood"] if config.data.ood or corpus_of(config, "ood") else ["test"]))
    )
    specs = {split: split_spec(config, split) for split in splits}
    check_data(config)  # a bad file is said now, and not after the splits before it were scored

    # Heavy imports only now: what can be refused has been refused.
    from longseq.evaluation.metrics import frequency_baseline
    from longseq.evaluation.scoring import score

    model = _load_model(config, checkpoint, _weights(checkpoint, args.ema))
    tokenized = config.data.tokenizer.endswith(".json")
    targets = _BASELINE_TARGETS_TOKENIZED if tokenized else _BASELINE_TARGETS
    train_counts = split_spec(config, "train").target_counts(targets)
    results = {}
    for split, spec in specs.items():
        progress = _Progress(split)
        scores = score(
            model,
            spec,
            batch_sequences=max(1, 4096 // config.data.length),
            max_samples=args.sequences,
            progress=progress,
        )
        progress.close()
        results[split] = {
            "sources": list(spec.sources),
            "sequences": scores.sequences,
            "targets": int(scores.targets.sum()),
            **scores.quality.as_dict(),
            **_per_unit(scores, specs[split].vocabulary.name),
            "baseline": frequency_baseline(train_counts, scores.targets).as_dict(),
            # The best that any fixed frequencies can do here: those of the split itself.
            "baseline_own_frequencies": frequency_baseline(scores.targets, scores.targets).as_dict(),
        }
    report = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.position.step,
        "weights": "ema" if args.ema else "last",
        "overrides": args.overrides,
        "sequences_limit": args.sequences,
        "splits": results,
    }
    run.evaluations_dir.mkdir(exist_ok=True)
    kept = run.evaluations_dir / f"{checkpoint.path.stem}-{'-'.join(splits)}{_variant(args)}.json"
    kept.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2) if args.json else _table(report, kept))
    return 0


def _variant(args: argparse.Namespace) -> str:
    """A suffix for results that are not those of the run's own settings, so that they replace nothing."""
    ema = "-ema" if args.ema else ""
    if not args.overrides and args.sequences is None:
        return ema
    return (
        f"{ema}-" + hashlib.blake2b(repr((sorted(args.overrides), args.sequences)).encode(), digest_size=4).hexdigest()
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _find(target: Path) -> tuple[Run, Checkpoint]:
    """The run and checkpoint a path means: of a run folder, the newest whole one."""
    if (target / "manifest.json").is_file():
        checkpoint = Checkpoint(target.resolve())
        problem = checkpoint.problem()
        if problem:
            raise RunError(problem)
        return Run.open(checkpoint.path.parent.parent), checkpoint
    run = Run.open(target)
    newest, damaged = run.newest_checkpoint()
    for sentence in damaged:
        print(f"longseq: warning: {sentence} Going back to the one before it.", file=sys.stderr)
    if newest is None:
        raise RunError(f"{target}: there is no checkpoint to evaluate yet; `{run.resume_command}` trains on.")
    return run, newest


def _weights(checkpoint: Checkpoint, ema: bool) -> Path:
    """The file with the weights of the last step, or with their running mean."""
    if not ema:
        return checkpoint.weights_path
    if not (checkpoint.path / _EMA).is_file():
        raise RunError(
            f"{checkpoint.path}: holds no running mean of the weights: leave --ema out, or go on with "
            "trainer.ema_decay=0.999 (`longseq resume`), which begins one."
        )
    return checkpoint.path / _EMA


def _load_model(config: Config, checkpoint: Checkpoint, weights: Path) -> PerformerLM:
    import torch

    from longseq.models.performer import PerformerLM
    from longseq.training.weights import load_weights

    model = PerformerLM(config.performer_spec(vocabulary(config).size))
    load_weights(model, weights)
    model.set_step(max(0, checkpoint.position.step - 1))  # the projections of the last step that was trained
    use_cuda = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if use_cuda else "cpu").eval()


def _per_unit(scores: Scores, tokens: str) -> dict[str, float]:
    """The loss in units that do not depend on the tokens: bits a byte, perplexity a word, bits a dimension."""
    from longseq.evaluation.metrics import bits_per_unit, word_perplexity

    if scores.extent is None:
        return {}
    loss, targets, (units, words) = scores.quality.loss, int(scores.targets.sum()), scores.extent
    bits = bits_per_unit(loss, targets, units)
    if tokens == "pixels":
        return {"dimensions": units, "bits_per_dimension": bits}
    return {
        "bytes": units,
        "words": words,
        "bits_per_byte": bits,
        "tokens_per_word": targets / words if words else float("nan"),
        "word_perplexity": word_perplexity(loss, targets, words),
    }


# What some data have beside: key of the report -> column of the table.
_EXTRA = {
    "bits_per_byte": "bits a byte",
    "word_perplexity": "word perplexity",
    "bits_per_dimension": "bits a dimension",
}


def _table(report: dict, kept: Path) -> str:
    head = f"{'split':<7}{'sequences':>11}{'targets':>12}{'loss':>9}{'perplexity':>12}{'accuracy':>10}"
    head += f"{'baseline perplexity':>21}{'accuracy':>10}"
    extra = {key: title for key, title in _EXTRA.items() if any(key in r for r in report["splits"].values())}
    head += "".join(f"{title:>{len(title) + 3}}" for title in extra.values())
    mean = ", running mean of the weights" if report["weights"] == "ema" else ""
    lines = [f"{report['checkpoint']}, step {report['step']}{mean}", "", head]
    for split, r in report["splits"].items():
        base = r["baseline"]
        lines.append(
            f"{split:<7}{r['sequences']:>11,}{r['targets']:>12,}{r['loss']:>9.4f}{r['perplexity']:>12.2f}"
            f"{r['accuracy']:>10.1%}{base['perplexity']:>21.2f}{base['accuracy']:>10.1%}"
            + "".join(f"{r[key]:>{len(title) + 3}.5g}" for key, title in extra.items())
        )
    return "\n".join([*lines, "", f"kept in {kept}"])


class _Progress:
    """A bar on a terminal, nothing elsewhere. The number of sequences is not known before the end."""

    def __init__(self, split: str):
        from tqdm import tqdm

        self.bar = tqdm(desc=f"scoring {split}", unit=" sequences", disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, sequences: int) -> None:
        self.bar.update(sequences - self.bar.n)

    def close(self) -> None:
        self.bar.close()
