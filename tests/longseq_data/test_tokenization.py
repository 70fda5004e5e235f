"""Tokenizer files: ids, special tokens, what each id stands for, and training."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from longseq_data.errors import DataError
from longseq_data.ingest.block import BlockDocument
from longseq_data.readers.documents import Text, tokenise
from longseq_data.readers.reading import Reading
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import load_tokenizer, save_tokenizer, tokenizer_vocabulary, train_tokenizer
from plain_samples import evaluation_samples, training_samples

pytestmark = pytest.mark.interfaces

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "naïve",
    "日本語",
    "readers",
    "wait",
]
TEXTS = [" ".join(WORDS[i % 5 :: 1 + i % 3]) + "\n" for i in range(60)]


@pytest.fixture(params=["unigram", "bpe"])
def trained(request, tmp_path) -> str:
    path = tmp_path / f"{request.param}.json"
    save_tokenizer(train_tokenizer(TEXTS, request.param, 320), path)
    return str(path)


@pytest.fixture
def word_level(tmp_path):
    """word_level(special, ...): a tokenizer of the words, lower-cased, and these special tokens after them."""

    def word_level(*special: str, first: tuple[str, ...] = ()) -> str:
        words = dict.fromkeys([*first, *["a", "b", "c", "d"], "[UNK]"])
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken(word) for word in (*first, *special)])
        path = tmp_path / "words.json"
        tokenizer.save(str(path))
        return str(path)

    return word_level


def test_a_trained_tokenizer_writes_every_text_and_reads_it_back(trained):
    tokenizer = load_tokenizer(trained)
    for text in [*TEXTS, "\0\x01 \t\r\n", "<bos> <eos><mask>", "Ωå𝄞 never seen", "  spaces   inside  "]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer_vocabulary(trained).ordinary


def test_a_trained_tokenizer_ends_in_the_special_tokens(trained):
    vocabulary = tokenizer_vocabulary(trained)
    tokenizer = load_tokenizer(trained)
    size = tokenizer.get_vocab_size()
    assert 261 <= size <= 320
    assert (vocabulary.size, vocabulary.ordinary, vocabulary.replacements) == (size, size - 4, size - 4)
    ids = (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.mask)
    assert [tokenizer.id_to_token(i) for i in ids] == ["<bos>", "<eos>", "<pad>", "<mask>"]
    assert ids == tuple(range(size - 4, size))
    assert vocabulary.dtype == np.uint16


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_the_most_frequent_words_are_one_piece_with_their_space(model):
    texts = [f"{a} the {b}, the {a} and the, {b} and {a}.\n" for a, b in zip(WORDS, WORDS[3:], strict=False)]
    tokens = train_tokenizer(texts, model, 320).encode(" the quick the lazy the end").tokens
    assert tokens.count("Ġthe") == 3


def test_bpe_training_is_repeatable():
    first, second = (train_tokenizer(TEXTS, "bpe", 320).to_str() for _ in range(2))
    assert json.loads(first) == json.loads(second)


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_too_little_text_gives_a_smaller_tokenizer(model):
    assert 260 <= train_tokenizer(["a"], model, 5000).get_vocab_size() < 300


def test_bad_data_met_while_training_is_said_as_it_is():
    def texts():
        yield "a b c"
        raise DataError("a.txt, line 2: bad.")

    for model in ("unigram", "bpe"):
        with pytest.raises(DataError, match=r"^a\.txt, line 2: bad\.$"):
            train_tokenizer(texts(), model, 300)


def test_special_tokens_that_a_tokenizer_lacks_are_appended(word_level):
    vocabulary = tokenizer_vocabulary(word_level())
    assert (vocabulary.ordinary, vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.mask) == (5, 5, 6, 7, 8)
    assert vocabulary.size == 9


@pytest.mark.parametrize(
    ("special", "first", "expected"),
    [
        # (ordinary, bos, eos, pad, mask, size)
        (("<|endoftext|>",), (), (5, 6, 5, 7, 8, 9)),
        (("<pad>", "</s>", "<s>"), (), (5, 7, 6, 5, 8, 9)),
        (("<pad>",), ("[MASK]", "[CLS]"), (7, 8, 9, 7, 10, 11)),
        (("<extra>",), (), (6, 6, 7, 8, 9, 10)),
    ],
)
def test_special_tokens_at_a_tokenizers_end_are_taken_over(special, first, expected, word_level):
    v = tokenizer_vocabulary(word_level(*special, first=first))
    assert (v.ordinary, v.bos, v.eos, v.pad, v.mask, v.size) == expected
    assert len({v.bos, v.eos, v.pad, v.mask}) == 4


def test_every_byte_and_word_counts_once_even_where_a_tokenizer_drops_text(word_level):
    text = "  A b\u00a0日本 ...\n c  "
    path = word_level()
    tokens = tokenise(Text("t", "t", 1, text.encode()), path, strict=False)
    document = BlockDocument(b"t", "t", tokens, tokens.nbytes, tokenizer_vocabulary(path), text.encode())
    assert document.tokens.tolist() == [0, 1, 4, 4, 2] or document.length == 5
    parts = [document.measure(i, i + 1) for i in range(document.length)]
    assert sum(part.bytes for part in parts) == len(text.encode())
    assert sum(part.words for part in parts) == len(text.split())
    assert [part.bytes for part in parts] == [3, 2, 8, 4, 5]


@pytest.mark.parametrize("length", [5, 16, 300])
@pytest.mark.parametrize(("packing", "reset"), [("concat", False), ("concat", True), ("crop", False)])
def test_an_evaluation_measures_the_whole_text(packing, reset, length, trained, write):
    data = "".join(TEXTS).encode()
    source = write("a.txt", data)
    reading = Reading("lines", trained)
    spec = StreamSpec(
        (source,), None, 0.0, 0.0, length, packing, "causal", 5, 8, reading=reading, reset=reset, measured=True
    )
    samples = list(evaluation_samples(spec))
    assert sum(sample.extent.bytes for sample in samples) == len(data) - data.count(b"\n")
    assert sum(sample.extent.words for sample in samples) == len(data.split())


def test_measures_do_not_change_the_samples(trained, write):
    source = write("a.txt", "".join(TEXTS))
    for tokens in ("bytes", trained):
        specs = [
            StreamSpec(
                (source,),
                None,
                0.1,
                0.0,
                9,
                "concat",
                "causal",
                5,
                8,
                reading=Reading("text", tokens),
                measured=measured,
            )
            for measured in (False, True)
        ]
        for plain, measured in islice(zip(*map(training_samples, specs), strict=True), 30):
            assert plain.tokens.tolist() == measured.tokens.tolist()
            assert plain.extent is None
            assert measured.extent.bytes > 0


def test_bytes_that_are_no_utf8_are_replaced_or_refused_with_their_line(trained):
    text = Text("a", "a.txt", 5, b"one\ntwo \xff three\n")
    assert load_tokenizer(trained).decode(tokenise(text, trained, False).tolist()) == "one\ntwo \ufffd three\n"
    with pytest.raises(
        DataError, match=r"a\.txt, line 6: byte 0xff is not UTF-8; convert the file, or set data.strict=f"
    ):
        tokenise(text, trained, True)


@pytest.mark.parametrize("content", [None, "", "{}", "[1, 2]", '{"model": {"type": "Nonsense"}}', "\0"])
def test_what_is_no_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"no such tokenizer file|no tokenizer that Hugging Face tokenizers") as caught:
        tokenizer_vocabulary(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
