"""``longseq figures``: the numbers behind the pictures, and that every picture is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from longseq.evaluation.figures import blosum62, embedding_cosines, pair_correlation
from longseq.measure.attention_probe import errors, probe
from longseq.trained_model import find
from longseq_data.vocabulary import LETTERS

pytest.importorskip("matplotlib")


def test_similarities_are_of_the_residues_in_the_order_of_their_ids(trained):
    model = find(trained()).load()
    scores = blosum62()
    assert scores[LETTERS.index("W"), LETTERS.index("W")] == 11
    assert scores[LETTERS.index("F"), LETTERS.index("Y")] == 3
    assert np.array_equal(scores, scores.T)
    with torch.no_grad():
        model.embedding.weight[:20] = torch.linalg.qr(torch.randn(32, 32))[0][:20] * 3 + 5
    cosine = embedding_cosines(model)
    np.testing.assert_allclose(np.diag(cosine), 1)
    off = cosine[~np.eye(20, dtype=bool)]
    np.testing.assert_allclose(off, -1 / 19, atol=0.01)  # orthogonal vectors less their mean: a simplex
    assert pair_correlation(scores, 2 * scores + 1) == pytest.approx(1)


def test_more_features_err_less_and_the_models_own_error_is_among_them(trained):
    model = find(trained("one", "attention.kernel=softmax")).load()
    batch = {"tokens": torch.randint(20, (1, 50), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        before = model(batch["tokens"])
    found = errors(model, batch, [8, 32, 2048], 3)
    for layer, probed in zip(found, probe(model, batch), strict=True):
        assert layer[1][0] == pytest.approx(probed.error, rel=1e-5)
        assert np.mean(layer[2]) < np.mean(layer[0])
    with torch.no_grad():
        assert torch.equal(model(batch["tokens"]), before)


@pytest.mark.interfaces
def test_every_picture_is_a_file_and_a_tensorboard_image(trained, longseq, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained("one", "trainer.valid_every=0")
    longseq("evaluate", run, "--bootstrap", 0)
    for number, content in enumerate(("{", '{"weights": "last", "splits": []}', "[1]")):  # somebody's own files
        (run / "evaluations" / f"step-00000020-{number}.json").write_text(content)
    for _ in range(2):  # the second time in the place of the first
        shown = longseq("figures", run).split()
    names = {"accuracy_by_length", "embedding_similarity", "attention_layer00", "attention_layer01"}
    names |= {"approximation_error"}
    assert {path.stem for path in (run / "figures").iterdir()} == names
    assert sorted(shown) == sorted(str(path) for path in (run / "figures").iterdir())
    for path in (run / "figures").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    events = EventAccumulator(str(run / "tensorboard" / "figures"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in names}
    assert [image.step for image in events.Images("figures/embedding_similarity")] == [20]


def test_a_run_without_a_test_split_has_the_other_pictures(trained, longseq):
    layers = "attention.layers=[exact, favor]"  # errors are of the second alone
    run = trained("one", "data.test=[]", "data.test_fraction=0", "trainer.valid_every=0", layers)
    shown = longseq("figures", run).split()
    names = {"embedding_similarity", "attention_layer00", "attention_layer01", "approximation_error"}
    assert {path.rpartition("/")[2] for path in shown} == {f"{name}.png" for name in names}


def test_without_matplotlib_the_extra_is_named(trained, refused, monkeypatch):
    from longseq.commands import figures

    run = trained()
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert "pip install 'longseq[figures]'" in refused("figures", run)
