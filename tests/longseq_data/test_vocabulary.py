import subprocess
import sys

import numpy as np
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


@pytest.mark.parametrize("vocabulary", [v.PROTEIN, v.BYTES, v.PIXELS], ids=lambda vocabulary: vocabulary.name)
def test_special_tokens_stand_above_the_ordinary_ones(vocabulary):
    special = [vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.mask]
    assert special == list(range(vocabulary.ordinary, vocabulary.size))
    assert vocabulary.replacements <= vocabulary.ordinary


def test_the_protein_vocabulary_is_that_of_the_constants():
    assert v.Vocabulary("protein", 29, v.BOS, v.EOS, v.PAD, v.MASK, v.RESIDUES, v.STANDARD) == v.PROTEIN
    assert (v.PROTEIN.dtype, v.PROTEIN.target_dtype) == (np.uint8, np.int16)


@pytest.mark.parametrize(
    ("size", "dtype", "targets"),
    [
        (256, np.uint8, np.int16),
        (257, np.uint16, np.int16),
        (32_768, np.uint16, np.int16),
        (32_769, np.uint16, np.int32),
        (65_536, np.uint16, np.int32),
        (65_537, np.uint32, np.int32),
    ],
)
def test_tokens_take_the_smallest_type_that_holds_them(size, dtype, targets):
    vocabulary = v.Vocabulary("a", size, size - 4, size - 3, size - 2, size - 1, size - 4, size - 4)
    assert (vocabulary.dtype, vocabulary.target_dtype) == (dtype, targets)
    assert np.iinfo(vocabulary.dtype).max >= size - 1
    assert np.iinfo(vocabulary.target_dtype).max >= size - 1


def test_reading_fasta_imports_neither_torch_nor_other_heavy_packages():
    code = (
        "import sys, longseq_data.vocabulary, longseq_data.tokenization, longseq_data.errors;"
        "from longseq_data.ingest import survey; from longseq_data.readers import fasta, images, tables, text;"
        "import longseq_data.samples.streaming;"
        "heavy = {'torch', 'lightning', 'Bio', 'fsspec', 'aiohttp', 'datasets', 'pyarrow', 'tokenizers', 'PIL'};"
        "print(heavy & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_batches_need_no_lightning():
    code = "import sys, longseq_data.samples.batches; print({'lightning', 'datasets', 'tokenizers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
