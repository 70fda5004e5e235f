"""Sequences longer than what a model reads at a time: tiles against one pass in float64, and memory that stays."""

from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import longseq as api
from longseq.errors import LongseqError
from longseq.evaluation import hidden_tiles
from longseq.evaluation.generation import Settings, draw
from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.hidden_vectors import vectors
from longseq.evaluation.likelihood import _Masked, causal, effects, pseudo
from longseq.evaluation.records import Record
from longseq.evaluation.request import samples_of
from longseq.evaluation.split_scores import score
from longseq.evaluation.variants import Variant
from longseq.evaluation.vector_options import Wanted
from longseq.measure.peaks import PeakMeter
from longseq.models import tile_by_tile
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.trained_model import find
from longseq_data.vocabulary import BOS, EOS, MASK, PROTEIN
from mixing import MODERN, mix

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = PerformerSpec(vocabulary=29, dim=24, depth=3, heads=3, ffn_dim=20, causal=True, features=16, sequence_tile=700)
LENGTH = 4500  # more than a batch of short records
ROW = np.array([BOS, *np.random.default_rng(1).integers(0, 20, LENGTH), EOS], dtype=np.uint8)
WIDE = ROW.astype(np.int64)  # to index by

carried = [
    {},
    {"kernel": "relu"},
    {"forget_gate": True, "window": 9},
    {"window": 9, "learned_share": True, "learned_decay": True, **MODERN},
]
summed = [{"causal": False}, {"causal": False, "kernel": "relu", "value_residual": True, "qk_norm": True}]
summed += [{"causal": False, **MODERN}]
on_both_sides = [
    {"causal": False, "window": 9, "learned_share": True, "learned_decay": True, **MODERN},
    {"causal": False, "forget_gate": True, "mask_scaling": True},
]
in_one_piece = [{"kind": "exact"}, {"causal": False, "kind": "exact", "learned_decay": True}]


def build(**options: object) -> PerformerLM:
    torch.manual_seed(1)
    model = PerformerLM(replace(SPEC, **options)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(10)
            block.attention.out.weight.mul_(10)
    return mix(model)


def reference(tokens, **options) -> torch.Tensor:
    """Log-probabilities (L, V) of one pass in float64."""
    model = build(**options, sequence_tile=0).double()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None])[0].log_softmax(-1)


