import subprocess
import sys

import pytest

from longseq_data import vocabulary as v


def test_the_29_ids_are_the_published_ones():
    assert [v.encode(letter)[0] for letter in "ACDEFGHIKLMNPQRSTVWYBOUXZ"] == list(range(25))
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
    assert v.encode("mkvlazboux").tolist() == v.encode("MKVLAZBOUX").tolist()


@pytest.mark.parametrize("character", ["J", "j", "*", "-", ".", "1", " ", "\n", "\0", "é", "蛋"])
def test_characters_outside_the_alphabet_are_unknown_and_keep_their_place(character: str):
    assert v.encode(f"A{character}C").tolist() == [0, v.UNKNOWN, 1]


def test_decode_inverts_encode_and_names_special_tokens():
    assert v.decode([v.BOS, *v.encode("MKXZ"), v.EOS, v.PAD, v.MASK]) == "<bos>MKXZ<eos><pad><mask>"
    assert v.encode("").tolist() == []


def test_reading_fasta_imports_neither_torch_nor_other_heavy_packages():
    code = (
        "import sys, longseq_data.fasta, longseq_data.vocabulary, longseq_data.errors, longseq_data.streaming;"
        "print({'torch', 'lightning', 'Bio', 'fsspec', 'aiohttp'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
