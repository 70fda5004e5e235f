"""What to call tokens in reports, and text from tokens."""

from __future__ import annotations

from collections.abc import Iterable

from longseq_data.vocabulary import ALPHABETS, INFILL_MARKS, InfillVocabulary, Vocabulary


def token_names(vocabulary: Vocabulary) -> list[str]:
    """A name for each id: residues and bases are letters, bytes characters, specials <bos>, <eos>, ..."""
    if vocabulary.name in ALPHABETS:
        names = list(ALPHABETS[vocabulary.name].tokens)
    elif vocabulary.name == "bytes":
        names = [repr(chr(byte))[1:-1] if byte < 128 else f"0x{byte:02x}" for byte in range(256)]
    elif vocabulary.name == "pixels":
        names = [str(value) for value in range(256)]
    else:
        from longseq_data.tokenization import load_tokenizer

        known = {id_: name for name, id_ in load_tokenizer(vocabulary.name).get_vocab(with_added_tokens=True).items()}
        names = [known.get(id_, f"<{id_}>") for id_ in range(vocabulary.size)]
    names += [""] * (vocabulary.size - len(names))
    for role in ("bos", "eos", "pad", "mask"):
        names[getattr(vocabulary, role)] = f"<{role}>"
    if isinstance(vocabulary, InfillVocabulary):
        names[vocabulary.prefix :] = INFILL_MARKS
    return names


def plain_text(tokens: Iterable[int], vocabulary: Vocabulary) -> str:
    """The text that ordinary tokens stand for; bytes that are no UTF-8 read U+FFFD."""
    ids = list(tokens)
    if vocabulary.name in ALPHABETS:
        return ALPHABETS[vocabulary.name].decode(ids)
    if vocabulary.name == "bytes":
        return bytes(ids).decode(errors="replace")
    from longseq_data.tokenization import load_tokenizer

    return load_tokenizer(vocabulary.name).decode(ids)
