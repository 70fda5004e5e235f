"""The model card of an exported folder: what was trained, on what, for how long, and what it scores. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from longseq.data import SPLITS
from longseq.errors import RunError
from longseq.interop import exported
from longseq.models.spec import PerformerSpec
from longseq.trained_model import Source

# Overrides that change no score of a file: which files are scored, and on what machine.
_ELSEWHERE = ("data.train=", "data.valid=", "data.test=", "data.ood=", "data.reweighted=", "data.workers=", "trainer.")
_HEAD = """---
library_name: longseq
tags: [longseq, performer, linear-attention]
---

# {name}

{what}
"""

_USE = """
## Use

```python
import longseq.huggingface  # pip install 'longseq[huggingface]'
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
```

{code}In longseq itself: `longseq evaluate FOLDER --data FILES`, `sample`, `embed`, or
`longseq fit CONFIG model.init_from=FOLDER`.
"""

_CODE = """Where longseq is not installed, leave out its import and pass `trust_remote_code=True`: the model code is
in this folder, in plain PyTorch.

"""


def model_card(source: Source, *, code: bool) -> str:
    """Markdown with Hugging Face's header; ``code``: whether the model code is in the folder."""
    config, spec = source.config, source.spec
    attention = spec.in_words(_attention)
    tokens = Path(source.vocabulary.name).name
    what = (
        f"A {config.model.objective} language model of {spec.parameter_count:,} parameters: {spec.depth} blocks, "
        f"{spec.heads} heads, width {spec.dim}, MLP {spec.hidden}, {f'{spec.made_of}, ' if spec.made_of else ''}"
        f"{attention}; {source.vocabulary.size:,} tokens ({tokens})."
    )
    parts = [_HEAD.format(name=source.name, what=what), "\n## Training\n\n", *_training(source)]
    scores = list(_scores(source))
    if scores:
        rows = "".join(f"| {' | '.join(row)} |\n" for row in scores)
        parts.append(
            "\n## Evaluation\n\n| split | sequences | loss | perplexity | accuracy |\n|---|---|---|---|---|\n" + rows
        )
    auto = exported.ARCHITECTURES[config.model.objective].replace("Longseq", "AutoModel")
    return "".join([*parts, _USE.format(auto=auto, code=_CODE if code else "")])


def _attention(spec: PerformerSpec) -> str:
    if spec.kind == "exact":
        return "exact softmax attention"
    window = f", exact within {spec.window} positions" if spec.window else ""
    return f"FAVOR+ linear attention (kernel {spec.kernel}, {spec.features} features{window})"


def _training(source: Source) -> Iterator[str]:
    config = source.config
    data = config.data
    yield f"- steps: {source.step:,}\n"
    if source.run:
        yield f"- tokens per step: {data.batch_tokens:,}, in sequences of {data.length} (packing {data.packing})\n"
        optim = config.optim
        yield f"- {'AdamW' if optim.name == 'adamw' else 'Muon and AdamW'}: lr {optim.lr:g}, "
        yield f"{optim.schedule} after {optim.warmup_steps} steps of warm-up, "
        yield f"weight decay {optim.weight_decay:g}, clip {optim.clip:g}; {config.trainer.precision}\n"
    if data.reverse:
        yield f"- both directions: a share of {data.reverse:g} from the last residue to the first, as it writes, too\n"
    if config.model.init_from:
        yield f"- began with the weights of {Path(config.model.init_from).name}\n"
    yield from _data(source)


def _data(source: Source) -> Iterator[str]:
    """Names and fingerprints of what was trained on, without the folders of the machine that did."""
    path = source.run.data_path if source.run else None
    if path is None or not path.is_file():
        return
    try:
        known = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise RunError(f"{path}: damaged; remove it, and the card names the data without fingerprints.") from None
    for split in ("train", "valid"):
        for name, identity in zip(source.config.data.files(split), known.get(split, []), strict=False):
            own = name if "://" in name or name.startswith("hub:") else Path(name).name
            yield f"- data.{split}: {own} ({identity or 'no fingerprint'})\n"


def _scores(source: Source) -> Iterator[tuple[str, ...]]:
    """A row for each split and file that `longseq evaluate` scored wholly, with this very checkpoint; overrides that
    change scores stand next to it.
    """
    if not source.run or not source.run.evaluations_dir.is_dir():
        return
    weights = "last" if source.weights.name == "model.safetensors" else "ema"
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(source.run.evaluations_dir.glob("*.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # of another version, or somebody's own file
            report = json.loads(path.read_text())
            ours = report["step"] == source.step and report["weights"] == weights
            otherwise = [word for word in report["overrides"] if not word.startswith(_ELSEWHERE)]
            whole = report.get("sequences_limit") is None
            rows = report["splits"].items() if ours and whole else ()
            for split, r in rows:
                quality = f"{r['loss']:.4f}", f"{r['perplexity']:.2f}", f"{r['accuracy']:.1%}"
                files = sorted({Path(file).name for file in r.get("sources", ())}) if split == "ood" else []
                notes = ", ".join(files + otherwise)
                own = split if split.partition("/")[0] in SPLITS else Path(split).name  # test/SOURCE, or a file's path
                name = f"{own} ({notes})" if notes else own
                found[name] = (name, f"{r['sequences']:,}", *quality)
    yield from found.values()
