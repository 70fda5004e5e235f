"""Images as byte sequences: ImageNet64's order, the same from files, Parquet and the Hub."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.readers.formats import Leaf
from longseq_data.readers.images import pixels, read_images, values_of
from longseq_data.readers.reading import Reading
from longseq_data.samples.streaming import StreamSpec, target_counts
from longseq_data.vocabulary import PIXELS
from plain_samples import evaluation_samples, training_samples

pytestmark = pytest.mark.interfaces

SIZE = 6
VALUES = values_of(SIZE)


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path) -> str:
    """Two folders of four PNG images each, numbered 0 to 7."""
    for number in range(8):
        path = tmp_path / "pictures" / f"n0{number // 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(number)))
    return str(tmp_path / "pictures")


def spec_of(source: str, *, format: str = "auto", size: int = SIZE, **changes) -> StreamSpec:
    reading = Reading(format, "pixels", image_size=size)
    values = {"length": values_of(size), "packing": "crop", "objective": "causal", "seed": 5, "shuffle_buffer": 8}
    return StreamSpec((source,), None, 0.0, 0.0, reading=reading, **{**values, **changes})


def test_tokens_are_rows_columns_and_colours():
    array = picture(1)
    tokens = pixels(png(array), SIZE, "a")
    assert tokens.tolist() == [
        int(array[row, column, colour]) for row in range(6) for column in range(6) for colour in range(3)
    ]
    assert tokens.dtype == PIXELS.dtype
    assert values_of(64) == 12_288


def test_a_larger_image_is_cropped_in_the_middle_and_averaged():
    array = picture(2, 2 * SIZE, 2 * SIZE + 4)
    middle = array[:, 2:-2].reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
    found = pixels(png(array), SIZE, "a").reshape(SIZE, SIZE, 3).astype(float)
    assert np.abs(found - middle).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_kinds_of_images_have_three_colours_too(mode):
    out = io.BytesIO()
    Image.fromarray(picture(3)).convert(mode).save(out, "PNG")
    tokens = pixels(out.getvalue(), SIZE, "a").reshape(-1, 3)
    assert tokens.shape == (SIZE * SIZE, 3)
    assert (tokens[:, 0] == tokens[:, 2]).all() == (mode in ("L", "1"))


@pytest.mark.parametrize(
    "content", [b"", b"no image", png(picture(4, 40, 40))[:-300], b"\x89PNG\r\n\x1a\n" + b"\0" * 20]
)
def test_what_is_no_image_is_refused_with_its_name(content, write):
    path = write("a.png", content)
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        pixels(path, SIZE, path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_an_image_as_long_as_the_window_is_predicted_whole_after_bos(folder):
    found = {}
    for sample in islice(training_samples(spec_of(folder)), 8):
        assert sample.tokens[0] == PIXELS.bos
        assert len(sample.tokens) == len(sample.targets) == VALUES
        assert (sample.tokens[1:] == sample.targets[:-1]).all()
        found[sample.targets.tobytes()] = True
    assert set(found) == {picture(i).reshape(-1).astype(np.int16).tobytes() for i in range(8)}


def test_files_parquet_and_the_hub_give_the_same_pixels(folder, tmp_path):
    expected = [picture(i).reshape(-1).tolist() for i in range(8)]
    encoded = [{"bytes": png(picture(i)), "path": None} for i in range(8)]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"image": encoded}), tmp_path / "table" / "train.parquet")
    pq.write_table(pa.table({"image": [value["bytes"] for value in encoded]}), tmp_path / "plain.parquet")
    for source in (folder, str(tmp_path / "plain.parquet"), f"{tmp_path}/table/train.parquet", f"hub:{tmp_path}/table"):
        assert [sample.targets.tolist() for sample in evaluation_samples(spec_of(source))] == expected, source
    # the Hub's own reader of image folders
    assert [s.targets.tolist() for s in evaluation_samples(spec_of(f"hub:{folder}"))] == expected


def test_targets_are_counted_and_measured(folder):
    spec = spec_of(folder, measured=True)
    samples = list(evaluation_samples(spec))
    assert sum(sample.extent.bytes for sample in samples) == 8 * VALUES
    assert sum(sample.extent.words for sample in samples) == 0
    counts = np.bincount(np.concatenate([picture(i).reshape(-1) for i in range(8)]), minlength=PIXELS.size)
    assert target_counts(spec).tolist() == counts.tolist()


def test_shorter_windows_are_parts_of_an_image_at_random_or_its_beginning(folder):
    whole = [[PIXELS.bos, *picture(i).reshape(-1).tolist()] for i in range(8)]
    starts = set()
    for crop in ("random", "first"):
        for sample in islice(training_samples(spec_of(folder, length=50, crop=crop)), 16):
            row = [sample.tokens[0], *sample.targets]
            (start,) = {i for image in whole for i in range(len(image) - 50) if image[i : i + 51] == row}
            starts.add((crop, start))
    assert len({start for crop, start in starts if crop == "random"}) > 8
    assert {start for crop, start in starts if crop == "first"} == {0}
    evaluated = list(evaluation_samples(spec_of(folder, length=50)))
    assert sum(len(sample.targets) for sample in evaluated) == 8 * VALUES


def test_planning_reads_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (document,) = read_images(str(tmp_path), SIZE)
    assert document.identifier == f"{tmp_path.name}/a.png"


def test_a_table_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "b": [1]}), tmp_path / "a.parquet")
    leaf = Leaf(str(tmp_path / "a.parquet"), "parquet")
    with pytest.raises(DataError, match="column 'image' is string and holds no images"):
        list(parsed(Reading("parquet", "pixels"), leaf, strict=False))
    with pytest.raises(DataError, match=r"there is no 'picture' \(data.column\) among image, b"):
        list(parsed(Reading("parquet", "pixels", column="picture"), leaf, strict=False))


def test_a_bad_image_in_a_table_is_named_by_its_row(tmp_path):
    pq.write_table(pa.table({"image": [png(picture(1)), b"no image"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: cannot be read as an image"):
        list(evaluation_samples(spec_of(str(tmp_path / "a.parquet"))))
    pq.write_table(pa.table({"image": [png(picture(1)), None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'image' holds no image"):
        list(evaluation_samples(spec_of(str(tmp_path / "a.parquet"))))
    assert Path(tmp_path / "a.parquet").exists()


def test_sixteen_bits_become_their_upper_eight(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256], [32768, 40000, 65535], [1000, 2000, 3000]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = pixels(str(tmp_path / "deep.png"), 3, "deep.png").reshape(3, 3, 3)
    assert (found == (grey >> 8)[:, :, None]).all()
