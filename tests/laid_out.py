"""Documents laid out for infilling one by one, in plain Python: what samples are held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import stream_words, words
from longseq_data.vocabulary import PROTEIN, InfillVocabulary, Vocabulary


def documents(row: list[int], tokens: Vocabulary = PROTEIN) -> list[list[int]]:
    """A row of tokens without padding, cut behind each EOS and before each BOS."""
    found: list[list[int]] = [[]]
    for token in row:
        if found[-1] and (token == tokens.bos or found[-1][-1] == tokens.eos):
            found.append([])
        found[-1].append(token)
    return found


def plainly(row: list[int], number: int, rate: float, seed: int, size: int, tokens: InfillVocabulary) -> list[int]:
    """The row laid out, document by document."""
    state = words(seed, "infill", np.array([number]))
    out: list[int] = []
    for index, document in enumerate(documents(row, tokens)):
        draws = [int(stream_words(state, 3 * index + which)[0] >> np.uint64(11)) / 2**53 for which in range(3)]
        head = document[: document[0] == tokens.bos]
        body = [token for token in document if token < tokens.ordinary]
        tail = document[len(head) + len(body) :]
        room = size - len(out) - len(head) - 3
        if draws[0] >= rate or not body or room < 1:
            out += document[: size - len(out)]
            continue
        body, tail = body[:room], tail[: max(0, room - len(body))]
        a, b = sorted(int(draw * (len(body) + 1)) for draw in draws[1:])
        out += [*head, tokens.prefix, *body[:a], tokens.suffix, *body[b:], tokens.middle, *body[a:b], *tail]
    return out


def original(row: npt.NDArray[np.integer], vocabulary: InfillVocabulary) -> npt.NDArray[np.integer]:
    """The tokens of a row before its documents were laid out: (W,) to (W − 3 times those,)."""
    out: list[npt.NDArray[np.integer]] = []
    rest = row
    while (begins := np.flatnonzero(rest == vocabulary.prefix)).size:
        begin = int(begins[0])
        second, third = (int(np.flatnonzero(rest == mark)[0]) for mark in (vocabulary.suffix, vocabulary.middle))
        ends = np.flatnonzero(rest[third:] == vocabulary.eos)
        end = third + int(ends[0]) if ends.size else len(rest)
        out += [rest[:begin], rest[begin + 1 : second], rest[third + 1 : end], rest[second + 1 : third]]
        rest = rest[end:]
    return np.concatenate([*out, rest])
