"""How well checkpoints predict: loss, perplexity, bits, accuracy, calibration, next to the empirical baseline.

The test split is scored, and the OOD files where data.ood names them; or any file, with --data. Intervals are 95 %, by
the bootstrap over sequences. Of a run of `longseq finetune` the labels are measured; --data takes another table.
Several checkpoints make one table. Results are kept in the run's folder as JSON under
evaluations/, and as curves over the steps in TensorBoard. Weights are read from safetensors; nothing is unpickled.
"""

from __future__ import annotations

import argparse
import sys
import time

from longseq.commands.numbers import natural, positive
from longseq.commands.options import add_models, end_well, given, models_and_keys
from longseq.data import SPLITS
from longseq.errors import ConfigError
from longseq.evaluation.evaluate import Evaluation, evaluations, refuse_unkept
from longseq.evaluation.request import Settings
from longseq.printed import as_json

_SILENCE = 30.0  # seconds between two lines of a log
_DEVICES = "trainer.devices="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, "data.ood=viruses.fasta.gz or attention.kind=exact")
    parser.add_argument(
        "--split",
        action="append",
        choices=SPLITS,
        help="may be repeated; default: test, and ood where there is one; none with --data",
    )
    parser.add_argument("--data", action="append", metavar="FILE", help="score any FASTA or text; may be repeated")
    parser.add_argument("--sequences", type=positive, metavar="N", help="score a sample of N sequences of each split")
    parser.add_argument("--all-checkpoints", action="store_true", help="every whole checkpoint of each run, over steps")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="of top-k accuracy; default 5")
    parser.add_argument(
        "--bootstrap", type=natural, default=1000, metavar="N", help="resamplings of intervals; default 1000, 0: none"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the bootstrap; default 0")
    parser.add_argument(
        "--devices",
        type=positive,
        metavar="N",
        help="processes that share the work, a GPU each where there are any; the results are the same (default 1, or "
        "trainer.devices=N)",
    )
    parser.add_argument("--details", action="store_true", help="also tables by length, by confidence and by token")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    targets, overrides = models_and_keys(args)
    settings = Settings(
        splits=tuple(args.split) if args.split else None,
        files=tuple(args.data or ()),
        overrides=tuple(word for word in overrides if not word.startswith(_DEVICES)),
        devices=_devices(args, overrides),
        **given(args, "all_checkpoints ema sequences top_k bootstrap seed"),
    )
    progress, found = _Progress(), []
    end_well()
    try:
        for evaluation in evaluations(targets, settings, progress):
            progress.clear()
            found.append(evaluation)
    finally:  # what is done is shown, whatever happens to the rest
        progress.clear()
        if found:
            reports = [evaluation.as_dict() for evaluation in found]
            alone = len(targets) == 1 and not args.all_checkpoints
            print(as_json(reports[0] if alone else reports, indent=2) if args.json else _text(found, args.details))
    refuse_unkept(found)
    return 0


def _devices(args: argparse.Namespace, overrides: list[str]) -> int:
    words = [word.removeprefix(_DEVICES) for word in overrides if word.startswith(_DEVICES)]
    if words and args.devices is None:
        try:
            return positive(words[-1])
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"trainer.devices: {error}.") from None
    return args.devices or 1


def _text(found: list[Evaluation], in_detail: bool) -> str:
    from longseq.evaluation import label_measures
    from longseq.evaluation.table import details, table

    reports = [evaluation.as_dict() for evaluation in found]
    of_labels = [report for report in reports if any("labels" in values for values in report["splits"].values())]
    of_tokens = [report for report in reports if report not in of_labels]
    text = [table(of_tokens)] if of_tokens else []
    text += [details(of_tokens)] if of_tokens and in_detail else []
    text += [label_measures.table(of_labels)] if of_labels else []
    kept = [evaluation.kept for evaluation in found if evaluation.kept]
    if kept and not any(evaluation.unkept for evaluation in found):
        where = kept[0] if len(kept) == 1 else ", ".join(str(path) for path in dict.fromkeys(k.parent for k in kept))
        text.append(f"kept in {where}")
    return "\n\n".join(text)


class _Progress:
    """A bar on a terminal, a line now and then in a log. The number of sequences is not known before the end."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.bar = tqdm(unit=" sequences", disable=not sys.stderr.isatty(), leave=False)
        self._spoke = time.monotonic()

    def __call__(self, what: str, sequences: int) -> None:
        if self.bar.disable:
            if time.monotonic() - self._spoke > _SILENCE:
                print(f"{what}: {sequences:,} sequences", file=sys.stderr, flush=True)
                self._spoke = time.monotonic()
            return
        self.bar.set_description(what)
        self.bar.n = sequences
        self.bar.refresh()

    def clear(self) -> None:
        self.bar.clear()
