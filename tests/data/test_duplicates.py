"""Laws of the duplicate report: copies are found however they are stored, different pictures are not."""

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


def picture(i, side=128):
    return Image.fromarray(render_scene(generate_scene(i), side))


def save(path, image, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)


def found_in(root, **options):
    source = config.FolderSource(path=str(root), max_bad_fraction=0.5)
    splits = [ImagePool([open_source(source, split, languages=())]) for split in ("train", "eval")]
    return splits, find_duplicates(*splits, **options)


def test_copies_are_found_however_they_are_stored(tmp_path):
    for i in range(40):
        save(tmp_path / f"train/{i:02d}.png", picture(i))
    save(tmp_path / "train/again.png", picture(3))
    save(tmp_path / "train/again.webp", picture(3), "WEBP", lossless=True)
    save(tmp_path / "val/a.png", picture(3))  # the same bytes, twice in training, and the same pixels
    save(tmp_path / "val/b.jpg", picture(7), "JPEG", quality=70)
    save(tmp_path / "val/c.png", picture(11).resize((70, 70)))
    save(tmp_path / "val/d.webp", picture(12), "WEBP", quality=60)
    brighter = Image.fromarray(np.clip(np.asarray(picture(13)).astype(int) + 6, 0, 255).astype(np.uint8))
    save(tmp_path / "val/e.png", brighter)
    for i in range(100, 140):
        save(tmp_path / f"val/new{i}.png", picture(i))
    (tmp_path / "val/broken.png").write_bytes(b"no")
    (train, evaluation), found = found_in(tmp_path)
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


def test_chunks_and_threads_do_not_matter(tmp_path, monkeypatch):
    for i in range(20):
        save(tmp_path / f"train/{i:02d}.png", picture(i, 64))
        save(tmp_path / f"val/{i:02d}.jpg", picture(i if i % 2 else i + 500, 64), "JPEG", quality=90)
    _, want = found_in(tmp_path)
    assert [(d.eval, d.train) for d in want] == [(i, i) for i in range(1, 20, 2)]
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    told = []
    assert found_in(tmp_path, threads=5, progress=lambda *x: told.append(x))[1] == want
    assert told == [(20, 40), (40, 40)]


def test_flat_pictures_are_compared_by_their_colours(tmp_path):
    """Their hashes say nothing: all frequencies are zero. A red of 8 i is within 12 of 80 for i from 8 to 12, as a
    difference in one channel of three counts by its root of a third."""
    for i in range(30):
        save(tmp_path / f"train/{i:02d}.png", Image.new("RGB", (32, 32), (8 * i, 0, 0)))
    save(tmp_path / "val/a.jpg", Image.new("RGB", (32, 32), (80, 0, 0)), "JPEG")
    save(tmp_path / "val/b.jpg", Image.new("RGB", (32, 32), (80, 0, 200)), "JPEG")
    (train, evaluation), found = found_in(tmp_path)
    assert {evaluation.name(d.eval) for d in found} == {"val/a.jpg"}
    names = [train.name(d.train) for d in found]
    assert names[0] == "train/10.png" and sorted(names) == [f"train/{i:02d}.png" for i in range(8, 13)]


def test_the_hash_by_hand():
    """A picture that is one cosine: its own frequency is above the median, and turning it about flips that bit."""
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


def test_pictures_of_a_mixture_are_those_of_its_parts(tmp_path):
    for name, at in (("a", 0), ("b", 10)):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", picture(at + i, 32))
    parts = [config.FolderSource(path=str(tmp_path / name), eval_fraction=0.0) for name in "ab"]
    mixture = config.MixtureSource(parts=(*parts, config.ScenesSource()), weights=(1, 1, 1))
    rows = ImagePool([open_source(mixture, "train", languages=())])
    assert len(rows) == 6 and [rows.name(i) for i in range(6)] == ["0.png", "1.png", "2.png"] * 2
    want = [np.asarray(picture(i, 32)) for i in (0, 1, 2, 10, 11, 12)]
    got = [np.asarray(Image.open(io.BytesIO(rows.stored_image(i)))) for i in range(6)]
    np.testing.assert_array_equal(got, want)
    whole = find_duplicates(rows, rows)
    assert whole == [Duplicate(i, i, True, 0, 0.0) for i in range(6)]
    assert len(ImagePool([open_source(config.ScenesSource(), "train")])) == 0


# --- leaving them out -------------------------------------------------------------------------------------


