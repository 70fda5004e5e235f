"""Perplexity a word and bits per byte of a text, beside the same computed by hand from the model's probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longseq.evaluation.split_scores import score
from longseq.evaluation.summary import summary
from longseq.evaluation.tokens import token_names
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq_data.readers.reading import Reading
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import save_tokenizer, train_tokenizer
from longseq_data.vocabulary import Vocabulary

# Words begin and end within windows, with tabs, blank lines and letters of several bytes; without a line's end at last.
BOOKS = ["\tThe  whale, the naïve\u00a0whale\n\n swam — and\r\nswam away. " * 3, "It was\nthe best of times "]


def model_of(vocabulary: Vocabulary) -> PerformerLM:
    torch.manual_seed(3)
    spec = PerformerSpec(vocabulary=vocabulary.size, dim=16, depth=1, heads=2, ffn_dim=32, causal=True, kind="exact")
    model = PerformerLM(spec)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform
    return model.eval()


def nats(model: PerformerLM, ids: list[list[int]], vocabulary: Vocabulary, length: int) -> float:
    """−log p of every token of each book and of its end, read ``length`` at a time."""
    stream = torch.tensor([vocabulary.eos, *(token for book in ids for token in (*book, vocabulary.eos))])
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(stream) - 1, length):
            window = stream[first : first + length + 1]
            logits = model(window[None, :-1])[0].double()
            total -= sum(float(row.log_softmax(0)[token]) for row, token in zip(logits, window[1:], strict=True))
    return total


@pytest.mark.parametrize("length", [7, 1000])
@pytest.mark.parametrize("tokens", ["bytes", "bpe"])
def test_word_perplexity_is_all_nats_over_the_words_between_white_space(tmp_path: Path, tokens: str, length: int):
    files = [tmp_path / f"{number}.txt" for number in range(len(BOOKS))]
    for file, book in zip(files, BOOKS, strict=True):
        file.write_bytes(book.encode())
    ids, kind = [list(book.encode()) for book in BOOKS], tokens
    if tokens == "bpe":
        tokenizer, kind = train_tokenizer(BOOKS, "bpe", 290), str(tmp_path / "bpe.json")
        save_tokenizer(tokenizer, Path(kind))
        ids = [tokenizer.encode(book).ids for book in BOOKS]
    spec = StreamSpec(
        tuple(map(str, files)), None, 0.0, 0.0, length, "concat", "causal", 0, 8, reading=Reading("text", kind)
    )
    model = model_of(spec.vocabulary)

    tally = score(model, spec, batch_sequences=2)
    found = summary(tally, token_names(spec.vocabulary), kind, top_k=5, bootstrap=0, seed=0)

    expected = nats(model, ids, spec.vocabulary, length)
    words, size = sum(len(book.split()) for book in BOOKS), sum(len(book.encode()) for book in BOOKS)
    assert (found["words"], found["bytes"]) == (words, size)
    assert math.log(found["word_perplexity"]) == pytest.approx(expected / words, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected / size / math.log(2), rel=1e-5)
