"""Sequences sampled while training."""

from __future__ import annotations

import html

import pytest
import torch
from tensorboard.plugin_util import markdown_to_safe_html

from longseq.training.callbacks.samples import monospaced, sample
from longseq_data.randomness import generator


def test_samples_are_draws_from_the_model_given_all_that_was_drawn_before(task):
    """Against a forward pass over the whole sequence for each token."""
    task = task("attention.kind=exact").eval()
    prompt = torch.tensor([[25], [7]])
    drawn = sample(task.model, prompt, 12, (3, 40))
    assert drawn.shape == (2, 12)
    random, tokens = generator(3, "samples", 40), prompt
    for number in range(12):
        with torch.no_grad():
            cumulated = task.model(tokens)[:, -1].double().softmax(-1).cumsum(-1)
        uniform = torch.from_numpy(random.random((2, 1)))
        expected = (cumulated < uniform).sum(-1)
        assert torch.equal(drawn[:, number], expected)
        tokens = torch.cat((tokens, expected[:, None]), dim=1)
    assert len(set(drawn.flatten().tolist())) > 3


def test_samples_follow_from_seed_and_step(task):
    task = task().eval()
    prompt = torch.full((2, 1), 25)
    first = sample(task.model, prompt, 9, (0, 10))
    torch.manual_seed(99)
    assert torch.equal(sample(task.model, prompt, 9, (0, 10)), first)
    assert not torch.equal(sample(task.model, prompt, 9, (0, 20)), first)


def test_tokens_that_are_not_to_be_drawn_are_not_drawn(task):
    never = list(range(3, 29))
    drawn = sample(task().eval().model, torch.full((4, 1), 25), 40, (0, 1), never)
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# a\n\n## b\n- c", "# a\\n\\n## b\\n- c"),
        ("a\tb\r\x0b\x85\u2028c", "a\\tb\\r\\x0b\\x85\\u2028c"),
        ("\x00\x1b[31m\x7f", "\\x00\\x1b[31m\\x7f"),
        ("```\n<b>&amp;</b> `x` \\n", "```\\n<b>&amp;</b> `x` \\\\n"),
        ("<b>`plain` \\ ünï</b>", "<b>`plain` \\ ünï</b>"),
        ("| a | b |", "| a | b |"),
    ],
)
def test_samples_are_monospaced_lines_whatever_they_hold(text, shown):
    logged = monospaced([text, "second"])
    assert logged == f"    {shown}\n    second"
    rendered = markdown_to_safe_html(logged)  # as TensorBoard's page shows it
    assert rendered.count("<pre><code>") == 1
    assert html.unescape(rendered) == f"<pre><code>{shown}\nsecond\n</code></pre>"
