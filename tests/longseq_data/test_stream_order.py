"""The order of streamed samples: the same with and without a cache, in later epochs, and as versions before had it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ingesting import batches, fasta, spec_of
from longseq_data.errors import DataError
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.rank_share import Share
from longseq_data.samples.shuffling import documents_in_file_order, shuffled_documents
from longseq_data.samples.streaming import StreamSpec
from plain_samples import training_samples


@pytest.mark.parametrize("packing", ["concat", "crop"])
def test_the_order_is_the_same_with_and_without_a_cache_and_while_blocks_come(write, cache, packing) -> None:
    sources = [write(f"{name}.fasta.gz", gzip.compress(fasta(name, 400, seed))) for seed, name in enumerate("abcde")]
    plain = spec_of(*sources, packing=packing)
    kept = replace(plain, cache=str(cache))
    for start, world, rank in ((0, 1, 0), (0, 2, 1), (333, 4, 2), (2000, 1, 0)):
        share = {"start": start, "world": world, "rank": rank}
        assert batches(kept, **share) == batches(plain, **share)
    valid, valid_kept = replace(plain, split="valid"), replace(kept, split="valid")
    assert valid_kept.target_counts().tolist() == valid.target_counts().tolist()


def test_workers_of_several_ranks_read_what_one_process_has_parsed(write, cache) -> None:
    source = write("a.fasta", fasta("a", 3000))
    for world, workers in ((1, 0), (2, 1), (2, 3)):
        found = {}
        for rank in range(world):
            settings = {"batch_sequences": 8 // world, "accumulate": 1, "rank": rank, "world": world}
            for kind in (None, cache):
                dataset = TrainingBatches(spec_of(source, cache=kind), **settings)
                rows = [batch["tokens"] for batch in islice(Loader(dataset, workers), 12)]
                found[kind] = rows
            assert all((a == b).all() for a, b in zip(found[None], found[cache], strict=True))
    (manifest,) = cache.glob("blocks/*/manifest.json")
    assert json.loads(manifest.read_text())["bytes_read"] == Path(source).stat().st_size


def test_later_epochs_come_from_the_cache_alone(write, cache) -> None:
    source = write("a.fasta", fasta("a", 100))
    spec = spec_of(source, cache=cache, packing="crop")
    expected = batches(spec_of(source, packing="crop"), 90)
    endless = spec.training(0, Share(4, 1, 0, 1))
    seen = [next(endless)() for _ in range(30)]  # more than an epoch
    status = Path(source).stat()
    Path(source).write_bytes(b"x" * status.st_size)  # the same size and time
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen += [make() for make in islice(endless, 60)]
    assert [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in seen] == expected


# Of the version before blocks, whose runs go on: hashes of 40 batches from sample 0 and 12 from sample 333 on.
BEFORE = {
    ("proteins", "concat"): "a336b706d67f1545",
    ("proteins", "crop"): "70318275f053a74d",
    ("text", "concat"): "5957798355af8e34",
    ("text", "crop"): "6f2fa52c315f8b4e",
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("kind", "packing"), BEFORE)
def test_the_order_is_that_of_earlier_versions(write, cache, kind, packing, kept) -> None:
    assert order_of(write, kind, packing, str(cache) if kept else None) == BEFORE[kind, packing]


def order_of(write, kind: str, packing: str, cache: str | None) -> str:
    draw = random.Random(7)
    letters = "ACDEFGHIKLMNPQRSTVWYXJ-" if kind == "proteins" else "abc dé\u2003\n"
    sources = []
    for name in range(20):  # more than are read in turn
        texts = ["".join(draw.choices(letters, k=draw.choice([1, 9, 200]))) for _ in range(draw.randint(2, 60))]
        if kind == "proteins":
            texts = [f">{name}_{i}\nM{text}\n" for i, text in enumerate(texts)]
        sources.append(write(f"{name:02}.{kind}", "".join(texts)))
    reading = FASTA if kind == "proteins" else Reading("text", "bytes", part_bytes=300)
    more = {} if cache is None else {"cache": cache}
    digest = hashlib.sha256()
    for objective, reset, buffer in (("causal", False, 30), ("masked", packing == "concat", 10_000)):
        spec = StreamSpec(
            tuple(sources), "train", 0.1, 0.1, 32, packing, objective, 5, buffer, reading=reading, reset=reset, **more
        )
        for start, count, share in ((0, 40, Share(4, 2, 1, 2)), (333, 12, Share(4, 1, 0, 1))):
            for make in islice(spec.training(start, share), count):
                batch = make()
                for key in sorted(batch):
                    digest.update(key.encode() + np.ascontiguousarray(batch[key]).astype("<i4").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("way", [{}, {"reset": True}, {"packing": "crop", "crop": "first"}])
def test_later_epochs_are_permutations_of_all_records(write, cache, small, way) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 40, i)) for i in range(20)]
    spec = spec_of(*sources, cache=cache, later_epochs="permutation", **way)
    epochs = [[item.identifier for item in shuffled_documents(spec, epoch)] for epoch in range(3)]
    names = {document.identifier for document in documents_in_file_order(spec)}
    assert [len(epoch) for epoch in epochs] == [len(names)] * 3
    assert all(set(epoch) == names for epoch in epochs)
    assert epochs[1] != epochs[2]
    places = {name: place for place, name in enumerate(epochs[0])}
    far = np.abs(np.diff([places[name] for name in epochs[1]])).mean()
    assert abs(far / (len(names) / 3) - 1) < 0.15  # neighbours lie as far apart as two places drawn at random
    assert epochs[0] == [item.identifier for item in shuffled_documents(spec_of(*sources, **way), 0)]


@pytest.mark.parametrize("way", [{}, {"reset": True}, {"packing": "crop"}, {"objective": "masked"}])
def test_starting_late_equals_skipping_in_permuted_epochs(write, cache, way) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 20, i)) for i in range(3)]
    spec = spec_of(*sources, cache=cache, later_epochs="permutation", **way)
    epoch = 54 if "packing" in way else 255  # samples, about
    whole = batches(spec, 3 * epoch // 4 + 1)
    for start in (epoch // 4 * 4, 2 * epoch // 4 * 4, 2 * epoch // 4 * 4 + 8):
        assert batches(spec, 9, start=start) == whole[start // 4 : start // 4 + 9]
    one_by_one = islice(training_samples(spec, 2 * epoch), 12)
    made = (make() for make in spec.training(2 * epoch, Share(1, 1, 0, 1)))
    for sample, batch in zip(one_by_one, made, strict=False):
        assert (batch["tokens"][0] == sample.tokens).all()
        assert (batch["targets"][0] == sample.targets).all()


def test_permuted_epochs_without_a_cache_are_refused_in_a_sentence(write, tmp_path) -> None:
    source = write("a.fasta", fasta("a", 20))
    (tmp_path / "file").write_text("no folder")
    for folder, reason in ((None, f"{source} is not kept in data.cache"), (tmp_path / "file", "part of this path")):
        endless = spec_of(source, cache=folder, later_epochs="permutation").training(0, Share(4, 1, 0, 1))
        with pytest.raises(DataError, match=f"{reason}.*data.later_epochs=permutation.*data.cache.$"):
            for _ in endless:
                pass
