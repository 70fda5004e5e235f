"""Export a model as a Hugging Face folder: safetensors, config.json, tokenizer and model card.

After `import longseq.huggingface`, transformers opens it with AutoTokenizer and AutoModelForCausalLM or
AutoModelForMaskedLM, AutoModel, AutoModelForSequenceClassification or AutoModelForTokenClassification; where longseq is
not installed, with trust_remote_code=True, as the model code is in the folder, in plain PyTorch. `longseq evaluate`,
`sample`, `embed` and `fit CONFIG model.init_from=OUT` take it as well. The checkpoint may be of any ZeRO stage,
precision and number of devices. OUT must not exist: it is written aside, and renamed when it is whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq.errors import LongseqError
from longseq.interop import exported
from longseq.trained_model import TARGET_HELP, find

DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|CHECKPOINT", type=Path, help=TARGET_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--ema", action="store_true", help="the running mean of the weights (trainer.ema_decay) instead of the last"
    )
    parser.add_argument(
        "--no-code", action="store_true", help="no model code in OUT: transformers opens it next to longseq alone"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32")


def run(args: argparse.Namespace) -> int:
    source = find(args.target, ema=args.ema)
    if args.out.exists():
        raise LongseqError(f"{args.out}: exists already, and is not overwritten: remove it, or choose another name.")

    from longseq.interop.exporting import export  # torch only now: what can be refused has been

    export(source, args.out, dtype=args.dtype, code=not args.no_code)
    print(f"exported {source.folder}, step {source.step}, to {args.out}")
    kind = exported.ARCHITECTURES[source.config.model.objective].removeprefix("Longseq")
    print(f"Open it:   import longseq.huggingface; transformers.AutoModel{kind}.from_pretrained({str(args.out)!r})")
    if not args.no_code:
        print("Without longseq installed: the same with trust_remote_code=True, and without the import")
    return 0
