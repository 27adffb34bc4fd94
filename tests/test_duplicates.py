"""Laws of the duplicate report: copies are found however they are stored, different pictures are not."""

import io

import numpy as np
import pytest
from PIL import Image

from dalle_jax import config
from dalle_jax.data import duplicates
from dalle_jax.data.duplicates import Duplicate, Pictures, find_duplicates, perceptual_hash
from dalle_jax.data.scenes import render, scene
from dalle_jax.data.sources import open_source


def picture(i, side=128):
    return Image.fromarray(render(scene(i), side))


def save(path, image, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)


def found_in(root, **options):
    source = config.FolderSource(path=str(root), max_bad_share=0.5)
    splits = [Pictures([open_source(source, split, languages=())]) for split in ("train", "eval")]
    return splits, find_duplicates(*splits, **options)


def test_copies_are_found_however_they_are_stored(tmp_path):
    for i in range(40):
        save(tmp_path / f"train/{i:02d}.png", picture(i))
    save(tmp_path / "val/a.png", picture(3))  # the same bytes
    save(tmp_path / "val/b.jpg", picture(7), "JPEG", quality=70)
    save(tmp_path / "val/c.png", picture(11).resize((70, 70)))
    save(tmp_path / "val/d.webp", picture(12), "WEBP", quality=60)
    brighter = Image.fromarray(np.clip(np.asarray(picture(13)).astype(int) + 6, 0, 255).astype(np.uint8))
    save(tmp_path / "val/e.png", brighter)
    for i in range(100, 140):
        save(tmp_path / f"val/new{i}.png", picture(i))
    (tmp_path / "val/broken.png").write_bytes(b"no")
    (train, evaluation), found = found_in(tmp_path)
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
    """Their hashes say nothing: all frequencies are zero."""
    for i in range(30):
        save(tmp_path / f"train/{i:02d}.png", Image.new("RGB", (32, 32), (8 * i, 0, 0)))
    save(tmp_path / "val/a.jpg", Image.new("RGB", (32, 32), (80, 0, 0)), "JPEG")
    save(tmp_path / "val/b.jpg", Image.new("RGB", (32, 32), (80, 0, 200)), "JPEG")
    (train, evaluation), found = found_in(tmp_path)
    assert [(evaluation.name(d.eval), train.name(d.train)) for d in found] == [("val/a.jpg", "train/10.png")]


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
    with pytest.raises(ValueError, match=r"want uint8 \(32, 32, 3\), got float64"):
        perceptual_hash(np.zeros((32, 32, 3)))


def test_pictures_of_a_mixture_are_those_of_its_parts(tmp_path):
    for name, at in (("a", 0), ("b", 10)):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", picture(at + i, 32))
    parts = [config.FolderSource(path=str(tmp_path / name), eval_share=0.0) for name in "ab"]
    mixture = config.MixtureSource(parts=(*parts, config.ScenesSource()), weights=(1, 1, 1))
    rows = Pictures([open_source(mixture, "train", languages=())])
    assert len(rows) == 6 and [rows.name(i) for i in range(6)] == ["0.png", "1.png", "2.png"] * 2
    want = [np.asarray(picture(i, 32)) for i in (0, 1, 2, 10, 11, 12)]
    got = [np.asarray(Image.open(io.BytesIO(rows.stored(i)))) for i in range(6)]
    np.testing.assert_array_equal(got, want)
    whole = find_duplicates(rows, rows)
    assert whole == [Duplicate(i, i, True, 0, 0.0) for i in range(6)]
    assert len(Pictures([open_source(config.ScenesSource(), "train")])) == 0