def rows_seen(source, steps=8):
    """The grey level that names a row, and its caption's, over some steps."""
    data = config.DataConfig(source=source, batch_size=4, crop="random")
    opened = open_train_source(data)
    with train_batches(data, opened, start=0, image_size=8) as batches:
        pictures = np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(steps)])
    return pictures, opened


def greys(tmp_path, count=12):
    for i in range(count):
        save(tmp_path / f"mine/{i:02d}.png", Image.new("RGB", (16, 16), (i, i, i)))
        (tmp_path / f"mine/{i:02d}.txt").write_text(f"row {i}")
    return config.FolderSource(path=str(tmp_path / "mine"), eval_fraction=0.0, max_bad_fraction=0.0)


def test_a_row_that_is_excluded_moves_no_other(tmp_path):
    """Rows 3, 4 and 11 show the next row that is wanted; the last goes over the end. None of them counts as bad."""
    source = greys(tmp_path)
    (tmp_path / "list.jsonl").write_text(
        '{"eval": "x", "train": "03.png", "exact": true}\n\n{"name": "04.png", "cause": "c"}\n11.png\nother.png\n'
    )
    fewer = dataclasses.replace(source, exclude=str(tmp_path / "list.jsonl"))
    whole, plain = rows_seen(source)
    left, opened = rows_seen(fewer)
    assert {3, 4, 11} < set(whole.tolist()) and len(opened) == 12
    want = np.select([(whole == 3) | (whole == 4), whole == 11], [5, 0], whole.astype(int))
    np.testing.assert_array_equal(left, want)
    assert opened.report() == {"excluded": 3} and opened.replacements == {3: 5, 4: 5, 11: 0}
    fresh = open_source(fewer, "train")
    assert [fresh.captions(i)["en"] for i in (3, 4, 11)] == [("row 5",), ("row 5",), ("row 0",)]  # unread
    assert (
        fresh.fingerprint() != plain.fingerprint()
        and plain.fingerprint() == open_source(source, "train").fingerprint()
    )
    fresh.log_to(tmp_path / "bad_records.jsonl")
    names = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert names == [{"name": f"{i:02d}.png", "cause": "excluded"} for i in (3, 4, 11)]


def test_an_excluded_row_before_a_broken_one(tmp_path):
    source = dataclasses.replace(greys(tmp_path), max_bad_fraction=0.1, exclude=str(tmp_path / "list.txt"))
    (tmp_path / "mine/04.png").write_bytes(b"no")
    (tmp_path / "list.txt").write_text("03.png\n")
    rows = open_source(source, "train")
    assert rows.image(3, 8, "center")[0, 0, 0] == 5 and rows.captions(3)["en"] == ("row 5",)
    assert rows.report() == {"excluded": 1, "not an image": 1}


def test_the_report_is_a_list_to_exclude(tmp_path):
    """`dalle-jax data --duplicates` writes it, and finds nothing more once it is left out."""
    for i in range(12):
        save(tmp_path / f"mine/train/{i:02d}.png", picture(i))
    save(tmp_path / "mine/train/again.png", picture(3))
    save(tmp_path / "mine/val/a.png", picture(3))
    save(tmp_path / "mine/val/b.jpg", picture(7), "JPEG", quality=70)
    (tmp_path / "c.py").write_text(
        "from dalle_jax.config import *\n"
        f"source = FolderSource(path={str(tmp_path / 'mine')!r}, exclude={str(tmp_path / 'one/duplicates.jsonl')!r})\n"
        "config = TrainConfig(model=DVAEConfig(image_size=32), data=DataConfig(source=source))\n"
    )
    assert main(["data", str(tmp_path / "mine"), "--duplicates", str(tmp_path / "one")]) == 0
    listed = [json.loads(line) for line in (tmp_path / "one/duplicates.jsonl").read_text().splitlines()]
    assert {line["train"] for line in listed} == {"train/03.png", "train/again.png", "train/07.png"}
    assert main(["data", str(tmp_path / "c.py"), "--duplicates", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two/duplicates.jsonl").read_text() == ""


def test_lists_that_are_refused(tmp_path):
    source, path = greys(tmp_path, 3), tmp_path / "list.txt"

    def opened(split="train"):
        return open_source(dataclasses.replace(source, exclude=str(path)), split)

    with pytest.raises(FileNotFoundError, match=r"data\.source\.exclude, got no file .*list\.txt"):
        opened()
    for text, message in (
        (
            "cat.png\n",
            r"list\.txt: none of the 1 names is a record of .*mine, whose names are like '00\.png'",
        ),
        ("00.png\n01.png\n02.png\n", "rows of .*mine is excluded"),
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
    ):  # nothing is held out, the list is not read
        path.unlink()
        opened("eval")
