"""Tests of the duplicate report: copies in any format are found, different images are not."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from dalle_jax import config
from dalle_jax.cli import main
from dalle_jax.data import duplicates
from dalle_jax.data.duplicates import Duplicate, ImagePool, find_duplicates, perceptual_hash
from dalle_jax.data.loader.pipeline import open_train_source, train_batches
from dalle_jax.data.scenes.generator import generate_scene, render_scene
from dalle_jax.data.sources import open_source


def scene_image(i, side=128):
    return Image.fromarray(render_scene(generate_scene(i), side))


def save(path, image, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)


def duplicates_in(root, **options):
    source = config.FolderSource(path=str(root), max_bad_fraction=0.5)
    splits = [ImagePool([open_source(source, split, languages=())]) for split in ("train", "eval")]
    return splits, find_duplicates(*splits, **options)


def test_copies_in_any_format_are_found(tmp_path):
    for i in range(40):
        save(tmp_path / f"train/{i:02d}.png", scene_image(i))
    save(tmp_path / "train/again.png", scene_image(3))
    save(tmp_path / "train/again.webp", scene_image(3), "WEBP", lossless=True)
    save(tmp_path / "val/a.png", scene_image(3))  # the same bytes, twice in training, and the same pixels
    save(tmp_path / "val/b.jpg", scene_image(7), "JPEG", quality=70)
    save(tmp_path / "val/c.png", scene_image(11).resize((70, 70)))
    save(tmp_path / "val/d.webp", scene_image(12), "WEBP", quality=60)
    brighter = Image.fromarray(np.clip(np.asarray(scene_image(13)).astype(int) + 6, 0, 255).astype(np.uint8))
    save(tmp_path / "val/e.png", brighter)
    for i in range(100, 140):
        save(tmp_path / f"val/new{i}.png", scene_image(i))
    (tmp_path / "val/broken.png").write_bytes(b"no")
    (train, evaluation), found = duplicates_in(tmp_path)
    copies = [(train.name(d.train), d.exact) for d in found if evaluation.name(d.eval) == "val/a.png"]
    assert copies == [("train/03.png", True), ("train/again.png", True), ("train/again.webp", False)]
    found = [d for d in found if "again" not in train.name(d.train)]
    pairs = {evaluation.name(d.eval): (train.name(d.train), d.exact) for d in found}
    want = {
        "a.png": (3, True),
        "b.jpg": (7, False),
        "c.png": (11, False),
        "d.webp": (12, False),
        "e.png": (13, False),
    }
    assert pairs == {f"val/{name}": (f"train/{i:02d}.png", exact) for name, (i, exact) in want.items()}
    assert all(0 < d.difference < 12 and d.bits <= 6 for d in found if not d.exact)
    assert sorted(d.eval for d in found) == [d.eval for d in found]


def test_the_result_does_not_depend_on_chunks_and_threads(tmp_path, monkeypatch):
    for i in range(20):
        save(tmp_path / f"train/{i:02d}.png", scene_image(i, 64))
        save(tmp_path / f"val/{i:02d}.jpg", scene_image(i if i % 2 else i + 500, 64), "JPEG", quality=90)
    _, want = duplicates_in(tmp_path)
    assert [(d.eval, d.train) for d in want] == [(i, i) for i in range(1, 20, 2)]
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    progress_calls = []
    assert duplicates_in(tmp_path, threads=5, progress=lambda *x: progress_calls.append(x))[1] == want
    assert progress_calls == [(20, 40), (40, 40)]


def test_images_of_one_color_are_compared_by_color(tmp_path):
    """Their hashes are equal, since all frequencies are zero. A red of 8 i is within 12 of 80 for i from 8 to 12: a
    difference in one of three channels is divided by sqrt(3)."""
    for i in range(30):
        save(tmp_path / f"train/{i:02d}.png", Image.new("RGB", (32, 32), (8 * i, 0, 0)))
    save(tmp_path / "val/a.jpg", Image.new("RGB", (32, 32), (80, 0, 0)), "JPEG")
    save(tmp_path / "val/b.jpg", Image.new("RGB", (32, 32), (80, 0, 200)), "JPEG")
    (train, evaluation), found = duplicates_in(tmp_path)
    assert {evaluation.name(d.eval) for d in found} == {"val/a.jpg"}
    names = [train.name(d.train) for d in found]
    assert names[0] == "train/10.png" and sorted(names) == [f"train/{i:02d}.png" for i in range(8, 13)]


def test_the_hash_by_hand():
    """In an image of one cosine the bit of its frequency is 1; with the opposite sign it is 0."""
    n = np.arange(32)
    bits = {}
    for k in (1, 5):
        for sign in (1, -1):
            wave = 128 + sign * 100 * np.cos(np.pi * k * (2 * n + 1) / 64)
            image = np.broadcast_to(wave[None, :, None], (32, 32, 3)).round().astype(np.uint8)
            bits[k, sign] = perceptual_hash(image) >> (63 - k) & 1  # row frequency 0, column frequency k
    assert bits == {(1, 1): 1, (1, -1): 0, (5, 1): 1, (5, -1): 0}
    with pytest.raises(ValueError, match=r"Expected uint8 \(32, 32, 3\), got float64"):
        perceptual_hash(np.zeros((32, 32, 3)))


def test_images_of_a_mixture_are_those_of_its_parts(tmp_path):
    for name, at in (("a", 0), ("b", 10)):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", scene_image(at + i, 32))
    parts = [config.FolderSource(path=str(tmp_path / name), eval_fraction=0.0) for name in "ab"]
    mixture = config.MixtureSource(parts=(*parts, config.ScenesSource()), weights=(1, 1, 1))
    rows = ImagePool([open_source(mixture, "train", languages=())])
    assert len(rows) == 6 and [rows.name(i) for i in range(6)] == ["0.png", "1.png", "2.png"] * 2
    want = [np.asarray(scene_image(i, 32)) for i in (0, 1, 2, 10, 11, 12)]
    got = [np.asarray(Image.open(io.BytesIO(rows.stored_image(i)))) for i in range(6)]
    np.testing.assert_array_equal(got, want)
    whole = find_duplicates(rows, rows)
    assert whole == [Duplicate(i, i, True, 0, 0.0) for i in range(6)]
    assert len(ImagePool([open_source(config.ScenesSource(), "train")])) == 0


# --- exclusion --------------------------------------------------------------------------------------------


def rows_read(source, steps=8):
    """Return the gray levels of the rows of some steps, each the number of its row, and the source."""
    data = config.DataConfig(source=source, batch_size=4, crop="random")
    opened = open_train_source(data)
    with train_batches(data, opened, start=0, image_size=8) as batches:
        gray_levels = np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(steps)])
    return gray_levels, opened


def write_gray_images(tmp_path, count=12):
    for i in range(count):
        save(tmp_path / f"data/{i:02d}.png", Image.new("RGB", (16, 16), (i, i, i)))
        (tmp_path / f"data/{i:02d}.txt").write_text(f"row {i}")
    return config.FolderSource(path=str(tmp_path / "data"), eval_fraction=0.0, max_bad_fraction=0.0)


def test_an_excluded_row_moves_no_other_row(tmp_path):
    """Rows 3, 4 and 11 are replaced by the next row that is not excluded, the last by row 0; none counts as bad."""
    source = write_gray_images(tmp_path)
    (tmp_path / "list.jsonl").write_text(
        '{"eval": "x", "train": "03.png", "exact": true}\n\n{"name": "04.png", "cause": "c"}\n11.png\nother.png\n'
    )
    fewer = dataclasses.replace(source, exclude=str(tmp_path / "list.jsonl"))
    whole, plain = rows_read(source)
    left, opened = rows_read(fewer)
    assert {3, 4, 11} < set(whole.tolist()) and len(opened) == 12
    want = np.select([(whole == 3) | (whole == 4), whole == 11], [5, 0], whole.astype(int))
    np.testing.assert_array_equal(left, want)
    assert opened.report() == {"excluded": 3} and opened.replacements == {3: 5, 4: 5, 11: 0}
    fresh = open_source(fewer, "train")
    assert [fresh.captions(i)["en"] for i in (3, 4, 11)] == [
        ("row 5",),
        ("row 5",),
        ("row 0",),
    ]  # before an image is read
    assert (
        fresh.fingerprint() != plain.fingerprint()
        and plain.fingerprint() == open_source(source, "train").fingerprint()
    )
    fresh.log_to(tmp_path / "bad_records.jsonl")
    names = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert names == [{"name": f"{i:02d}.png", "cause": "excluded"} for i in (3, 4, 11)]


def test_an_excluded_row_before_a_broken_one(tmp_path):
    source = dataclasses.replace(
        write_gray_images(tmp_path), max_bad_fraction=0.1, exclude=str(tmp_path / "list.txt")
    )
    (tmp_path / "data/04.png").write_bytes(b"no")
    (tmp_path / "list.txt").write_text("03.png\n")
    rows = open_source(source, "train")
    assert rows.image(3, 8, "center")[0, 0, 0] == 5 and rows.captions(3)["en"] == ("row 5",)
    assert rows.report() == {"excluded": 1, "not an image": 1}


def test_the_report_can_be_excluded(tmp_path):
    """With the report of `dalle-jax data --duplicates` as `exclude`, a second report is empty."""
    for i in range(12):
        save(tmp_path / f"data/train/{i:02d}.png", scene_image(i))
    save(tmp_path / "data/train/again.png", scene_image(3))
    save(tmp_path / "data/val/a.png", scene_image(3))
    save(tmp_path / "data/val/b.jpg", scene_image(7), "JPEG", quality=70)
    (tmp_path / "c.py").write_text(
        "from dalle_jax.config import *\n"
        f"source = FolderSource(path={str(tmp_path / 'data')!r}, exclude={str(tmp_path / 'one/duplicates.jsonl')!r})\n"
        "config = TrainConfig(model=DVAEConfig(image_size=32), data=DataConfig(source=source))\n"
    )
    assert main(["data", str(tmp_path / "data"), "--duplicates", str(tmp_path / "one")]) == 0
    listed = [json.loads(line) for line in (tmp_path / "one/duplicates.jsonl").read_text().splitlines()]
    assert {line["train"] for line in listed} == {"train/03.png", "train/again.png", "train/07.png"}
    assert main(["data", str(tmp_path / "c.py"), "--duplicates", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two/duplicates.jsonl").read_text() == ""


def test_invalid_lists_are_rejected(tmp_path):
    source, path = write_gray_images(tmp_path, 3), tmp_path / "list.txt"

    def opened(split="train"):
        return open_source(dataclasses.replace(source, exclude=str(path)), split)

    with pytest.raises(FileNotFoundError, match=r"data\.source\.exclude, got no file .*list\.txt"):
        opened()
    for text, message in (
        (
            "cat.png\n",
            r"list\.txt: none of the 1 names is a record of .*data, whose names are like '00\.png'",
        ),
        ("00.png\n01.png\n02.png\n", "rows of .*data is excluded"),
        ('00.png\n{"eval": "x"}\n', r"line 2 of data\.source\.exclude .*list\.txt"),
        ("{broken\n", "line 1 of "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            opened()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read"):
        opened()
    path.write_text("")
    assert len(opened()) == 3 and opened().report() == {}
    with pytest.raises(
        ValueError, match="Expected rows of split 'val'"
    ):  # no row is held out, so the list is not read
        path.unlink()
        opened("eval")
