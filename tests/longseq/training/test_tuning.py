"""Learning labels: what learns, from what scale, and when it ends."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from longseq.errors import ConfigError, LongseqError
from longseq.evaluation.finetune import configured
from longseq.models.spec import PerformerSpec
from longseq.models.tuned import Learning, Readout, TunedModel
from longseq.models.weights import load_body
from longseq.runs.run import Run
from longseq.trained_model import find
from longseq.training.callbacks.patience import validations_since_best
from longseq.training.tuning import LabelLearning
from longseq_data.vocabulary import IGNORE

ALONE = ("trainer.strategy=single", "trainer.accelerator=cpu")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.last_good().weights_path)


@pytest.mark.parametrize("learn", ["head", "lora", "all"])
def test_what_learns_changes_and_the_rest_stays_to_the_last_bit(tuned, base, learn):
    run = tuned("share", learn)
    before = {name.removeprefix("model."): tensor for name, tensor in load_file(base.weights).items()}
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in weights(run).items()}
    body = [name for name in before if not name.startswith("head.")]
    same = [name for name in body if torch.equal(before[name], after[name])]
    learned = sorted({name.rpartition(".lora_")[0] for name in after if ".lora_B" in name})
    assert after["head.linear.weight"].abs().max() > 0
    if learn == "all":
        assert len(same) < len(body) / 4
    else:
        assert same == body
    maps = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    wanted = [f"blocks.{block}.{name}" for block in range(2) for name in maps]
    assert learned == (sorted(wanted) if learn == "lora" else [])
    assert all(after[name].abs().max() > 0 for name in after if ".lora_B" in name)


@pytest.mark.parametrize(("label", "least"), [("share", 0.8), ("kind", 0.5), ("states", 0.9)])
def test_what_follows_from_the_letters_is_learned_by_the_head(tuned, label, least):
    from longseq.evaluation.evaluate import evaluate
    from longseq.evaluation.request import Settings

    run = tuned(label, "head", "optim.lr=0.03", "data.valid_fraction=0.3", "finetune.patience=0", steps=60)
    (found,) = evaluate(run.path, Settings(splits=("valid",), bootstrap=30))
    values = found.splits["valid"]
    measure = "r2" if label == "share" else "mcc"
    assert values[measure] > least
    low, high = values["intervals"][measure]
    assert low <= values[measure] <= high
    assert low < high or low == values[measure] == 1
    assert values["labels"] == (values["sequences"] if label != "states" else sum(map(len, sequences(run))))


def sequences(run: Run) -> list:
    from longseq.label_data import labelled

    rows = labelled(run.config(), "valid").rows
    return [rows.sequences[row] for row in rows.of("valid")]


def test_training_ends_when_the_validation_loss_falls_no_more(tuned):
    """With a rate of nearly nothing, the loss of every validation is that of the first."""
    run = tuned("share", "head", "optim.lr=0", "trainer.valid_every=2", "finetune.patience=3", steps=40)
    assert (run.path / "FINISHED").read_text() == "8\n"  # the first of four
    assert run.last_good().position.step == 8
    assert find(run.path).step == 2  # the oldest of the lowest loss


@pytest.mark.parametrize(
    ("losses", "since"), [([3.0], 0), ([3.0, 2.0], 0), ([2.0, 3.0, 2.0], 2), ([math.nan, 4.0], 0), ([1, 2, 3, 0.5], 0)]
)
def test_validations_are_counted_from_the_first_of_the_lowest_loss(losses, since):
    assert validations_since_best(losses) == since


def model(learn: str = "head", residues: bool = False, outputs: int = 3) -> TunedModel:
    torch.manual_seed(0)
    spec = PerformerSpec(vocabulary=29, dim=16, depth=2, heads=2, ffn_dim=24, causal=False, features=32)
    made = TunedModel(spec, Learning(outputs, residues, learn))
    with torch.no_grad():
        made.head.linear.weight.normal_()
        made.head.linear.bias.normal_()
    return made.eval()


def tokens(*lengths: int) -> torch.Tensor:
    torch.manual_seed(1)
    rows = torch.full((len(lengths), max(lengths) + 2), 27)
    for row, length in zip(rows, lengths, strict=True):
        row[: length + 2] = torch.cat([torch.tensor([25]), torch.randint(20, (length,)), torch.tensor([26])])
    return rows


@pytest.mark.parametrize("residues", [False, True])
def test_a_sequence_says_the_same_in_whatever_batch(residues):
    rows = tokens(5, 11, 3)
    whole = model(residues=residues)(rows, rows != 27)
    for number, length in enumerate((5, 11, 3)):
        alone = model(residues=residues)(rows[number : number + 1, : length + 2])
        together = whole[number : number + 1, : length + 2] if residues else whole[number : number + 1]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_head_reads_the_scaled_mean_over_the_residues():
    made, rows = model(), tokens(5, 11)
    made.head.scale(torch.randn(50, 16))
    center, deviation = (bits.view(torch.float32) for bits in (made.head.center, made.head.deviation))
    hidden = made.hidden(rows, rows != 27)
    for number, length in enumerate((5, 11)):
        mean = hidden[number, 1 : 1 + length].double().mean(0)
        wanted = F.linear((mean - center) / deviation, made.head.linear.weight.double(), made.head.linear.bias.double())
        torch.testing.assert_close(made(rows, rows != 27)[number].double(), wanted, atol=1e-5, rtol=1e-5)


def test_features_are_scaled_to_mean_0_and_deviation_1_and_constant_ones_stay_finite():
    head, features = Readout(4, 1, residues=True), torch.randn(100, 4) * torch.tensor([1.0, 30.0, 0.01, 0.0]) + 5
    head.scale(features)
    center, deviation = (bits.view(torch.float32) for bits in (head.center, head.deviation))
    scaled = (features - center) / deviation
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    half = head.bfloat16()  # as DeepSpeed does it
    assert torch.equal(half.center.view(torch.float32), center)


@pytest.mark.parametrize("label", ["share", "kind", "states"])
def test_the_loss_is_that_of_the_formula(base, table, label):
    config = configured(base, {"table": table, "label": label, "learn": "all", "task": "auto"}, ALONE, batch=4)
    task = LabelLearning(config)
    torch.nn.init.normal_(task.model.head.linear.weight)
    wanted = torch.tensor([0, 2, IGNORE, 1, 1, IGNORE, 0, 1])
    rows = tokens(6, 6)
    batch = {"tokens": rows, "targets": wanted.view(2, 4)[:, :1]}
    if label == "states":
        batch["targets"] = F.pad(wanted.view(2, 4), (1, 3), value=IGNORE)
    elif label == "share":
        batch["targets"] = torch.tensor([[0.5], [math.nan]]).view(torch.int32).long()
        batch["targets"][1] = IGNORE
    loss = task._score(batch, task.train_sums)
    made = task.model(rows).double()
    if label == "share":
        torch.testing.assert_close(loss.double(), (made[0, 0] - 0.5) ** 2)
    else:
        targets = batch["targets"].flatten()
        picked = (made if label == "states" else made[:, None]).flatten(0, 1)
        log = picked.log_softmax(-1)
        wanted_loss = -sum(log[place, target] for place, target in enumerate(targets.tolist()) if target >= 0)
        torch.testing.assert_close(loss.double(), wanted_loss, atol=1e-5, rtol=1e-5)
        right = sum(int(row.argmax()) == target for row, target in zip(picked, targets.tolist(), strict=True))
        assert task.train_sums.total[1] == right
    assert task.train_sums.total[2] == int((batch["targets"] != IGNORE).sum())
    assert task.train_sums.total[3] == 16


def test_the_weights_of_another_model_are_refused(base):
    with pytest.raises(LongseqError, match=r"blocks\.0\.attention\.out\.weight is \(32, 32\), the configured model"):
        load_body(model(), base.weights)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.context_parallel=2", "a label is that of a whole sequence"),
        ("optim.name=muon", "finetune.learn=head freezes"),
        ("trainer.probe_every=5", "trainer.probe_every=5 is about tokens"),
        ("data.train=proteins.fasta", "a run learns labels or tokens"),
    ],
)
def test_settings_that_are_not_about_labels_are_refused(base, table, override, sentence):
    more = ("trainer.devices=2", "trainer.strategy=ddp") if "context" in override else ALONE
    with pytest.raises(ConfigError, match=sentence):
        configured(base, {"table": table, "label": "share", "learn": "head", "task": "auto"}, [*more, override])
