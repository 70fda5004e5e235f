"""``longseq bench needle``: where its values stand, and that a small model learns them."""

from __future__ import annotations

import gzip

import pytest
import torch

from longseq.benchmarks import needle

REQUEST = needle.NeedleRequest(length=512, gap=400, short=64)
TEXT = torch.arange(3000, dtype=torch.int64).remainder(200).to(torch.uint8)


def test_values_lie_before_the_gap_and_questions_behind_it():
    ids, targets = needle.sequences(REQUEST, TEXT, 512, 50, torch.Generator().manual_seed(0))
    shown = ids - 256
    for row, wanted in zip(shown, targets, strict=True):
        places = ((row >= 0) & (row < REQUEST.keys * REQUEST.values)).nonzero()[:, 0]
        assert len(places) == REQUEST.keys
        assert places.max() < 512 - REQUEST.keys - REQUEST.gap
        values = {int(row[at]) // REQUEST.values: int(row[at]) % REQUEST.values for at in places}
        asked = row[-REQUEST.keys :] - REQUEST.keys * REQUEST.values
        assert sorted(asked.tolist()) == list(range(REQUEST.keys))
        assert [values[key] for key in asked.tolist()] == wanted[-REQUEST.keys :].tolist()
        assert (wanted[: -REQUEST.keys] == -100).all()
    assert (shown[:, -64 : -REQUEST.keys] < 0).all()  # nothing to be found in a short context


def test_lengths_rise_through_the_short_context_to_the_whole():
    assert needle.NeedleRequest().lengths[-3:] == (32_768, 65_536, 131_072)
    assert 4096 in needle.NeedleRequest().lengths
    assert all(a < b for a, b in zip(REQUEST.lengths, REQUEST.lengths[1:], strict=False))


@pytest.mark.long
def test_only_the_long_context_knows():
    text = torch.randint(200, (60_000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    request = needle.NeedleRequest(length=2048, gap=1600, short=256)
    short, long = needle.measure(request, text, print, print)
    assert (short.context, long.context) == (256, 2048)
    assert long.accuracy > 0.9
    assert short.accuracy < 0.2  # one in sixteen by chance


def test_fasta_is_read_without_its_headers(tmp_path):
    path = tmp_path / "a.fasta.gz"
    path.write_bytes(gzip.compress(b">one\nACD\nEF\n>two\nGH\n"))
    assert bytes(needle.read_texts([path]).tolist()) == b"ACDEF\nGH"
    assert len(needle.read_texts([])) > 300_000


def test_too_little_text_is_refused():
    with pytest.raises(Exception, match="too little text: 600 characters"):
        needle.measure(REQUEST, TEXT[:600], print, print)
