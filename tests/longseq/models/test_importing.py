"""Transformers of Hugging Face as longseq models: the same function with exact attention. Random weights of the real
configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longseq.cli import main
from longseq.errors import LongseqError
from longseq.interop.foreign_vocabulary import ForeignVocabulary
from longseq.trained_model import find
from longseq_data.vocabulary import LETTERS, TOKENS

transformers = pytest.importorskip("transformers")

ESM_TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
ESM = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"}
ESM |= {"token_dropout": True, "emb_layer_norm_before": False, "max_position_embeddings": 1026, "layer_norm_eps": 1e-5}
ESM2 = {  # facebook/esm2_t6_8M_UR50D, esm2_t12_35M_UR50D and esm2_t30_150M_UR50D
    "8M": {"num_hidden_layers": 6, "hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 20},
    "35M": {"num_hidden_layers": 12, "hidden_size": 480, "intermediate_size": 1920, "num_attention_heads": 20},
    "150M": {"num_hidden_layers": 30, "hidden_size": 640, "intermediate_size": 2560, "num_attention_heads": 20},
}
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")
PROT_BERT = {"vocab_size": 30, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
PROT_BERT |= {"max_position_embeddings": 40000, "layer_norm_eps": 1e-12, "type_vocab_size": 2}


def saved(model, tokens, folder: Path) -> Path:
    """A Hugging Face folder of the model with weights drawn widely enough that no part of it is idle."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" in name:
            parameter.data += torch.randn_like(parameter) * 0.5
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return folder


def random_model(family: str, folder: Path, **changes) -> tuple[torch.nn.Module, tuple[str, ...], Path]:
    torch.manual_seed(0)
    if family == "bert":
        settings = transformers.BertConfig(**PROT_BERT | changes)
        model, tokens = transformers.BertForMaskedLM(settings).eval(), BERT_TOKENS
    else:
        settings = transformers.EsmConfig(**ESM | ESM2.get(family, {}) | changes)
        model, tokens = transformers.EsmForMaskedLM(settings).eval(), ESM_TOKENS
    return model, tokens, saved(model, tokens, folder / "theirs")


def largest_difference(model, tokens, out: Path) -> float:
    """Between their logits and ours, of two sequences, one of them padded, both with masked residues."""
    their_names = {"<bos>": "[CLS]", "<eos>": "[SEP]", "<pad>": "[PAD]", "<mask>": "[MASK]"}
    if "<cls>" in tokens:
        their_names = {"<bos>": "<cls>"}
    names = [their_names.get(name, name) for name in TOKENS]
    rows = torch.tensor([tokens.index(name) for name in names])
    ours_ids = torch.randint(len(LETTERS), (2, 37))
    ours_ids[:, 0], ours_ids[:, 36], ours_ids[0, 5], ours_ids[0, 9], ours_ids[1, 7] = 25, 26, 28, 28, 28
    ours_ids[1, 24], ours_ids[1, 25:] = 26, 27
    mask = ours_ids != 27
    ours = find(out).load("cpu")
    assert sum(parameter.numel() for parameter in ours.parameters()) == ours.spec.parameter_count
    with torch.no_grad():
        # One at a time: in a batch the ESM of transformers 5.0 counts the padding in its token dropout.
        each = [rows[ids[keep]][None] for ids, keep in zip(ours_ids, mask, strict=True)]
        theirs = torch.cat([model(input_ids=ids).logits[0] for ids in each])
        found = ours(ours_ids, mask)[mask]
    assert theirs.std() > 0.1  # there is something to compare
    return (theirs[:, rows] - found).abs().max().item()


CASES = [
    ("8M", {}),
    ("35M", {}),
    ("8M", {"token_dropout": False, "emb_layer_norm_before": True, "position_embedding_type": "absolute"}),  # ESM-1b's
    ("bert", {"num_hidden_layers": 2, "max_position_embeddings": 1000}),
    pytest.param("150M", {}, marks=pytest.mark.long),
    pytest.param("bert", {"num_hidden_layers": 30}, marks=pytest.mark.long),  # ProtBERT itself, 420 M
]


@pytest.mark.interfaces
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_an_imported_transformer_computes_what_the_original_does(tmp_path, family, changes):
    model, tokens, folder = random_model(family, tmp_path, **changes)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert largest_difference(model, tokens, tmp_path / "ours") < 1e-4


def small(tmp_path: Path, **changes) -> tuple[torch.nn.Module, tuple[str, ...], Path]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return random_model("small", tmp_path, **sizes | changes)


