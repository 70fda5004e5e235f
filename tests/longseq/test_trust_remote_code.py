"""An exported folder where longseq is not installed: transformers opens it by the code that travels with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from longseq.cli import main
from longseq.interop.exporting import export
from longseq.interop.travelling import FILES
from longseq.trained_model import find

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interfaces

CAUSAL = ("attention.window=4", "attention.learned_decay=true", "model.block=modern", "attention.redraw_every=4")
PROMPTS = ["MKVLAACDEF", "MKV", "WYXCCA"]

ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("longseq", "longseq_data"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
import json, torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification
from transformers import AutoTokenizer, pipeline

trusting = {"trust_remote_code": True}
torch.set_num_threads(1)
tokens, mask, prompts = torch.load("given.pt")
model = AutoModelForCausalLM.from_pretrained("causal", **trusting).eval()
tokenizer = AutoTokenizer.from_pretrained("causal")
found = {"longseq": sorted(name for name in sys.modules if name.partition(".")[0] == "longseq")}
prompted = tokenizer(prompts, return_tensors="pt", padding=True)
with torch.no_grad():
    found["logits"] = model(tokens, mask).logits.tolist()
    for cached in (True, False):
        for beams in (1, 3):
            out = model.generate(**prompted, max_new_tokens=12, do_sample=False, use_cache=cached, num_beams=beams)
            found[f"{cached} {beams}"] = out.tolist()
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
found["text"] = write(prompts[0], max_new_tokens=5, do_sample=False)
model.save_pretrained("again")
with torch.no_grad():
    found["again"] = AutoModelForCausalLM.from_pretrained("again", **trusting).eval()(tokens, mask).logits.tolist()
    found["masked"] = AutoModelForMaskedLM.from_pretrained("masked", **trusting).eval()(tokens, mask).logits.tolist()
    found["hidden"] = AutoModel.from_pretrained("masked", **trusting).eval()(tokens, mask)[0].tolist()
labels = AutoModelForTokenClassification.from_pretrained("masked", num_labels=3, **trusting).train()
before = labels.model.embedding.weight
labels.gradient_checkpointing_enable()
labels(tokens, mask, labels=tokens % 3).loss.backward()
found["learns"] = [float(p.grad.abs().sum()) for n, p in labels.named_parameters() if p.requires_grad]
json.dump(found, open("found.json", "w"))
"""


def test_it_computes_what_longseq_does_where_longseq_cannot_be_imported(trained, folder):
    runs = {
        "causal": trained(*CAUSAL),
        "masked": trained("model.objective=masked", "attention.kernel=relu", "run.name=m"),
    }
    for name, run in runs.items():
        assert main(["export", str(run.path), name]) == 0
    torch.manual_seed(0)
    tokens, mask = torch.randint(25, (2, 31)), torch.ones(2, 31, dtype=torch.int64)
    mask[0, 20:] = 0
    torch.save((tokens, mask, PROMPTS), "given.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    assert found["longseq"] == []

    models = {name: find(run.path).load("cpu") for name, run in runs.items()}
    with torch.no_grad():
        own = {name: model(tokens, mask.bool()) for name, model in models.items()}
        hidden = models["masked"].hidden(tokens, mask.bool())
    pairs = (("logits", own["causal"]), ("again", own["causal"]), ("masked", own["masked"]), ("hidden", hidden))
    for name, expected in pairs:
        keep = mask.bool() if name in ("masked", "hidden") else slice(None)
        torch.testing.assert_close(torch.tensor(found[name])[keep], expected[keep], atol=2e-4, rtol=2e-4)

    import longseq.huggingface  # noqa: F401

    ours = transformers.AutoModelForCausalLM.from_pretrained("causal").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("causal")
    prompted = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for beams in (1, 3):
        out = ours.generate(**prompted, max_new_tokens=12, do_sample=False, num_beams=beams)
        assert found[f"True {beams}"] == found[f"False {beams}"] == out.tolist()
    (text,) = found["text"]
    written = ours.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert text["generated_text"].endswith(tokenizer.decode(written[0, 11:], skip_special_tokens=True))
    assert all(size > 0 for size in found["learns"])
    assert len(found["learns"]) == len(list(models["masked"].parameters())) - 1 + 2  # a head for the head


def test_the_code_lies_in_the_folder_unless_it_is_not_wanted(trained, folder, capsys):
    run = trained()
    assert main(["export", str(run.path), "with"]) == 0
    assert main(["export", str(run.path), "without", "--no-code"]) == 0
    names = {name: {path.name for path in (folder / name).iterdir()} for name in ("with", "without")}
    assert names["with"] - names["without"] == set(FILES)
    described = {name: json.loads((folder / name / "config.json").read_text()) for name in names}
    assert described["with"]["auto_map"]["AutoModelForCausalLM"] == "modeling_longseq.LongseqForCausalLM"
    assert not {"auto_map", "performer"} & described["without"].keys()
    cards = {name: (folder / name / "README.md").read_text() for name in names}
    assert "trust_remote_code" in cards["with"]
    assert "trust_remote_code" not in cards["without"]


def test_an_export_of_what_the_code_does_not_compute_is_refused_and_leaves_nothing(trained, folder, monkeypatch):
    from longseq.errors import LongseqError
    from longseq.interop import travelling

    run = trained("attention.window=3")
    monkeypatch.setattr(travelling, "_LAYER", tuple(name for name in travelling._LAYER if name != "window"))
    with pytest.raises(LongseqError, match=r"^attention\.window=3: the model code that travels"):
        export(run.path, "out")
    assert not (folder / "out").exists()
    export(run.path, "out", code=False)
    assert (folder / "out" / "config.json").is_file()
