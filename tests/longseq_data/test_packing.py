import numpy as np
import pytest

from longseq_data.ingest.block import BlockDocument
from longseq_data.readers.documents import DocumentEncoder, Extent
from longseq_data.readers.fasta import Encoder, Record
from longseq_data.samples.packing import Piece, Window, crop, cut, document
from longseq_data.vocabulary import BYTES, decode

RECORDS = [Record(s, s, s, "a.fasta", 1) for s in ("ACDEF", "G", "HI", "KLMNPQRSTVWYA")]
STREAM = "".join(f"({s})" for s in ("ACDEF", "G", "HI", "KLMNPQRSTVWYA"))  # ( is BOS, ) is EOS


def text(window) -> str:
    return decode(window.tokens(Encoder(strict=True))).replace("<bos>", "(").replace("<eos>", ")")


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 7, 10, 29, 30, 50])
def test_windows_are_slices_of_the_joined_documents(size, overlap):
    windows = list(cut(map(document, RECORDS), size, overlap))
    step = size - overlap
    assert [text(window) for window in windows] == [
        STREAM[i : i + size] for i in range(0, len(STREAM), step) if len(STREAM) - i > overlap
    ]
    for window in windows:
        assert window.size() == len(text(window))
        assert window.residues() == sum(letter.isalpha() for letter in text(window))


@pytest.mark.parametrize(("where", "expected"), [(0.0, "(ACD"), (0.26, "ACDE"), (0.5, "CDEF"), (0.999, "DEF)")])
def test_a_crop_reaches_from_the_first_token_to_the_last(where, expected):
    assert text(crop(document(RECORDS[0]), 4, where)) == expected


@pytest.mark.parametrize("size", [7, 8])
def test_a_document_that_fits_is_not_cropped(size):
    assert text(crop(document(RECORDS[0]), size, 0.7)) == "(ACDEF)"


@pytest.mark.parametrize("size", [2, 3, 7, 10, 50])
def test_segments_number_the_documents_of_a_window(size):
    for window in cut(map(document, RECORDS), size, 0):
        segments = window.segments().tolist()
        # ( begins a document, and with it the next segment
        expected = [text(window)[1 : i + 1].count("(") for i in range(window.size())]
        assert segments == expected


def of_bytes(data: bytes) -> BlockDocument:
    return BlockDocument(b"a", "a", np.frombuffer(data, np.uint8), len(data), BYTES)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 5, 9, 100])
def test_measures_of_windows_add_up_to_the_documents(size, overlap):
    texts = [b"one two", b"x", b" a  bc \n"]
    encoder = DocumentEncoder(BYTES)
    total = Extent(0, 0)
    for window in cut((document(of_bytes(data)) for data in texts), size, overlap):
        total = total.plus(window.measure(encoder, overlap))
    assert total == Extent(sum(map(len, texts)), sum(len(data.split()) for data in texts))


def test_a_lone_special_token_stands_for_nothing():
    record = of_bytes(b"abc")
    for start, stop in [(0, 1), (4, 5)]:
        for skip in (0, 1):
            assert Window((Piece(record, start, stop),)).measure(DocumentEncoder(BYTES), skip) == Extent(0, 0)
