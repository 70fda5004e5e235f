import subprocess
import sys

import pytest

from longseq_data import vocabulary as v


def ids(letters: str) -> list[int]:
    return list(letters.encode("latin-1").translate(v.TABLE))


def test_the_29_ids_are_the_published_ones():
    assert ids("ACDEFGHIKLMNPQRSTVWYBOUXZ") == list(range(25))
    assert (v.STANDARD, v.RESIDUES, v.X, v.BOS, v.EOS, v.PAD, v.MASK, v.VOCABULARY_SIZE) == (
        20,
        25,
        23,
        25,
        26,
        27,
        28,
        29,
    )
    assert len(v.TOKENS) == v.VOCABULARY_SIZE


def test_lower_case_is_the_same_residue():
    assert ids("mkvlazboux") == ids("MKVLAZBOUX")


@pytest.mark.parametrize("character", ["J", "j", "*", "-", ".", "1", " ", "\n", "\0", "\x80", "\xff"])
def test_characters_outside_the_alphabet_are_unknown_and_keep_their_place(character: str):
    assert ids(f"A{character}C") == [0, v.UNKNOWN, 1]


def test_decode_inverts_encode_and_names_special_tokens():
    assert v.decode([v.BOS, *ids("MKXZ"), v.EOS, v.PAD, v.MASK]) == "<bos>MKXZ<eos><pad><mask>"


def test_reading_fasta_imports_neither_torch_nor_other_heavy_packages():
    code = (
        "import sys, longseq_data.fasta, longseq_data.vocabulary, longseq_data.errors, longseq_data.streaming;"
        "print({'torch', 'lightning', 'Bio', 'fsspec', 'aiohttp'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
