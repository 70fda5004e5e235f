"""A trained model from wherever it lies: a run, one of its checkpoints, or an exported folder. No torch here.

``find`` says what a path means and refuses what cannot work; ``Source.load`` then reads the weights, from safetensors,
whatever ZeRO stage they were trained under. Nothing is unpickled.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.config.schema import Config
from longseq.config.sections import TILE, TILE_ON_GPU
from longseq.data import begins, vocabulary
from longseq.devices import reading_device
from longseq.errors import LongseqError, RunError
from longseq.interop import exported
from longseq.interop.exported import is_exported
from longseq.models.spec import EXPORTED, PerformerSpec
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run
from longseq_data.os_errors import explained
from longseq_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM
    from longseq.models.tuned import Learning

EMA = "ema.safetensors"  # of longseq.training.callbacks.ema
TARGET_HELP = "a run folder, one of its checkpoints, or an exported folder"


@dataclass(frozen=True)
class Source:
    """Trained weights, and what must be known to use them."""

    folder: Path  # the checkpoint or the exported folder
    weights: Path  # model.safetensors, or the running mean
    config: Config  # of an exported folder without data files
    vocabulary: Vocabulary
    step: int  # optimiser steps trained
    run: Run | None  # None: an exported folder

    @property
    def spec(self) -> PerformerSpec:
        """The model's architecture, for whole sequences in one process."""
        whole = replace(self.config, trainer=replace(self.config.trainer, context_parallel=1))
        return whole.performer_spec(self.vocabulary.size)

    def reading_spec(self, device: str) -> PerformerSpec:
        """The same, read in tiles where the configuration says nothing else."""
        tile = self.config.model.sequence_tile
        if tile is None:
            tile = TILE_ON_GPU if device.startswith("cuda") else TILE
            if not self.causal:  # each tile makes the queries and keys of a window on both sides
                tile = max(tile, 4 * max(options.window for options in self.spec.plan))
        return replace(self.spec, sequence_tile=tile)

    @property
    def name(self) -> str:
        """What people call the model: the run's name, or the folder's."""
        return self.run.path.name if self.run else self.folder.name

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def begins(self) -> int:
        """The token before a record."""
        return begins(self.config, self.vocabulary)

    def require(self, objective: str, why: str) -> None:
        """Refuse a model of another objective, causal or masked; ``why`` ends the sentence.

        Raises:
            LongseqError: naming the model.
        """
        self.refuse_labels()
        own = self.config.model.objective
        if self.causal != (objective == "causal"):
            raise LongseqError(f"{self.folder}: a {own} model (model.objective={own}); {why}")

    @property
    def tuned(self) -> bool:
        """Whether it predicts labels, and no tokens."""
        return self.config.finetune.table is not None

    def refuse_labels(self) -> None:
        """Raise RunError for a model that predicts labels."""
        if self.tuned:
            raise RunError(
                f"{self.folder}: predicts labels ({self.config.finetune.task}) and no tokens; `longseq predict` and "
                f"`longseq embed` take it. For this, give the model that it began with: {self.config.model.init_from}."
            )

    def load(self, device: str | None = None, *, tuned: bool = False) -> PerformerLM:
        """The model in evaluation mode, with the projections of the last step that was trained.

        Args:
            device: default: CUDA where there is a GPU and trainer.accelerator does not say cpu.
            tuned: whether a model that predicts labels will do, a :class:`~longseq.models.tuned.TunedModel`.

        Raises:
            RunError: if the weights are those of another architecture, or of a model that predicts labels.
        """
        from longseq.models.performer import PerformerLM
        from longseq.models.tuned import TunedModel
        from longseq.models.weights import load_weights

        if not tuned:
            self.refuse_labels()
        device = device or reading_device(self.config.trainer.accelerator)
        spec = self.reading_spec(device)
        model = TunedModel(spec, learning_of(self.config)) if self.tuned else PerformerLM(spec)
        load_weights(model, self.weights)
        model.set_step(max(0, self.step - 1))
        return model.to(device).eval()


def learning_of(config: Config) -> Learning:
    """What a model of labels has to say, and what of it learns."""
    from longseq.models.tuned import Learning
    from longseq_data.readers.label_table import OF_CLASSES, PER_RESIDUE

    tune = config.finetune
    return Learning(
        outputs=len(tune.classes) if tune.task in OF_CLASSES else 1,
        residues=tune.task in PER_RESIDUE,
        learn=tune.learn,
        rank=tune.lora_rank,
        alpha=tune.lora_alpha,
    )


def find(target: str | Path | Source, overrides: Sequence[str] = (), *, ema: bool = False, sums: bool = True) -> Source:
    """What a path means: of a run, its newest whole checkpoint; of one that has learned labels, the whole checkpoint of
    the lowest validation loss.

    Args:
        target: a run folder, a checkpoint or an exported folder; what has been found before is returned as it is.
        overrides: key=value on top of the run's configuration.
        ema: the running mean of the weights instead of the last ones.
        sums: False takes no checksums: for ``Source.folder`` of what has been found before.

    Raises:
        LongseqError, DataError: in one sentence, for a path that is none of these, a damaged or older checkpoint, and
            a model of other tokens than the configuration's.
    """
    if isinstance(target, Source):
        return target
    target = Path(target)
    if (target / "manifest.json").is_file():
        return of_checkpoint(_whole(Checkpoint(target.resolve()), sums), overrides, ema=ema)
    if is_exported(target):
        return of_export(exported.read(target), overrides, ema=ema)
    _refuse_others(target)
    run = Run.open(target)
    newest, damaged = run.newest_checkpoint(sums=sums)
    if newest is None:
        raise RunError(f"{target}: there is no checkpoint yet; `{run.resume_command}` trains on.")
    for problem in damaged:
        print(f"longseq: warning: {problem} Going back to the one before it.", file=sys.stderr)
    if run.config().finetune.table:
        newest = _best(run, newest, sums)
    return of_checkpoint(newest, overrides, ema=ema)


