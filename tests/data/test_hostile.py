"""A folder of images as downloaded from the internet. Unusable images and captions are counted by cause and stop
nothing; unusual images are read."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from data_files import encode_image, png_with_large_text, solid_image
from PIL import Image

from dalle_jax import config
from dalle_jax.data.sources import open_source

GOOD = 60


def noise(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def png_with_size(width, height):
    """Return a PNG whose header has another size than its data."""
    data = encode_image(solid_image())
    chunk = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def flip_byte(data, at):
    damaged = bytearray(data)
    damaged[at] ^= 0xFF
    return bytes(damaged)


def broken_images() -> dict[str, tuple[bytes, str]]:
    """Return name -> (contents of an unusable image file, the cause to report)."""
    jpeg, png, smooth = (
        encode_image(noise(), "JPEG"),
        encode_image(noise()),
        encode_image(Image.linear_gradient("L")),
    )
    return {
        "zero-bytes.jpg": (b"", "empty image file"),
        "one-byte.jpg": (b"\xff", "not an image"),
        "text.png": (b"hello, I am an image", "not an image"),
        "error-page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "document.png": (b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n", "not an image"),
        "archive.png": (b"PK\x03\x04" + bytes(60), "not an image"),
        "zeros.bmp": (bytes(4096), "not an image"),
        "start-only.jpg": (jpeg[:2], "not an image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated image"),
        "half.png": (png[: len(png) // 2], "truncated image"),
        "half.webp": (encode_image(noise(), "WEBP")[:2000], "corrupt image"),
        "half.gif": (encode_image(noise().quantize(64), "GIF")[:1500], "truncated image"),
        "flipped.png": (flip_byte(smooth, len(smooth) // 2), "truncated image"),
        "header-81-million.png": (png_with_size(9000, 9000), "too many pixels"),
        "header-4-billion.png": (png_with_size(2**16, 2**16), "too many pixels"),
        "100-million.png": (encode_image(Image.new("1", (10_000, 10_000))), "too many pixels"),
        "compressed-notes.png": (png_with_large_text(), "corrupt image"),
        "no-width.png": (png_with_size(0, 20), "not an image"),
        "pixel.gif": (encode_image(solid_image(size=(1, 1)), "GIF"), "image too small"),
        "thin.png": (encode_image(solid_image(size=(40, 7))), "image too small"),
        "banner.png": (encode_image(solid_image(size=(400, 20))), "aspect ratio too large"),
    }


def broken_captions() -> dict[str, tuple[str, bytes, str]]:
    """Return name -> (extension, contents of an unusable caption file, the cause to report)."""
    return {
        "latin1": (".txt", "caf\xe9".encode("latin-1"), "unreadable caption file"),
        "utf16": (".txt", "a cat".encode("utf-16"), "unreadable caption file"),
        "huge": (".txt", b"word " * 20_000, "unreadable caption file"),
        "binary": (".txt", bytes(range(128, 256)), "unreadable caption file"),
        "half-json": (".json", b'{"caption": "a', "unreadable caption file"),
        "list": (".json", b'["a cat"]', "unreadable caption file"),
        "deep": (".json", b"[" * 60_000, "unreadable caption file"),
        "no-bytes": (".txt", b"", "no caption in en or zh"),
        "spaces": (".txt", b" \n\t\n \r\n", "no caption in en or zh"),
        "null": (".json", b'{"caption": null}', "no caption in en or zh"),
        "number": (".json", b'{"caption": 7, "captions_zh": [1, {}]}', "no caption in en or zh"),
        "silent": (".json", b'{"captions": ["", "  "]}', "no caption in en or zh"),
        "other-field": (".json", b'{"title": "a cat"}', "no caption in en or zh"),
    }


def unusual_images() -> dict[str, bytes]:
    """Return name -> contents of an unusual image that must be read. Each has one color."""
    exif = Image.Exif()
    exif[0x0112] = 6
    gray16 = Image.fromarray(np.full((20, 20), 40_000, np.uint16))
    red = solid_image(size=(30, 20))
    return {
        "cmyk.jpg": encode_image(red.convert("CMYK"), "JPEG"), "gray.jpg": encode_image(red.convert("L"), "JPEG"),
        "16-bit.png": encode_image(gray16), "palette.png": encode_image(red.quantize(4)),
        "alpha.png": encode_image(Image.new("RGBA", (20, 20), (9, 9, 9, 0))),
        "moving.gif": encode_image(red, "GIF", save_all=True, append_images=[solid_image("blue", (30, 20))]),
        "turned.jpg": encode_image(red, "JPEG", exif=exif.tobytes()),
        "bad-exif.jpg": encode_image(red, "JPEG", exif=b"Exif\0\0garbage"),
        "one-bit.png": encode_image(Image.new("1", (20, 20), 1)), "wrong-ending.png": encode_image(red, "JPEG"),
        "UPPER.JPG": encode_image(red, "JPEG"), "\u732b \U0001f431.png": encode_image(red),
        "trailing.jpg": encode_image(red, "JPEG") + b"rubbish", "least.png": encode_image(solid_image(size=(8, 128))),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    root.mkdir()
    for i in range(GOOD):
        (root / f"good-{i:03d}.png").write_bytes(encode_image(solid_image((i, 100, 200))))
        (root / f"good-{i:03d}.txt").write_text(f"good {i}")
    for name, data in unusual_images().items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text(name)
    for name, (data, _) in broken_images().items():
        (root / name).write_bytes(data)
        (root / f"{name.rpartition('.')[0]}.txt").write_text("caption")
    for name, (kind, data, _) in broken_captions().items():
        (root / f"{name}.png").write_bytes(encode_image(solid_image()))
        (root / f"{name}{kind}").write_bytes(data)
    (root / "alone.png").write_bytes(encode_image(solid_image()))  # without a caption file
    (root / "missing.png").symlink_to(root / "nothing")
    (root / "round.png").symlink_to(root / "round.png")
    (root / "directory.png").mkdir()  # a subfolder with the name of an image
    os.mkfifo(root / "pipe.png")  # opening it would block
    return root


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # Pillow warns before the size is checked
def test_unusable_files_are_counted_by_cause_and_all_others_read(folder, tmp_path):
    bad = [cause for _, cause in broken_images().values()] + [
        cause for *_, cause in broken_captions().values()
    ]
    bad += ["no caption in en or zh"] + 3 * ["missing image file"]
    assert len(bad) >= 25 + 10
    rows = open_source(
        config.FolderSource(path=str(folder), eval_fraction=0.0, max_bad_fraction=0.9), "train"
    )
    rows.log_to(tmp_path / "bad_records.jsonl")
    assert len(rows) == GOOD + len(unusual_images()) + len(
        broken_images()
    )  # broken images are detected when they are read
    for i in range(len(rows)):
        image = rows.image(i, 8, "center")
        caption = rows.captions(i)["en"][0]
        if caption.startswith("good"):
            assert (image == (int(caption.split()[1]), 100, 200)).all(), caption
    got = rows.report()
    assert got == {cause: bad.count(cause) for cause in bad}
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    causes = {line["name"]: line["cause"] for line in listed}
    assert len(listed) == len(causes) == len(bad)
    assert {name: causes[name] for name in broken_images()} == {n: c for n, (_, c) in broken_images().items()}
    assert {name: causes[f"{name}.png"] for name in broken_captions()} == {
        n: c for n, (*_, c) in broken_captions().items()
    }
    assert not set(unusual_images()) & set(causes)


def test_unusable_lines_of_metadata_are_counted_by_cause(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(encode_image(solid_image()))
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"n {i}"}).encode() for i in range(15)]
    kinds = [
        (b"{", "unreadable metadata line"), (b"\xff\xfe", "unreadable metadata line"), (b"[]",
        "unreadable metadata line"),
        (b'{"file_name": "15.png", "text": "\xe9"}', "unreadable metadata line"),
        (b'{"text": "whose"}', "metadata line without a file name"),
        (b'{"file_name": 3, "text": "x"}', "metadata line without a file name"),
        (b'{"file_name": "gone.png", "text": "x"}', "missing image file"),
        (b'{"file_name": "0.png", "text": "again"}', "image listed twice"),
        (b'{"file_name": "../x.png", "text": "x"}', "image outside the folder"),
        (b'{"file_name": "/etc/hostname", "text": "x"}', "image outside the folder"),
        (b'{"file_name": "16.png"}', "no caption in en or zh"),
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([*lines, *(line for line, _ in kinds)]))
    rows = open_source(
        config.FolderSource(path=str(tmp_path), eval_fraction=0.0, max_bad_fraction=0.9), "train"
    )
    want = [cause for _, cause in kinds] + 4 * ["no metadata line"]  # 15, 17, 18, 19
    assert len(rows) == 15 and rows.report() == {cause: want.count(cause) for cause in want}


def test_limits_of_the_configuration_apply(tmp_path):
    for side in (4, 8, 30, 500):
        (tmp_path / f"{side:03d}.png").write_bytes(encode_image(solid_image(size=(side, 8))))

    def read_with(**limits):
        source = config.FolderSource(path=str(tmp_path), eval_fraction=0.0, max_bad_fraction=1.0, **limits)
        rows = open_source(source, "train", languages=())
        for i in range(4):
            rows.image(i, 8, "center")
        return rows.report(), rows.replacements

    assert read_with(min_image_size=1, max_aspect_ratio=1000) == ({}, {})
    assert read_with(min_image_size=1) == ({"aspect ratio too large": 1}, {3: 0})
    assert read_with(min_image_size=8, max_aspect_ratio=2) == (
        {"aspect ratio too large": 2, "image too small": 1},
        {0: 1, 2: 1, 3: 1},
    )
    with pytest.raises(ValueError, match=r"min_image_size of at least 1, got 0"):
        config.TarSource(path="x", min_image_size=0)
    with pytest.raises(ValueError, match=r"max_aspect_ratio of at least 1, got 0\.5"):
        config.TarSource(path="x", max_aspect_ratio=0.5)
    rows = open_source(
        config.FolderSource(path=str(tmp_path), eval_fraction=0.0, min_image_size=9), "train", languages=()
    )
    with pytest.raises(ValueError, match=r"(?s)max_bad_fraction.*image too small"):
        rows.image(0, 8, "center")
