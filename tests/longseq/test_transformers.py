"""What people do with a model in transformers: hidden states, heads, PEFT, Trainer, pipelines; and back to longseq."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import longseq
from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import vocabulary
from longseq.errors import RunError
from longseq.interop.travelling import FILES
from longseq.launch.before import check_origin
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM
from longseq.trained_model import find
from longseq.training.fit import begin_with

transformers = pytest.importorskip("transformers")
importlib.import_module("longseq.huggingface")  # registers the Auto classes

pytestmark = pytest.mark.interfaces

CLASSES = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}


@pytest.fixture(params=CLASSES)
def objective(request) -> str:
    return request.param


@pytest.fixture
def exported(trained, objective):
    """The model of a run whose records stand alone between BOS and EOS, and the folder "out" of it."""
    run = trained(f"model.objective={objective}", "data.packing=crop", "attention.window=4", "model.conv=3")
    assert main(["export", str(run.path), "out"]) == 0
    return find(run.path).load("cpu")


@pytest.fixture
def padded():
    torch.manual_seed(0)
    tokens = torch.randint(25, (3, 19))
    mask = torch.ones(3, 19, dtype=torch.int64)
    mask[1, 12:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def test_hidden_states_and_what_is_pooled_are_those_of_longseq(exported, objective, folder):
    model, tokenizer = (getattr(transformers, name).from_pretrained("out") for name in ("AutoModel", "AutoTokenizer"))
    records = ["MKVLAACDEFGH", "WYX"]
    given = tokenizer(records, return_tensors="pt", padding=True, padding_side="right")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        found = model.eval()(**given, output_hidden_states=True)
        assert torch.equal(found.last_hidden_state, exported.hidden(given["input_ids"], real))
        for layer in (0, 1):
            expected = exported.hidden(given["input_ids"], real, layer=layer)
            assert torch.equal(found.hidden_states[layer], expected)
    assert torch.equal(found.hidden_states[2], found.last_hidden_state)
    assert len(found.hidden_states) == 3
    assert model(**given).hidden_states is None
    (folder / "two.fasta").write_text("".join(f">{at}\n{record}\n" for at, record in enumerate(records)))
    for row, record in enumerate(longseq.embed("out", "two.fasta")):
        torch.testing.assert_close(found.pooler_output[row], torch.from_numpy(record.mean), atol=1e-5, rtol=1e-5)

    language = getattr(transformers, CLASSES[objective]).from_pretrained("out").eval()
    with torch.no_grad():
        states = language(**given, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(states, found.hidden_states, strict=True))
        assert torch.equal(language(**given, return_dict=False)[0], language(**given).logits)


@pytest.mark.parametrize("objective", ["causal"], indirect=True)
def test_hidden_states_of_generation_are_those_of_the_whole_sequence(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    out = model.generate(
        torch.tensor([[25, 10, 8, 17]]), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        return_dict_in_generate=True, output_hidden_states=True,
    )  # fmt: skip
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, expected in enumerate(whole):
        found = torch.cat([step[layer] for step in out.hidden_states], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "labels", "formula"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0, 1]), lambda x, y: -x.log_softmax(-1)[range(3), y].mean()),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0]), lambda x, y: (x[:, 0] - y).square().mean()),
        (
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            torch.tensor([[1, 0], [1, 1], [0, 0]]),
            lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(),
        ),
        (
            {"num_labels": 2, "problem_type": "regression"},
            torch.tensor([[1.0, 0.5], [2.0, 1.0], [0.0, 0.0]]),
            lambda x, y: (x - y).square().mean(),
        ),
    ],
)
def test_the_loss_of_a_sequence_is_that_of_its_formula(exported, padded, options, labels, formula):
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained("out", **options).eval()
    assert 0.5 * 0.02 < model.classifier.weight.std() < 2 * 0.02  # a new head is initialised
    assert not model.classifier.bias.any()
    found = model(**padded, labels=labels)
    real = padded["attention_mask"].bool()
    with torch.no_grad():
        hidden = exported.hidden(padded["input_ids"], real)
    mean = torch.stack([row[mask].mean(0) for row, mask in zip(hidden, real, strict=True)])
    logits = mean @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, formula(logits, labels), atol=1e-5, rtol=1e-4)
    found.loss.backward()
    assert model.model.embedding.weight.grad.abs().sum() > 0
    model.save_pretrained("labelled")
    again = kind.from_pretrained("labelled").eval()
    torch.testing.assert_close(again(**padded).logits, found.logits, atol=1e-6, rtol=1e-5)
    with pytest.raises(RunError, match=r"labelled: .*LongseqForSequenceClassification.* no language model"):
        find("labelled")


def test_the_loss_of_tokens_leaves_out_those_without_a_label(exported, padded):
    model = transformers.AutoModelForTokenClassification.from_pretrained("out", num_labels=4).eval()
    labels = torch.where(padded["attention_mask"].bool(), padded["input_ids"] % 4, -100)
    found = model(**padded, labels=labels)
    with torch.no_grad():
        hidden = exported.hidden(padded["input_ids"], padded["attention_mask"].bool())
    logits = hidden @ model.classifier.weight.T
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-4)
    scored = labels >= 0
    expected = -logits.log_softmax(-1)[scored][range(int(scored.sum())), labels[scored]].mean()
    torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=1e-4)


def test_checkpointing_computes_blocks_again_and_changes_no_gradient(exported, padded, objective, monkeypatch):
    model = getattr(transformers, CLASSES[objective]).from_pretrained("out").train()
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    gradients, counts = [], []
    for checkpointing in (False, True, False):
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == checkpointing
        model.zero_grad()
        calls.clear()
        model(**padded, labels=padded["input_ids"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        counts.append(len(calls))
    assert counts == [2, 4, 2]
    for first, *others in zip(*gradients, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("options", [(), ("model.head=transform", "model.mask_scaling=true")])
@pytest.mark.parametrize("objective", ["masked"], indirect=True)
def test_more_tokens_leave_the_logits_of_the_others_as_they_were(trained, padded, options, objective):
    assert main(["export", str(trained(f"model.objective={objective}", *options).path), "out"]) == 0
    model = transformers.AutoModelForMaskedLM.from_pretrained("out").eval()
    padded["input_ids"][:, 3] = 28  # MASK, the last token before
    with torch.no_grad():
        before = model(**padded).logits
        model.resize_token_embeddings(34)
        after = model(**padded).logits
        assert after.shape[-1] == model.config.vocab_size == model.get_output_embeddings().out_features == 34
        assert torch.equal(after[..., :29], before)
        model(input_ids=torch.tensor([[33, 30]]))
        model.save_pretrained("resized")
        again = transformers.AutoModelForMaskedLM.from_pretrained("resized").eval()
        assert torch.equal(again(**padded).logits, after)
    with pytest.raises(RunError, match=r"a model of 34 tokens, but .* has 29"):
        find("resized")


def test_peft_trains_factors_next_to_frozen_weights_and_merges_them(exported, padded, objective):
    peft = pytest.importorskip("peft")
    model = getattr(transformers, CLASSES[objective]).from_pretrained("out").eval()
    before = model(**padded).logits.detach()
    settings = peft.LoraConfig(
        r=4, target_modules=["qkv", "out"], init_lora_weights=False,
        task_type="CAUSAL_LM" if objective == "causal" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, settings)
    adapted.train()(**padded, labels=padded["input_ids"]).loss.backward()
    learned = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learned
    assert all("lora_" in name for name in learned)
    attention = adapted.get_base_model().model.blocks[1].attention.qkv
    product = attention.lora_B["default"].weight @ attention.lora_A["default"].weight * attention.scaling["default"]
    wanted = attention.base_layer.weight + product
    adapted.eval()
    changed = adapted(**padded).logits.detach()
    assert not torch.allclose(changed, before, atol=1e-2)
    adapted.save_pretrained("adapter")
    fresh = getattr(transformers, CLASSES[objective]).from_pretrained("out")
    again = peft.PeftModel.from_pretrained(fresh, "adapter").eval()
    assert torch.equal(again(**padded).logits, changed)
    if objective == "causal":
        given = {"input_ids": padded["input_ids"][:1, :5], "max_new_tokens": 6, "do_sample": False}
        texts = [again.generate(**given, use_cache=cached).tolist() for cached in (True, False)]
        assert texts[0] == texts[1]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.model.blocks[1].attention.qkv.weight, wanted)
    torch.testing.assert_close(merged(**padded).logits, changed, atol=1e-4, rtol=1e-4)
    merged.save_pretrained("merged")
    with torch.no_grad():
        ours = find("merged").load("cpu")(padded["input_ids"], padded["attention_mask"].bool())
        assert torch.equal(ours, merged(**padded).logits)


def test_three_steps_of_trainer_are_three_steps_by_hand_and_fit_goes_on_from_them(exported, objective, folder):
    pytest.importorskip("accelerate")
    kind = getattr(transformers, CLASSES[objective])
    torch.manual_seed(0)
    rows = torch.randint(25, (6, 9))
    labels = torch.where(torch.arange(9) < torch.tensor([9, 3, 7, 9, 2, 5])[:, None], rows, -100)
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    settings = transformers.TrainingArguments(
        output_dir="hf", max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, seed=1,
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(data)

    trainer = InOrder(model=kind.from_pretrained("out"), args=settings, train_dataset=data)
    trainer.train()
    hand = find("out").load("cpu").train()
    for step in range(3):
        tokens, wanted = rows[2 * step : 2 * step + 2], labels[2 * step : 2 * step + 2]
        if objective == "causal":
            wanted = F.pad(wanted[:, 1:], (0, 1), value=-100)
        hand.zero_grad()
        # What Trainer divides by: some releases count a causal model's first label, which nothing predicts.
        number = trainer._get_num_items_in_batch([{"labels": labels[2 * step : 2 * step + 2]}], torch.device("cpu"))
        assert int(number) - int((wanted >= 0).sum()) in ((0, 2) if objective == "causal" else (0,))
        (hand(tokens, targets=wanted)[0] / number).backward()
        with torch.no_grad():
            for parameter in hand.parameters():
                parameter -= 0.1 * parameter.grad
    trained = dict(trainer.model.model.named_parameters())
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(trained[name], parameter, atol=1e-5, rtol=1e-4)

    trainer.save_model("tuned")
    config = load_config("small.yaml", ["data.train=proteins.fasta", "model.init_from=tuned"])
    network = PerformerLM(config.performer_spec(vocabulary(config).size))
    begin_with(network, check_origin(config))
    assert all(torch.equal(value, trained[name]) for name, value in network.named_parameters())


def test_every_pipeline_gives_what_the_model_gives(exported, objective):
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = "MKVLAAC"
    given = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        features = torch.tensor(transformers.pipeline("feature-extraction", "out")(text))
        torch.testing.assert_close(features, exported.hidden(given["input_ids"]), atol=1e-5, rtol=1e-4)
        for task, kind in (
            ("text-classification", "AutoModelForSequenceClassification"),
            ("token-classification", "AutoModelForTokenClassification"),
        ):
            model = getattr(transformers, kind).from_pretrained("out", num_labels=3).eval()
            found = transformers.pipeline(task, model=model, tokenizer=tokenizer)(text)
            p = model(**given).logits[0].softmax(-1)
            rows = p[None] if p.ndim == 1 else p[1 : 1 + len(text)]  # BOS is none of its words
            assert [entry["label" if p.ndim == 1 else "entity"] for entry in found] == [
                f"LABEL_{at}" for at in rows.argmax(-1).tolist()
            ]
            assert [float(entry["score"]) for entry in found] == pytest.approx(rows.amax(-1).tolist(), abs=1e-5)
        if objective == "causal":
            (written,) = transformers.pipeline("text-generation", "out")(text, max_new_tokens=6, do_sample=False)
            out = transformers.AutoModelForCausalLM.from_pretrained("out").generate(
                **given, max_new_tokens=6, do_sample=False
            )
            assert written["generated_text"] == text + tokenizer.decode(out[0, 8:], skip_special_tokens=True)


def test_what_is_pushed_to_the_hub_has_the_model_code(trained, folder, monkeypatch):
    from huggingface_hub import HfApi
    from transformers import modeling_utils
    from transformers.utils import hub

    sent = []
    hubs = {
        "create_repo": lambda *_, **__: SimpleNamespace(repo_id="me/out"),
        "create_commit": lambda *_, **given: sent.append(given["operations"]),
    }
    for name, instead in hubs.items():
        monkeypatch.setattr(HfApi, name, instead)
        for module in (hub, modeling_utils):  # transformers 5.0 has them as functions
            monkeypatch.setattr(module, name, instead, raising=False)
    card = SimpleNamespace(save=lambda _: None)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: card)
    run = trained()
    assert main(["export", str(run.path), "out"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained("out").save_pretrained(
        "again", push_to_hub=True, repo_id="me/out"
    )
    (operations,) = sent
    assert {"config.json", "model.safetensors", *FILES} <= {each.path_in_repo for each in operations}


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_scores_a_text_model_by_its_own_likelihoods(trained, folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    lm_eval, tasks = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.tasks")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    run = trained("data.train=book.txt", "data.packing=crop", "attention.window=4")
    assert main(["export", str(run.path), "out"]) == 0
    scored = huggingface.HFLM(pretrained="out", tokenizer="out", device="cpu", batch_size=2, max_length=64)
    rows = [("the quick brown", [" fox", " cat"]), ("jumps over the", [" lazy", " dogs", " cow"])]
    ours, likelihoods = find(run.path).load("cpu"), []
    for context, choices in rows:
        likelihoods.append([])
        for choice in choices:
            tokens = torch.tensor([[256, *(context + choice).encode()]])
            with torch.no_grad():
                log_p = ours(tokens)[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])
            likelihoods[-1].append(float(log_p[-len(choice) :].sum()))
    instance = importlib.import_module("lm_eval.api.instance").Instance
    asked = [instance("loglikelihood", {}, (context, c), 0) for context, choices in rows for c in choices]
    found = [value for value, _ in scored.loglikelihood(asked, disable_tqdm=True)]
    assert found == pytest.approx([value for of_row in likelihoods for value in of_row], abs=1e-3)
    best = [max(range(len(of_row)), key=of_row.__getitem__) for of_row in likelihoods]
    lines = [
        {"text": context, "choices": [c.strip() for c in choices], "label": at if row == 0 else (at + 1) % 3}
        for row, ((context, choices), at) in enumerate(zip(rows, best, strict=True))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    manager = tasks.TaskManager(include_path=str(folder / "tasks"))
    results = lm_eval.simple_evaluate(model=scored, tasks=["words"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["words"]["acc,none"] == 0.5  # one label is the likeliest choice, the other is not
