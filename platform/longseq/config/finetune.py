"""The keys of a configuration's section ``finetune``: labels that a trained model learns.

`longseq finetune` fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass

from longseq.attention.options import option as key
from longseq_data.readers.label_table import TASKS

LEARN = ("head", "lora", "all")


@dataclass
class FinetuneConfig:
    table: str | None = key(
        None, "CSV or TSV with a sequence and a label in each row; null: the run predicts tokens and no labels"
    )
    sequence: str | None = key(None, "column of the sequences; default: by its name")
    label: str | None = key(None, "column of the labels; default: by its name, or the only one that is left")
    task: str = key(
        "auto",
        "what labels are: a class or a number for each sequence, or for each residue; auto: by the labels",
        choices=("auto", *TASKS),
    )
    learn: str = key(
        "head",
        "what learns: a linear head on the frozen model, LoRA's factors of its linear maps too, or everything",
        choices=LEARN,
    )
    lora_rank: int = key(8, "rank of LoRA's factors", at_least=1)
    lora_alpha: int = key(16, "LoRA's product is multiplied by lora_alpha / lora_rank", at_least=1)
    split: str | None = key(
        None,
        "column that says train, valid or test; rows where it is empty are left out; null: a hash of the sequence, by "
        "data.valid_fraction and data.test_fraction",
    )
    cluster: str | None = key(
        None, "column whose value is hashed in place of the sequence, so that clusters stay whole"
    )
    patience: int = key(
        5, "validations in a row without a lower loss after which the training ends; 0: it goes to its end", at_least=0
    )
    # What `longseq finetune` writes down.
    classes: list[str] = key([], "the classes by their numbers, as the table has them")
    center: float = key(0.0, "mean of the training rows' numbers, which learning takes away")
    scale: float = key(1.0, "their deviation, by which learning divides", at_least=0)
    feature_seed: int = key(0, "run.seed of the model that was begun with: its random features stay", at_least=0)