@pytest.mark.interfaces
def test_the_performer_of_imported_weights_comes_close_and_opens_in_transformers(tmp_path):
    import longseq.huggingface  # noqa: F401

    _, _, folder = small(tmp_path)
    out = tmp_path / "ours"
    main(["import", str(folder), str(out)])
    tokens = torch.randint(25, (1, 60))
    with torch.no_grad():
        exact = find(out).load("cpu")(tokens)
        rough, fine = (
            find(out, ("attention.kind=favor", f"attention.features={m}")).load("cpu")(tokens) for m in (4, 4096)
        )
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(out)(tokens).logits
    assert torch.equal(theirs, exact)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("MXKX")["input_ids"], skip_special_tokens=True) == "MXKX"
    assert 0 < (fine - exact).abs().max() < 0.2 * (rough - exact).abs().max()


def test_a_sequence_longer_than_the_learned_positions_is_refused_in_one_sentence(tmp_path):
    _, _, folder = small(tmp_path, position_embedding_type="absolute", max_position_embeddings=12)
    main(["import", str(folder), str(tmp_path / "ours")])
    model = find(tmp_path / "ours").load("cpu")
    assert model(torch.zeros(1, 10, dtype=torch.int64)).shape == (1, 10, 29)  # ESM's count from the padding's id on
    with pytest.raises(LongseqError, match=r"11 tokens or more, but the model has learned 10 positions"):
        model(torch.zeros(1, 11, dtype=torch.int64))


@pytest.mark.interfaces
def test_a_text_model_keeps_its_vocabulary_and_has_special_tokens_of_its_own_behind_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "fox", "##es")
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    folder = saved(transformers.BertForMaskedLM(settings).eval(), words, tmp_path / "theirs")
    (folder / "vocab.txt").unlink()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(words[:5]))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    tokens = torch.tensor([[2, 5, 6, 4, 8, 3]])
    ours = tokens.clone()
    source = find(tmp_path / "ours")
    v = source.vocabulary
    ours[0, 0], ours[0, 3], ours[0, 5] = v.bos, v.mask, v.eos
    with torch.no_grad():
        assert (source.load("cpu")(ours)[..., :9] - model(tokens).logits).abs().max() < 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs("the quick foxes")["input_ids"] == [v.bos, 5, 6, 7, 8, v.eos]


def test_what_cannot_be_imported_is_said_in_one_sentence(tmp_path, capsys):
    _, _, folder = small(tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def refusal(**changes) -> str:
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert main(["import", str(folder), str(tmp_path / "ours")]) == 1
        (folder / "config.json").write_text(json.dumps(config))
        return capsys.readouterr().err

    assert "a model of type llama; longseq imports esm and bert" in refusal(model_type="llama")
    assert "hidden_act=relu" in refusal(hidden_act="relu")
    assert "has no weight esm.encoder.layer.2" in refusal(num_hidden_layers=3)
    assert "would be left out" in refusal(num_hidden_layers=1)
    assert "config.json wants" in refusal(intermediate_size=48)
    assert "num_hidden_layers=two in config.json" in refusal(num_hidden_layers="two")
    (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS[:10]))
    assert "no token for MASK" in refusal()
    (folder / "vocab.txt").write_text("\n".join([*ESM_TOKENS[:10], "<mask>"]))
    assert "not one of amino acids" in refusal()
    (folder / "vocab.txt").unlink()
    assert "neither vocab.txt nor tokenizer.json" in refusal()
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "no safetensors file, or damaged" in refusal()
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "ours")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", b"hello"),
        ("pytorch_model.bin", [torch.zeros(2)]),
        ("pytorch_model.bin", {"model": {"a": torch.zeros(2)}}),
        ("pytorch_model.bin", {"a": Path("/")}),  # would have code run
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": ["a"]}'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {"A": -1}}}'),
    ],
)
def test_damaged_files_of_another_model_are_said_in_one_sentence(tmp_path, capsys, name, content):
    _, _, folder = small(tmp_path)
    (folder / ("vocab.txt" if name == "tokenizer.json" else "model.safetensors")).unlink()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 1
    said = capsys.readouterr().err
    assert f"{name}: " in said
    assert "damaged" in said
    assert not (tmp_path / "ours").exists()


def test_a_vocabularys_lines_are_counted_though_one_is_white_space(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", " ", "\u2028", "[CLS]", "[SEP]", "[MASK]", *LETTERS, ""]))
    assert ForeignVocabulary.read(tmp_path, {}).rows == (*range(6, 6 + len(LETTERS)), 3, 4, 0, 5)