def _best(run: Run, newest: Checkpoint, sums: bool) -> Checkpoint:
    """The whole checkpoint of the lowest validation loss, of equal ones the oldest; else the newest one."""
    whole = [each for each in run.checkpoints() if each.problem(sums=sums) is None]
    losses = [(each.position.valid_loss, each.step, each) for each in whole if each.position.valid_loss is not None]
    return min(losses, key=lambda entry: entry[:2])[2] if losses else newest


def of_checkpoint(checkpoint: Checkpoint, overrides: Sequence[str] = (), *, ema: bool = False) -> Source:
    """A checkpoint that is known to be whole."""
    run = Run.open(checkpoint.path.parent.parent)
    config = run.config(tuple(overrides))
    weights = checkpoint.weights_path
    if ema:
        weights = checkpoint.path / EMA
        if not weights.is_file():
            raise RunError(
                f"{checkpoint.path}: holds no running mean of the weights: leave ema out, or go on with "
                "trainer.ema_decay=0.999 (`longseq resume`), which begins one."
            )
    tokens = vocabulary(config)
    _refuse_other_tokens(weights, tokens)
    return Source(checkpoint.path, weights, config, tokens, checkpoint.position.step, run)


def of_export(export: exported.Exported, overrides: Sequence[str] = (), *, ema: bool = False) -> Source:
    """An exported folder."""
    if ema:
        raise RunError(f"{export.folder}: an exported folder holds one set of weights: leave ema out.")
    config = export.config(tuple(overrides))
    tokens = vocabulary(config)
    _refuse_other_tokens(export.weights, tokens)
    return Source(export.folder, export.weights, config, tokens, export.step, None)


def run_of(target: Path) -> Run:
    """The run that a path means: the run itself, or that of a checkpoint.

    Raises:
        LongseqError: for anything else.
    """
    if is_exported(target):
        raise LongseqError(f"{target}: an exported folder has one model and no other checkpoints; give the run.")
    if (target / "manifest.json").is_file():
        return Run.open(target.resolve().parent.parent)
    _refuse_others(target)
    return Run.open(target)


def checkpoints_of(run: Run) -> list[Checkpoint]:
    """Every whole checkpoint of a run, oldest first; damaged ones are named on stderr.

    Raises:
        RunError: if there is none.
    """
    whole = []
    for checkpoint in run.checkpoints():
        problem = checkpoint.problem()
        if problem is None:
            whole.append(checkpoint)
        else:
            print(f"longseq: warning: {problem} It is left out.", file=sys.stderr)
    if not whole:
        run.newest_checkpoint()  # says what is wrong with each, where there are some
        raise RunError(f"{run.path}: there is no whole checkpoint; `{run.resume_command}` trains on.")
    return whole


def _whole(checkpoint: Checkpoint, sums: bool) -> Checkpoint:
    problem = checkpoint.problem(sums=sums)
    if problem:
        raise problem
    return checkpoint


def _refuse_others(target: Path) -> None:
    """What looks like a model and is none that can be read."""
    if target.is_dir() and (any(target.glob("mp_rank_*")) or any(target.glob("*zero_pp_rank_*"))):
        raise RunError(
            f"{target}: a checkpoint in DeepSpeed's own, pickled format, which longseq neither writes nor reads; give "
            "a checkpoint of longseq (RUN/checkpoints/step-*.ckpt), or the run."
        )
    if target.is_file():
        raise RunError(f"{target}: a file; give {TARGET_HELP}.")


def _refuse_other_tokens(weights: Path, tokens: Vocabulary) -> None:
    """Hold the embedding's rows against the tokens of the data, before either is used.

    Raises:
        RunError: naming both.
    """
    shapes = tensor_shapes(weights)
    shape = shapes.get("embedding.weight") or shapes.get(f"{EXPORTED}embedding.weight")
    if not shape:
        raise RunError(f"{weights}: holds no embedding, so it is no model of longseq, or damaged.")
    rows = shape[0]
    if rows != tokens.size:
        raise RunError(
            f"{weights}: a model of {rows:,} tokens, but the configuration's data.tokenizer ({tokens.name}) has "
            f"{tokens.size:,}: give it the tokenizer and the kind of data that it was trained with."
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a safetensors file, from its header.

    Raises:
        RunError: if the file is none.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {
            name: tuple(map(operator.index, entry["shape"])) for name, entry in header.items() if name != "__metadata__"
        }
    except OSError as error:
        raise RunError(f"{explained(error, path, 'cannot be read')}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        raise RunError(f"{path}: no safetensors file, or damaged.") from None
