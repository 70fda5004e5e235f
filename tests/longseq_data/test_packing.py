import pytest

from longseq_data.fasta import Encoder, Record
from longseq_data.packing import crop, cut, document
from longseq_data.vocabulary import decode

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
