"""The vocabulary of a Hugging Face folder, as tokens that longseq's data are read as. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longseq.errors import LongseqError, RunError
from longseq_data.os_errors import explained
from longseq_data.tokenization import tokenizer_vocabulary
from longseq_data.vocabulary import LETTERS, PROTEIN, Vocabulary

_ROLES = ("bos", "eos", "pad", "mask")
# What the families call the tokens before, after and next to a sequence.
_NAMES = {
    "bos": ("<cls>", "[CLS]", "<s>", "<bos>"),
    "eos": ("<eos>", "[SEP]", "</s>"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
}


@dataclass(frozen=True)
class ForeignVocabulary:
    """Which of their rows each of our tokens is.

    A vocabulary of amino acids becomes our own one, so that everything that reads proteins reads them for this model
    too: prepared corpora, mutations, masks. Tokens that stand for no residue (<unk>, gaps) are left out. Any other
    vocabulary stays as it is, with ids for BOS, EOS, PAD and MASK behind it where a text could hold its own ones.
    """

    vocabulary: Vocabulary
    rows: tuple[int, ...]  # of their embedding, one for each of our ids
    tokenizer: Path | None  # the tokenizers file, where it is not our protein vocabulary

    @property
    def size(self) -> int:
        return self.vocabulary.size

    @property
    def tokens(self) -> str:
        """The value of data.tokenizer."""
        return self.vocabulary.name

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> ForeignVocabulary:
        """Of a Hugging Face folder.

        Raises:
            LongseqError: if it has no vocabulary that can be used.
        """
        ids = _ids(folder, config)
        special = {role: _first(ids, names, folder, role) for role, names in _NAMES.items()}
        if all(letter in ids for letter in LETTERS):
            residues = [ids[letter] for letter in LETTERS]
            return cls(PROTEIN, (*residues, *(special[role] for role in _ROLES)), None)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise LongseqError(
                f"{folder}: its vocabulary is not one of amino acids ({LETTERS}), and it has no tokenizer.json, which "
                "says how text becomes tokens."
            )
        vocabulary = tokenizer_vocabulary(str(path.absolute()))
        rows = list(range(vocabulary.size))
        for role, row in special.items():
            rows[getattr(vocabulary, role)] = row
        return cls(vocabulary, tuple(rows), path)


def _ids(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Token to id, of vocab.txt or tokenizer.json, or of the configuration (ESM keeps it there at times)."""
    for name, read in (("vocab.txt", _lines), ("tokenizer.json", _tokenizer)):
        path = folder / name
        if path.is_file():
            try:
                ids = read(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise RunError(f"{explained(error, path, 'cannot be read')}.") from None
            except (ValueError, LookupError, TypeError, AttributeError):
                ids = {}
            if not ids or not all(isinstance(id_, int) and id_ >= 0 for id_ in ids.values()):
                raise RunError(f"{path}: no vocabulary, or damaged: copy it again.")
            return ids
    listed = config.get("vocab_list")
    if isinstance(listed, list):
        return {str(name): id_ for id_, name in enumerate(listed)}
    raise RunError(f"{folder}: has neither vocab.txt nor tokenizer.json, so nothing says what its tokens are.")


def _lines(text: str) -> dict[str, int]:
    """A token a line; one of them may be white space."""
    return {name.strip(): id_ for id_, name in enumerate(text.split("\n"))}


def _tokenizer(text: str) -> dict[str, int]:
    content = json.loads(text)
    ids = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**(ids if isinstance(ids, dict) else {name: id_ for id_, (name, _) in enumerate(ids)}), **added}


def _first(ids: dict[str, int], names: tuple[str, ...], folder: Path, role: str) -> int:
    for name in names:
        if name in ids:
            return ids[name]
    raise LongseqError(f"{folder}: its vocabulary has no token for {role.upper()} ({' or '.join(names)}).")
