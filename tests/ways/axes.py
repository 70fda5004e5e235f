"""The ways through longseq: a table of axes, which combinations make sense, and few of them that hold every pair.

A column more is a line more in AXES, and in SENSELESS where it does not go with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product

Way = dict[str, str]

# axis: its values. What each value sets is said by its own name in ``data.py`` (sources, records) or in SETTINGS.
AXES: dict[str, tuple[str, ...]] = {
    "source": ("fasta", "dna", "corpus", "bytes", "tokenizer", "pixels", "prepared text", "prepared pixels", "mixture"),
    "packing": ("concat", "crop", "bucket", "family"),
    "objective": ("causal", "masked", "fim"),
    "attention": ("favor", "layers", "exact", "modern"),
    "gate": ("plain", "gated"),
    "reset": ("through", "reset"),
    "crop": ("random", "first"),
    "records": ("one", "two", "many"),  # of the validation and of the test split
    "blocks": ("eager", "compiled"),
    "behind": ("nothing", "relatives"),  # what `longseq score` and `sample` read first
}

SETTINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("packing", "concat"): ("data.packing=concat",),
    ("packing", "crop"): ("data.packing=crop",),
    ("packing", "bucket"): ("data.packing=bucket",),
    ("packing", "family"): ("data.packing=family",),  # its table is the source's
    ("objective", "causal"): ("model.objective=causal",),
    ("objective", "masked"): ("model.objective=masked",),
    ("objective", "fim"): ("model.objective=fim",),
    ("attention", "layers"): ("attention.layers=[{window: 4, kernel: aderf}, exact]",),
    ("gate", "gated"): ("attention.forget_gate=true",),
    ("attention", "exact"): ("attention.kind=exact",),
    ("attention", "modern"): ("model.block=modern", "attention.learned_covariance=true"),
    ("reset", "reset"): ("data.reset=true",),
    ("crop", "first"): ("data.crop=first",),
    ("blocks", "compiled"): ("trainer.compile=true",),
}

SENSELESS: tuple[Callable[[Way], bool], ...] = (
    # only a corpus knows all lengths
    lambda way: way["packing"] in ("bucket", "family") and way["source"] not in ("corpus", "prepared text"),
    lambda way: way["reset"] == "reset" and way["packing"] != "concat",  # one record has nothing to begin anew
    lambda way: way["crop"] == "first" and way["packing"] in ("concat", "family"),  # joined records are cut
    # what comes before a sequence is nothing to a masked model, and no verb reads files of images
    lambda way: way["behind"] == "relatives" and (way["objective"] == "masked" or "pixels" in way["source"]),
    lambda way: way["objective"] == "fim" and way["records"] != "many",  # causal otherwise
    # of one number of records only: each sequence is scored by itself
    lambda way: way["behind"] == "relatives" and way["records"] != "many",
    # Of one source and number of records only: a compiler reads the model for each length, longer than all else takes.
    lambda way: way["blocks"] == "compiled" and (way["source"], way["records"]) != ("corpus", "many"),
    lambda way: "pixels" in way["source"] and way["packing"] != "crop",  # joined images lose their rows and columns
    # Images have no end, and to a compiler a model that fills in is a causal one.
    lambda way: way["objective"] == "fim" and ("pixels" in way["source"] or way["blocks"] == "compiled"),
)


def ways() -> list[Way]:
    """Every sensible combination, in the order of the table."""
    every = (dict(zip(AXES, values, strict=True)) for values in product(*AXES.values()))
    return [way for way in every if not any(senseless(way) for senseless in SENSELESS)]


def pairs(way: Way) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Every two of a way's values."""
    return combinations(way.items(), 2)


def cover() -> list[Way]:
    """Few ways that hold every pair of values that any way holds; the same ones each time.

    Greedy: always the way with the most pairs that are still missing, the first of equals.
    """
    every = [(way, frozenset(pairs(way))) for way in ways()]
    left, chosen = {pair for _, held in every for pair in held}, []
    while left:
        best, held = max(every, key=lambda each: len(left & each[1]))
        left -= held
        chosen.append(best)
    return chosen


def name(way: Way) -> str:
    return "-".join(way.values())


def settings(way: Way) -> list[str]:
    """The keys that a way sets, without those of its data."""
    return [word for item in way.items() for word in SETTINGS.get(item, ())]
