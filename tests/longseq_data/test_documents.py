"""How many bytes and words tokens stand for: counts of a whole text, shared out among its tokens."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from longseq_data.ingest.block import BlockDocument
from longseq_data.tokenization import words_before
from longseq_data.vocabulary import BYTES

SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]


def test_every_white_space_of_unicode_separates_words():
    for space in SPACES:
        assert words_before(f"a{space}b".encode())[-1] == 2, hex(ord(space))
    assert words_before("a\u200bb\u00adc\u2060d\u180ee".encode())[-1] == 1  # look empty, and are no white space


@pytest.mark.parametrize("seed", range(20))
def test_words_are_those_of_split_before_every_byte(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["a", "é", "日", " ", "\n", "\u00a0", "\u3000", "𝄞"], k=60))
    data, words = text.encode(), words_before(text.encode())
    assert len(words) == len(data) + 1
    for end in range(len(text) + 1):
        assert words[len(text[:end].encode())] == len(text[:end].split())


def test_no_bytes_no_words():
    assert words_before(b"").tolist() == [0]


def test_bytes_that_are_no_text_are_words_too():
    assert words_before(b"\xff\xfe \x80")[-1] == 2


def test_parts_of_a_document_add_up():
    data = "one two  drei\u00a0vier\n".encode()
    document = BlockDocument(b"a", "a", np.frombuffer(data, np.uint8), len(data), BYTES)
    for cuts in ([3, 7], [1, 2, 13, 14, 15], []):
        edges = [0, *cuts, len(data)]
        extents = [document.measure(a, b) for a, b in pairwise(edges)]
        assert sum(extent.bytes for extent in extents) == len(data)
        assert sum(extent.words for extent in extents) == 4
    assert document.encode(4, 7).tolist() == list(b"two")
    assert document.encode(0, None).dtype == np.uint16