def named(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "softmax"


@pytest.mark.parametrize("options", carried + summed + on_both_sides + in_one_piece, ids=named)
@pytest.mark.parametrize("layer", [0, 2, None])
def test_tiles_give_what_one_pass_gives(options, layer):
    model, whole = build(**options), build(**options, sequence_tile=0).double()
    with torch.inference_mode():
        wanted = whole.hidden(torch.from_numpy(ROW.astype(np.int64))[None], layer=layer)
        tiles = list(hidden_in_tiles(model, ROW, layer=layer))
    assert (len(tiles) > 6) == (options not in in_one_piece or layer == 0)
    assert [start for start, _ in tiles] == [700 * number for number in range(len(tiles))]
    torch.testing.assert_close(torch.cat([x for _, x in tiles], 1).double(), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("window", [0, 9])
def test_a_gate_that_is_no_number_stays_none_in_tiles(window):
    """The weights of the gates say NaN; in tiles of 8 as in one piece nothing finite comes of it."""
    for tile in (0, 8):
        model = build(causal=False, forget_gate=True, window=window, sequence_tile=tile)
        with torch.inference_mode():
            for block in model.blocks:
                block.attention.gate.bias[0] = torch.nan
            found = torch.cat([x for _, x in hidden_in_tiles(model, ROW[:60])], 1)
        assert found.isnan().any(-1).all(), tile


@pytest.mark.parametrize("options", carried, ids=named)
def test_a_long_log_likelihood_is_that_of_one_pass(options):
    (found,) = causal(build(**options), PROTEIN, [ROW])
    wanted = reference(ROW[:-1], **options)[np.arange(LENGTH + 1), WIDE[1:]].sum()
    assert found == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("options", summed + on_both_sides, ids=named)
def test_long_masked_scores_are_those_of_one_pass(options):
    """The pseudo-log-likelihood in three passes, and the effects of variants, whose sites lie in several tiles."""
    model, total = build(**options), 0.0
    for turn in range(3):
        places = np.arange(1 + turn, LENGTH + 1, 3)
        hidden = ROW.copy()
        hidden[places] = MASK
        total += float(reference(hidden, **options)[places, WIDE[places]].sum())
    assert pseudo(model, PROTEIN, ROW, 3) == pytest.approx(total, rel=1e-6)

    sites = [(10, 4400), (10, 4400), (2000,)]
    variants = [
        Variant(str(number), tuple((at, int(ROW[at]), int(ROW[at] + 1 + number) % 20) for at in each))
        for number, each in enumerate(sites)
    ]
    for variant, effect in effects(model, PROTEIN, Record("wild", ROW), variants, is_causal=False):
        hidden = ROW.copy()
        hidden[[at for at, _, _ in variant.changes]] = MASK
        log_p = reference(hidden, **options)
        wanted = sum(float(log_p[at, new] - log_p[at, old]) for at, old, new in variant.changes)
        assert effect == pytest.approx(wanted, abs=2e-4)


def test_a_row_hidden_part_by_part_is_one_hidden_at_once():
    for length, passes in ((3, 1), (9, 2), (9, 4), (20, 7), (20, 18)):
        for turn in range(min(passes, length - 2)):
            hidden, parts = ROW[:length].copy(), _Masked(ROW[:length], turn, passes, MASK)
            hidden[1 + turn : -1 : passes] = MASK
            for start, stop in itertools.combinations(range(length + 2), 2):
                assert np.array_equal(parts[start:stop], hidden[start:stop])


def test_effects_in_a_long_protein_are_differences_of_its_log_likelihoods():
    model, variant = build(), Variant("one", ((4300, int(ROW[4300]), int(ROW[4300] + 1) % 20),))
    ((_, effect),) = effects(model, PROTEIN, Record("wild", ROW), [variant], is_causal=True)
    wild, mutant = (causal(model, PROTEIN, [row])[0] for row in (ROW, variant.applied(ROW)))
    assert effect == mutant - wild
    assert effect != 0


@pytest.mark.parametrize("options", [carried[2], summed[1]], ids=named)
def test_the_mean_vector_of_a_long_record_needs_none_of_its_residues(options):
    model, short = build(**options), Record("short", ROW[-30:])
    found = list(vectors(model, PROTEIN, [Record("long", ROW), short], Wanted()))
    means = list(vectors(model, PROTEIN, [Record("long", ROW), short], Wanted(per_residue=False)))
    whole = build(**options, sequence_tile=0).double()
    with torch.inference_mode():
        wanted = whole.hidden(torch.from_numpy(ROW.astype(np.int64))[None])[0, 1:-1].numpy()
    np.testing.assert_allclose(found[0].residues, wanted, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found[0].mean, wanted.mean(0), rtol=1e-5, atol=1e-5)
    for one, other in zip(found, means, strict=True):
        assert np.array_equal(one.mean, other.mean)
        assert (one.identifier, one.length, other.residues) == (other.identifier, other.length, None)


@pytest.mark.parametrize("options", [*carried, {"window": 9, "features": 0}], ids=named)
def test_draws_behind_a_long_prompt_are_those_behind_one_read_at_once(options):
    """4,201 tokens are seven tiles, the last of one token, less than a window."""
    prompt, settings = ROW[1:4201].tolist(), Settings(length=12, seed=3)
    (found,), (wanted,) = (
        list(draw(build(**options, **tile), PROTEIN, BOS, prompt, 1, settings)) for tile in ({}, {"sequence_tile": 0})
    )
    assert found.tokens == wanted.tokens
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-6)


@pytest.mark.parametrize("packed", [(), ("data.packing=concat", "data.reset=true")], ids=["through", "reset"])
def test_an_evaluation_of_long_windows_counts_what_one_pass_counts(trained, folder, packed):
    letters = "".join(random.Random(3).choices("ACDEFGHIKLMNPQRSTVWY", k=3 * LENGTH))
    (folder / "long.fasta").write_text("".join(f">r{i}\n{letters[i::3]}\n" for i in range(3)))
    run = trained("one", "data.test=long.fasta", "data.length=6000", "data.batch_tokens=6000", *packed)
    whole, tiles = (
        score(source.load(), samples_of(source, "test"), batch_sequences=1)
        for source in (find(run, [f"model.sequence_tile={tile}"]) for tile in (0, 512))
    )
    assert whole.tokens.max() > 512
    for name in ("number", "tokens", "targets", "correct", "near", "wanted", "predicted", "hits", "extent"):
        assert np.array_equal(getattr(tiles, name), getattr(whole, name)), name
    np.testing.assert_allclose(tiles.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(tiles.confidence, whole.confidence, rtol=1e-4)


def test_an_evaluation_of_whole_records_needs_no_other_key_than_their_length(trained, longseq, folder):
    """Whatever a step of the training was; loss and score are of the same targets."""
    (folder / "long.fasta").write_text(f">r\n{''.join(random.Random(3).choices('ACDEFGHIKL', k=LENGTH))}\n")
    run = trained("one", "trainer.devices=2", "trainer.accumulate=3", "data.batch_tokens=768")
    words = ("--data", "long.fasta", f"data.length={LENGTH + 2}", "--bootstrap", 0, "--json")
    found = json.loads(longseq("evaluate", run, *words))["splits"]["long.fasta"]
    (wanted,) = api.score(run, "long.fasta")
    assert (found["sequences"], found["targets"]) == (1, LENGTH + 1)
    assert found["loss"] == pytest.approx(-wanted.mean, rel=1e-5)


@pytest.mark.parametrize("options", [carried[2], summed[1], *on_both_sides], ids=named)
def test_tensors_of_a_ten_times_longer_sequence_take_no_more_memory(options):
    model, peaks = build(**options), []
    for length in (3000, 30_000):
        row = np.random.default_rng(0).integers(0, 20, length, dtype=np.uint8)
        meter = PeakMeter(torch.device("cpu"))
        with torch.inference_mode():
            for _ in hidden_in_tiles(model, row):
                pass
        peaks.append(meter.stop())
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 30_000 * SPEC.dim * 4  # the activations of one layer


def test_what_cannot_be_carried_and_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(hidden_tiles, "available", lambda _: 2.0**20)
    with pytest.raises(LongseqError, match=r"4,502 tokens in one piece .* exact attention has no sums to carry"):
        list(hidden_in_tiles(build(kind="exact"), ROW))
    decaying = build(causal=False, kind="exact", learned_decay=True)
    with pytest.raises(LongseqError, match=r"takes about 0\.2 GiB, and 0\.0 GiB are free"):  # of 3 heads' scores
        list(hidden_in_tiles(decaying, ROW))
    assert len(list(hidden_in_tiles(build(), ROW))) == 7


@pytest.mark.parametrize("options", [*summed, *on_both_sides, {"causal": False, "depth": 1, "window": 9}], ids=named)
def test_room_for_temporary_files_is_looked_at_to_the_byte(monkeypatch, options):
    sizes, model = {tile_by_tile._Stored: [], tile_by_tile._States: []}, build(**options)
    leave = tile_by_tile._File.__exit__

    def leaving(self, *how):
        sizes[type(self)].append(os.fstat(self.file.fileno()).st_size)
        leave(self, *how)

    monkeypatch.setattr(tile_by_tile._File, "__exit__", leaving)
    with torch.inference_mode():
        wanted = torch.cat([x for _, x in hidden_in_tiles(model, ROW)], 1)
        stored, states = sizes.values()  # states of one layer at a time
        room = SimpleNamespace(free=sum(stored) + max(states, default=0))
        assert room.free >= 4502 * SPEC.dim * 4
        monkeypatch.setattr(tile_by_tile.shutil, "disk_usage", lambda _: room)
        assert torch.equal(torch.cat([x for _, x in hidden_in_tiles(model, ROW)], 1), wanted)
        room.free -= 1
        sentence = r"MiB free, and a sequence of 4,502 tokens needs \d+ MiB of temporary files there; .* set TMPDIR to"
        with pytest.raises(LongseqError, match=sentence):
            next(hidden_in_tiles(model, ROW))


@pytest.mark.parametrize("options", [summed[0], on_both_sides[1]], ids=named)
def test_a_disk_that_fills_meanwhile_is_said_with_its_remedy(monkeypatch, options):
    monkeypatch.setattr(tile_by_tile.tempfile, "TemporaryFile", partial(Path("/dev/full").open, "w+b"))
    with torch.inference_mode(), pytest.raises(LongseqError, match=r"No space left on device, after .* set TMPDIR to"):
        list(hidden_in_tiles(build(**options), ROW))


@pytest.mark.parametrize(("objective", "tile"), [("masked", 8000), ("causal", 4096)])
def test_a_tile_of_a_masked_model_has_four_windows(trained, objective, tile):
    source = find(trained("one", f"model.objective={objective}"))
    wide = replace(source.config, attention=replace(source.config.attention, window=2000))
    assert replace(source, config=wide).reading_spec("cpu").tile == tile
