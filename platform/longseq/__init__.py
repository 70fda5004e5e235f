"""longseq: distributed pretraining of Performers (FAVOR+ linear attention) on very long sequences.

Every verb of the command line that returns something is a function here, imported when it is first used::

    import longseq
    training = longseq.fit("protein/base", ["data.train=proteins.fasta.gz"])
    (evaluation,) = longseq.evaluate(training.run.path)
    print(evaluation.splits["test"]["perplexity"])
"""

from __future__ import annotations

__version__ = "0.2.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from longseq.evaluation.compare import Compared, compare
    from longseq.evaluation.embed import embed
    from longseq.evaluation.evaluate import Evaluation, evaluate
    from longseq.evaluation.field.contacts import benchmark_contacts
    from longseq.evaluation.field.proteingym import benchmark_proteingym
    from longseq.evaluation.field.structure import benchmark_structure
    from longseq.evaluation.finetune import Finetuning, finetune
    from longseq.evaluation.predict import Prediction, predict
    from longseq.evaluation.request import Settings as EvaluationSettings
    from longseq.evaluation.sample import infill, sample
    from longseq.evaluation.score import score, variant_effects
    from longseq.experiments.ladder import Ladder, ladder
    from longseq.interop.exporting import export
    from longseq.launch.start import Training, fit, resume
    from longseq.launch.submission import Submission, submit
    from longseq.preparation import Prepared, prepare
    from longseq.trained_model import find

# name: the module that has it, and its name there. Imported late: `longseq --help` needs none of them.
_PUBLIC = {
    "fit": "longseq.launch.start",
    "resume": "longseq.launch.start",
    "Training": "longseq.launch.start",
    "submit": "longseq.launch.submission",
    "Submission": "longseq.launch.submission",
    "evaluate": "longseq.evaluation.evaluate",
    "Evaluation": "longseq.evaluation.evaluate",
    "EvaluationSettings": "longseq.evaluation.request:Settings",
    "score": "longseq.evaluation.score",
    "variant_effects": "longseq.evaluation.score",
    "sample": "longseq.evaluation.sample",
    "infill": "longseq.evaluation.sample",
    "embed": "longseq.evaluation.embed",
    "finetune": "longseq.evaluation.finetune",
    "Finetuning": "longseq.evaluation.finetune",
    "predict": "longseq.evaluation.predict",
    "Prediction": "longseq.evaluation.predict",
    "compare": "longseq.evaluation.compare",
    "Compared": "longseq.evaluation.compare",
    "benchmark_proteingym": "longseq.evaluation.field.proteingym",
    "benchmark_contacts": "longseq.evaluation.field.contacts",
    "benchmark_structure": "longseq.evaluation.field.structure",
    "ladder": "longseq.experiments.ladder",
    "Ladder": "longseq.experiments.ladder",
    "export": "longseq.interop.exporting",
    "find": "longseq.trained_model",
    "prepare": "longseq.preparation",
    "Prepared": "longseq.preparation",
}
__all__ = [
    "Compared",
    "Evaluation",
    "EvaluationSettings",
    "Finetuning",
    "Ladder",
    "Prediction",
    "Prepared",
    "Submission",
    "Training",
    "benchmark_contacts",
    "benchmark_proteingym",
    "benchmark_structure",
    "compare",
    "embed",
    "evaluate",
    "export",
    "find",
    "finetune",
    "fit",
    "infill",
    "ladder",
    "predict",
    "prepare",
    "resume",
    "sample",
    "score",
    "submit",
    "variant_effects",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'longseq' has no attribute {name!r}")
    import importlib

    module, _, there = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), there or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
