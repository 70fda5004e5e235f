"""A model as a Hugging Face folder: the same logits, tokens and samples there, and in longseq as of the run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from longseq.cli import main
from longseq.trained_model import find
from longseq_data.tokenization import save_tokenizer, tokenizer_vocabulary, train_tokenizer
from longseq_data.vocabulary import LETTERS

transformers = pytest.importorskip("transformers")
importlib.import_module("longseq.huggingface")  # registers the Auto classes

pytestmark = pytest.mark.interfaces

SEQUENCE = "MKVLAACDEFGHIKLMNPQRSTVWYBOUXZ"


@pytest.mark.parametrize(
    ("objective", "auto", "options"),
    [
        (
            "causal",
            "AutoModelForCausalLM",
            ("attention.window=8", "attention.learned_share=true", "attention.redraw_every=4"),
        ),
        ("masked", "AutoModelForMaskedLM", ("attention.kernel=relu", "attention.qk_norm=true", "model.rotary_base=50")),
        ("masked", "AutoModelForMaskedLM", ("attention.kind=exact", "model.head=transform", "model.norm=post")),
        (
            "causal",
            "AutoModelForCausalLM",
            ("model.block=modern", "attention.layers=[{window: 8, features: 8}, exact]"),
        ),
        ("masked", "AutoModelForMaskedLM", ("model.block=modern", "model.conv=3", "model.ffn=relu2")),
        ("fim", "AutoModelForCausalLM", ("data.packing=crop",)),
    ],
)
def test_transformers_gives_the_logits_of_the_run_to_the_last_bit(trained, objective, auto, options, folder):
    run = trained(f"model.objective={objective}", *options)
    assert main(["export", str(run.path), "out"]) == 0
    theirs = getattr(transformers, auto).from_pretrained("out").eval()
    tokens = torch.randint(25, (2, 31))
    mask = torch.ones(2, 31, dtype=torch.int64)
    mask[0, 20:] = 0
    with torch.no_grad():
        ours = find(run.path).load("cpu")(tokens, mask.bool())
        found = theirs(input_ids=tokens, attention_mask=mask).logits
        ours_again = find(folder / "out").load("cpu")(tokens, mask.bool())
    assert torch.equal(found, ours)
    assert torch.equal(ours_again, ours)
    labels = torch.where(tokens % 2 == 0, tokens, -100)
    theirs(input_ids=tokens, labels=labels).loss.backward()
    assert theirs.model.embedding.weight.grad.abs().sum() > 0
    theirs.save_pretrained("saved")
    with torch.no_grad():
        assert torch.equal(find(folder / "saved").load("cpu")(tokens, mask.bool()), ours)


def test_samples_of_the_export_are_those_of_the_run(trained, capsys):
    run = trained()
    main(["export", str(run.path), "out"])
    written = []
    for target, seed in ((run.path, 5), ("out", 5), ("out", 6)):
        capsys.readouterr()
        assert (
            main(["sample", str(target), "--prompt", "MKV", "--length", "30", "--number", "2", f"--seed={seed}"]) == 0
        )
        written.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith(">")])
    assert written[0] == written[1] != written[2]
    assert len("".join(written[0])) > 6


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_proteins_tokenizer_gives_our_ids(trained, objective):
    run = trained(f"model.objective={objective}", "data.packing=crop")
    main(["export", str(run.path), "out"])
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    residues = [LETTERS.index(letter) for letter in SEQUENCE]
    end = [] if objective == "causal" else [26]
    assert tokenizer(SEQUENCE)["input_ids"] == [25, *residues, *end]
    assert tokenizer(SEQUENCE.lower() + "*\n", add_special_tokens=False)["input_ids"] == residues
    assert tokenizer("MJ-<mask>", add_special_tokens=False)["input_ids"] == [10, 23, 23, 28]
    assert tokenizer.decode(residues) == SEQUENCE
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert special == (25, 26, 27, 28)
    assert len(tokenizer) == 29


@pytest.mark.parametrize("tokens", ["protein", "bytes", "words.json"])
def test_marks_of_infilling_have_the_ids_behind_all_others_in_the_tokenizer(trained, folder, tokens):
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    (folder / "book.txt").write_text(text)
    save_tokenizer(train_tokenizer([text], "bpe", 300), folder / "words.json")
    data = () if tokens == "protein" else (f"data.train={folder}/book.txt", f"data.tokenizer={tokens}")
    run = trained("model.objective=fim", *data)
    main(["export", str(run.path), "out"])
    size = {"protein": 29, "bytes": 260}.get(tokens) or tokenizer_vocabulary(str(folder / tokens)).size
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    found = tokenizer("<fim_prefix>MK<fim_suffix>W<fim_middle>", add_special_tokens=False)["input_ids"]
    assert [each for each in found if each >= size] == [size, size + 1, size + 2]
    assert (found[0], found[-1], len(tokenizer)) == (size, size + 2, size + 3)
    again, own = find("out").vocabulary, find(run.path).vocabulary
    assert replace(again, name="") == replace(own, name="")  # the marks that the file has are not counted twice


def test_x_is_a_residue_and_no_special_token(trained):
    main(["export", str(trained().path), "out"])
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    for text in ("MXKX", "MJKJ"):  # an unknown letter reads as X
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "MXKX"
    tokenizer.save_pretrained("again")
    again = transformers.AutoTokenizer.from_pretrained("again")
    assert again.decode(again("MXKX")["input_ids"], skip_special_tokens=True) == "MXKX"
    assert "X" not in tokenizer.all_special_tokens + again.all_special_tokens


def test_the_tokenizer_of_joined_records_begins_with_their_end(trained):
    run = trained("data.packing=concat")
    main(["export", str(run.path), "out"])
    assert transformers.AutoTokenizer.from_pretrained("out")("MK")["input_ids"] == [26, 10, 8]


def test_the_bytes_tokenizer_gives_our_ids(trained, folder):
    (folder / "book.txt").write_text("Grüße, 世界!\n" * 40, encoding="utf-8")
    run = trained(f"data.train={folder}/book.txt", "data.packing=crop")
    main(["export", str(run.path), "out"])
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = " Grüße,\t世界 \x00 end\n"
    assert tokenizer(text)["input_ids"] == [256, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (257, 258, 259)


def test_a_trained_tokenizer_goes_with_the_model(trained, folder):
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    (folder / "book.txt").write_text(text)
    save_tokenizer(train_tokenizer([text], "bpe", 300), folder / "words.json")
    run = trained(f"data.train={folder}/book.txt", f"data.tokenizer={folder}/words.json")
    main(["export", str(run.path), "out"])
    tokenizer, known = transformers.AutoTokenizer.from_pretrained("out"), tokenizer_vocabulary(f"{folder}/words.json")
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (known.eos, known.mask)
    assert tokenizer.decode(tokenizer("lazy fox", add_special_tokens=False)["input_ids"]) == "lazy fox"
    run.path.rename(folder / "elsewhere")
    assert find(folder / "out").vocabulary.size == known.size


def test_the_model_card_says_what_was_trained_on_for_how_long_and_what_it_scores(trained, folder):
    run = trained()
    run.evaluations_dir.mkdir()
    scores = {"sequences": 3, "loss": 2.5, "perplexity": 12.18, "accuracy": 0.231}
    report = {"step": 8, "weights": "last", "overrides": [], "splits": {"test": scores}}
    (run.evaluations_dir / "a.json").write_text(json.dumps(report))
    (run.evaluations_dir / "again.json").write_text(json.dumps({**report, "splits": {"test": scores, "ood": scores}}))
    sources = {"test/a": {**scores, "loss": 2.25}, "valid/a": {**scores, "loss": 2.75}}
    (run.evaluations_dir / "sources.json").write_text(json.dumps({**report, "splits": sources}))
    few = {"test": {**scores, "sequences": 2, "loss": 1.0}}
    (run.evaluations_dir / "few.json").write_text(json.dumps({**report, "sequences_limit": 2, "splits": few}))
    (run.evaluations_dir / "b.json").write_text(json.dumps({**report, "step": 4, "splits": {"valid": scores}}))
    main(["export", str(run.path), "out"])
    card = (folder / "out" / "README.md").read_text()
    assert "steps: 8" in card
    assert json.loads(run.data_path.read_text())["train"][0] in card
    assert "| test | 3 | 2.5000 | 12.18 | 23.1% |" in card
    assert card.count("| test |") == card.count("| ood |") == 1
    assert "| test/a | 3 | 2.2500 |" in card
    assert "| valid/a | 3 | 2.7500 |" in card
    assert "valid |" not in card
    assert str(folder) not in card + (folder / "out" / "config.json").read_text()  # nothing of this machine


def test_the_model_card_has_the_scores_of_evaluations_with_overrides_and_the_ood_files_name(trained, folder):
    run = trained("trainer.accelerator=cpu")
    (folder / "viruses.fasta").write_text((folder / "proteins.fasta").read_text())
    command = ["evaluate", str(run.path), "--split", "ood", "data.ood=viruses.fasta"]
    assert main(command) == 0
    assert main([*command, "data.length=8"]) == 0
    assert main(["export", str(run.path), "out"]) == 0
    card = (folder / "out" / "README.md").read_text()
    losses = {}
    for path in run.evaluations_dir.glob("*.json"):
        report = json.loads(path.read_text())
        losses["data.length=8" in report["overrides"]] = report["splits"]["ood"]
    for changed, name in ((False, "ood (viruses.fasta)"), (True, "ood (viruses.fasta, data.length=8)")):
        r = losses[changed]
        assert f"| {name} | {r['sequences']:,} | {r['loss']:.4f} |" in card
    assert str(folder) not in card


def test_bfloat16_halves_the_weights(trained, folder):
    run = trained()
    main(["export", str(run.path), "small", "--dtype", "bfloat16"])
    main(["export", str(run.path), "large"])
    assert transformers.AutoModelForCausalLM.from_pretrained("small").dtype == torch.bfloat16
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("small", "large")]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_cannot_be_exported_or_opened_is_said_in_one_sentence(trained, folder, capsys):
    run = trained()
    (folder / "taken").mkdir()
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    main(["export", str(run.path), "out"])
    described = json.loads((folder / "out" / "config.json").read_text())
    described["longseq"]["format"] = 0
    (folder / "older").mkdir()
    (folder / "older" / "config.json").write_text(json.dumps(described))
    capsys.readouterr()
    for arguments, sentence in (
        ((run.path, "taken"), "taken: exists already, and is not overwritten"),
        (("nowhere", "new"), "nowhere: no such run folder"),
        (("older", "new"), "format 0, this version of longseq reads 1"),
        ((run.path, "new", "--ema"), "holds no running mean"),
    ):
        assert main(["export", *map(str, arguments)]) == 1
        assert sentence in capsys.readouterr().err
    assert not (folder / "new").exists()
    assert not list(folder.glob(".*.partial"))


STUB = """
from dataclasses import dataclass
__version__, __path__ = {version!r}, []
AutoConfig = AutoModel = AutoModelForCausalLM = AutoModelForMaskedLM = GenerationMixin = object
AutoModelForSequenceClassification = AutoModelForTokenClassification = PretrainedConfig = PreTrainedModel = object
import sys, types
@dataclass
class CausalLMOutputWithPast:
    {state}: object = None
outputs = sys.modules["transformers.modeling_outputs"] = types.ModuleType("transformers.modeling_outputs")
outputs.CausalLMOutputWithPast, outputs.MaskedLMOutput = CausalLMOutputWithPast, object
outputs.BaseModelOutputWithPooling = outputs.SequenceClassifierOutput = outputs.TokenClassifierOutput = object
"""


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (
            STUB.format(version="4.57.6", state="past_key_values"),
            "the code of the model cannot work with transformers 4",
        ),
        (
            STUB.format(version="5.99.0", state="state"),
            "the code of the model cannot work with transformers 5.99.0): pip",
        ),
        ("__version__ = '4.0.0'", "cannot import name 'AutoConfig'"),
        ("raise ImportError('no torch')", "no torch): pip install"),
    ],
)
def test_a_transformers_that_cannot_work_is_refused_at_import(tmp_path, module, sentence):
    (tmp_path / "transformers.py").write_text(module)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import longseq.huggingface"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"ImportError: longseq.huggingface needs transformers ({sentence}")
    assert "'longseq[huggingface]'" in ended.stderr.splitlines()[-1]
