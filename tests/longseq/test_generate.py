"""What transformers' generate() writes with an exported model, and the scores that it reports: the model's own.

The oracle is the model itself without padding, state and beams: the whole sequence again for each token.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from longseq.cli import main
from longseq.errors import LongseqError
from longseq.trained_model import find

transformers = pytest.importorskip("transformers")
importlib.import_module("longseq.huggingface")  # registers the Auto classes

pytestmark = pytest.mark.interfaces

PROMPTS = ("MKVLAACDEF", "MKV", "WYXCCA")
ATTENTION = {
    "window": ("attention.window=4", "attention.learned_share=true", "attention.learned_decay=true"),
    "features alone": ("attention.qk_norm=true",),
    "exact and window": ("attention.layers=[exact, {window: 4}]", "attention.forget_gate=true"),
    "modern": ("model.block=modern", "attention.window=4"),
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "top_k": 0, "num_beams": 3},
}


@pytest.fixture(params=ATTENTION.values(), ids=ATTENTION)
def exported(request, trained):
    """The model of the run, the same in transformers, and its tokenizer."""
    run = trained(*request.param)
    assert main(["export", str(run.path), "out"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    return find(run.path).load("cpu"), theirs, transformers.AutoTokenizer.from_pretrained("out")


def generated(model, tokenizer, side: str, prompts=PROMPTS, **options):
    """generate()'s output for the prompts, and each sequence's new tokens up to EOS."""
    tokenizer.padding_side = side
    given = tokenizer(list(prompts), return_tensors="pt", padding=True)
    transformers.set_seed(3)
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=9, return_dict_in_generate=True, output_scores=True, output_logits=True, **options
        )
    new = out.sequences[:, given["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return out, [row[: row.index(end) + 1] if end in row else row for row in new]


def log_likelihoods(ours, tokenizer, prompt: str, new: list[int]) -> torch.Tensor:
    """Of each new token, by one plain forward pass."""
    start = tokenizer(prompt)["input_ids"]
    tokens = torch.tensor([[*start, *new]])
    with torch.no_grad():
        log_p = ours(tokens)[0].log_softmax(-1)[len(start) - 1 : -1]
    return log_p.gather(1, torch.tensor(new)[:, None])[:, 0]


@pytest.mark.parametrize("way", WAYS)
def test_sequences_and_scores_are_the_same_with_and_without_the_state_and_padded_on_either_side(exported, way):
    ours, theirs, tokenizer = exported
    found = {}
    for use_cache in (True, False):
        for side in ("left", "right"):
            out, new = generated(theirs, tokenizer, side, use_cache=use_cache, **WAYS[way])
            found[use_cache, side] = new
            each = len(new) // len(PROMPTS)
            beams = getattr(out, "beam_indices", None)
            of_tokens = theirs.compute_transition_scores(
                out.sequences, out.scores, beams, normalize_logits=beams is None
            )
            for row, tokens in enumerate(new):
                true = log_likelihoods(ours, tokenizer, PROMPTS[row // each], tokens)
                assert of_tokens[row, : len(tokens)].tolist() == pytest.approx(true.tolist(), abs=1e-3)
                if beams is not None:
                    assert out.sequences_scores[row].item() == pytest.approx(true.mean().item(), abs=1e-4)
    first = found[True, "left"]
    assert all(new == first for new in found.values())
    assert len({tuple(tokens) for tokens in first}) > 1


def test_greedy_search_writes_the_likeliest_token_each_time(exported):
    ours, theirs, tokenizer = exported
    _, found = generated(theirs, tokenizer, "left", do_sample=False)
    for prompt, new in zip(PROMPTS, found, strict=True):
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        for token in new:
            with torch.no_grad():
                following = ours(tokens)[:, -1:].argmax(-1)
            assert following.item() == token
            tokens = torch.cat((tokens, following), dim=1)


def test_the_state_goes_on_with_one_token_or_several(exported):
    ours, theirs, tokenizer = exported
    tokens = tokenizer("MKVLAACDEFGHIKL", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = ours(tokens)
        begun = theirs(tokens[:, :7], use_cache=True)
        name = next(name for name in ("cache", "past_key_values") if name in begun)
        rest = theirs(tokens[:, 7:], **{name: begun[name]})
    torch.testing.assert_close(begun.logits, whole[:, :7], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest.logits, whole[:, 7:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "wrong", "right"),
    [
        ("causal", "AutoModelForMaskedLM", "AutoModelForCausalLM"),
        ("masked", "AutoModelForCausalLM", "AutoModelForMaskedLM"),
    ],
)
def test_a_model_of_the_other_objective_is_refused_in_one_sentence(trained, objective, wrong, right):
    main(["export", str(trained(f"model.objective={objective}").path), "out"])
    task = {"causal": "fill-mask", "masked": "text-generation"}[objective]
    for opened in (
        lambda: getattr(transformers, wrong).from_pretrained("out"),
        lambda: transformers.pipeline(task, "out"),
    ):
        with pytest.raises(LongseqError, match=rf"out: a {objective} model .*: open it with {right}\.") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert getattr(transformers, right).from_pretrained("out").config.longseq["model"]["objective"] == objective


def test_the_pipelines_fill_masks_and_continue_text_as_the_model_itself_does(trained, folder):
    main(["export", str(trained("model.objective=masked", "run.name=m").path), "masked"])
    ours = find(folder / "masked").load("cpu")
    best = transformers.pipeline("fill-mask", "masked")("MKV<mask>AAC", top_k=1)[0]
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained("masked")("MKV<mask>AAC")["input_ids"]])
    with torch.no_grad():
        p = ours(tokens)[0, tokens[0].tolist().index(28)].softmax(-1)
    assert (best["token"], best["score"]) == (int(p.argmax()), pytest.approx(p.max().item(), abs=1e-5))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generation_goes_on_from_a_state_that_is_given(exported, way):
    _, theirs, tokenizer = exported
    ids = tokenizer(["MKVLAACDEF", "WYXCCAMKVL"], return_tensors="pt")["input_ids"]
    whole = theirs.generate(ids, max_new_tokens=9, **WAYS[way])
    for known in (4, ids.shape[1] - 1):
        before = theirs(ids[:, :known], use_cache=True)
        name = "cache" if "cache" in before else "past_key_values"
        again = theirs.generate(ids, max_new_tokens=9, **{name: before[name]}, **WAYS[way])
        assert again.tolist() == whole.tolist(), known
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded in front
    whole = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, **WAYS[way])
    before = theirs(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)[name]
    again = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, **{name: before}, **WAYS[way])
    assert again.tolist() == whole.tolist()


def test_a_state_that_does_not_fit_the_prompts_is_refused(exported):
    _, theirs, tokenizer = exported
    ids = tokenizer(["MKVLAACDEF", "WYXCCAMKVL"], return_tensors="pt")["input_ids"]
    longer, length = torch.cat([ids, ids[:, 1:2]], 1), ids.shape[1]
    padded = torch.ones_like(ids)
    padded[1, -3:] = 0  # on the right
    name = "cache" if "cache" in theirs(ids, use_cache=True) else "past_key_values"
    for read, mask, left in (
        ((longer[:, :length], None), None, "0, 0"),
        ((longer, None), None, "-1, -1"),
        ((ids[:, :4], None), padded, f"{length - 4}, {length - 7}"),
        ((ids[:, :7], padded.flip(1)[:, :7]), padded, f"{length - 7}, {length - 7}"),  # the last of them padding
    ):
        before = theirs(read[0], attention_mask=read[1], use_cache=True)[name]
        with pytest.raises(LongseqError, match=f"leaves {left} tokens of the prompts to read: give prompts that go on"):
            theirs.generate(ids, max_new_tokens=2, do_sample=False, attention_mask=mask, **{name: before})
