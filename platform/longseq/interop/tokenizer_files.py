"""The vocabularies as Hugging Face tokenizer files: the same ids for the same text as training read. No torch here."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longseq_data.tokenization import INFILL_NAMES, SPECIAL_NAMES
from longseq_data.vocabulary import ALPHABETS, UNKNOWN, Alphabet, InfillVocabulary, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def write_tokenizer(folder: Path, vocabulary: Vocabulary, *, first: int, causal: bool) -> bool:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, as ``AutoTokenizer`` reads them.

    Args:
        first: the token that begins a sequence: BOS, or EOS where training joined records with it.
        causal: a prompt is left open; otherwise EOS ends a sequence.

    Returns:
        False where there is no text to make tokens of (pixels), and nothing was written.
    """
    if vocabulary.name == "pixels":
        return False
    if vocabulary.name in ALPHABETS:
        tokenizer = _letters(ALPHABETS[vocabulary.name])
    else:
        tokenizer = _bytes() if vocabulary.name == "bytes" else _file(vocabulary)
    for mark_names in INFILL_NAMES if isinstance(vocabulary, InfillVocabulary) else ():
        _add(tokenizer, *mark_names)
    names = {role: str(tokenizer.id_to_token(getattr(vocabulary, role))) for role in SPECIAL_NAMES}
    _frame(tokenizer, names, vocabulary, first, causal)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{role}_token": name for role, name in names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left" if causal else "right",  # generation goes on from the end
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return True


def _letters(alphabet: Alphabet) -> Tokenizer:
    """A letter per token; lower case reads as upper case, a final * and white space as nothing, others as X or N.

    Letters that stand for another one, as U for T in DNA, read as that.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({name: id_ for id_, name in enumerate(alphabet.tokens)}, unk_token=alphabet.other)
    )
    tokenizer.add_special_tokens(list(alphabet.tokens[len(alphabet.letters) :]))
    read = {letter: alphabet.table[ord(letter)] for letter in string.ascii_letters}
    upper = [
        normalizers.Replace(letter, alphabet.letters[id_])
        for letter, id_ in read.items()
        if id_ != UNKNOWN and letter != alphabet.letters[id_]
    ]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s|\*\s*$"), ""), *upper])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> Tokenizer:
    """A byte per token, of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(_byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([names[0] for names in SPECIAL_NAMES.values()])  # 256 to 259, in this order
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that stands for each byte in ByteLevel: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _file(vocabulary: Vocabulary) -> Tokenizer:
    """The run's own tokenizer, with the special tokens that the vocabulary has behind it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(vocabulary.name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    roles = sorted(SPECIAL_NAMES, key=lambda role: getattr(vocabulary, role))
    for role in roles:
        if tokenizer.id_to_token(getattr(vocabulary, role)) is None:
            _add(tokenizer, *SPECIAL_NAMES[role], f"<longseq-{role}>")
    return tokenizer


def _add(tokenizer: Tokenizer, *names: str) -> None:
    """A special token behind all others, by the first of the names that is free."""
    from tokenizers import AddedToken

    name = next(name for name in names if tokenizer.token_to_id(name) is None)
    tokenizer.add_special_tokens([AddedToken(name, special=True)])


def _frame(tokenizer: Tokenizer, names: dict[str, str], vocabulary: Vocabulary, first: int, causal: bool) -> None:
    from tokenizers import processors

    opening = names["eos"] if first == vocabulary.eos else names["bos"]
    single = f"{opening}:0 $A:0" if causal else f"{opening}:0 $A:0 {names['eos']}:0"
    used = dict.fromkeys([opening] if causal else [opening, names["eos"]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in used]
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
