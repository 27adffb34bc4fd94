"""Tests of image decoding and of sources: files become square images and rows, or errors that name the cause."""

import json
import pickle
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_files import add_member, encode_image, png_with_large_text, solid_image, write_records
from PIL import Image

from dalle_jax import config
from dalle_jax.data.images import (
    BadImageError,
    crop_and_resize,
    decode_image,
    encode_png,
    image_grid,
    load_image,
    save_png,
)
from dalle_jax.data.sources import open_source
from dalle_jax.data.sources.captions import iter_captions

RED = (220, 30, 40)


def good_records(n, split="train", first=0):
    return {
        f"{split}{i:03d}": (
            encode_image(solid_image((i * 5, 100, 200))),
            {"captions": [f"image {i}", f"number {i}"], "captions_zh": [f"第{i}张"], "split": split},
        )
        for i in range(first, first + n)
    }


# --- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "1"),
        ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGB"), ("GIF", "P"),
        ("BMP", "RGB"), ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "I;16B"), ("TIFF", "CMYK"), ("PPM", "RGB"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(kind, mode):
    if mode.startswith("I"):
        gray_HW = np.full(
            (20, 20), 128 * 257, ">u2" if mode == "I;16B" else np.uint16 if "16" in mode else np.int32
        )
        image, want = Image.fromarray(gray_HW), 128
        assert image.mode == mode
    elif mode == "F":
        image, want = Image.fromarray(np.full((20, 20), 0.5, np.float32)), 128
    else:
        is_gray = mode in ("L", "LA")
        image, want = (
            solid_image((128, 128, 128) if is_gray else RED).convert(mode),
            (128 if is_gray else RED),
        )
        if mode == "P":
            image = solid_image().quantize(4)
        if mode == "1":
            image, want = solid_image("white").convert("1"), 255
    got = decode_image(encode_image(image, kind), 8)
    assert got.shape == (8, 8, 3) and got.dtype == np.uint8 and got.flags.writeable
    np.testing.assert_allclose(got.astype(int), np.broadcast_to(want, (8, 8, 3)), atol=3)


def test_transparency_becomes_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 0)
    assert (decode_image(encode_image(image), 8)[:, 4:] == 255).all()
    assert (decode_image(encode_image(image), 8)[:, :4] == (0, 0, 200)).all()
    assert (abs(decode_image(encode_image(half), 8).astype(int) - 127) <= 1).all()
    assert (decode_image(encode_image(palette, transparency=0), 8) == 255).all()
    assert (decode_image(encode_image(solid_image("black"), transparency=(0, 0, 0)), 8) == 255).all()


def test_an_animation_gives_its_first_frame():
    frames = [solid_image(c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode_image(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(data, 8) == (255, 0, 0)).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4], upright[:4, 4:], upright[4:, :4] = 250, 150, 80
    undo = {2: 0, 3: 1, 4: 3, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    image = Image.fromarray(upright)
    if orientation > 1:
        ways = {0: "FLIP_LEFT_RIGHT", 1: "ROTATE_180", 2: "ROTATE_90", 3: "FLIP_TOP_BOTTOM", 4: "ROTATE_270"}
        ways |= {5: "TRANSPOSE", 6: "TRANSVERSE"}
        image = image.transpose(Image.Transpose[ways[undo[orientation]]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode_image(image, exif=exif.tobytes()), 8), upright)


def test_broken_exif_is_ignored():
    assert (
        abs(decode_image(encode_image(solid_image(), "JPEG", exif=b"Exif\0\0garbage"), 8).astype(int) - RED)
        < 4
    ).all()


def test_crops():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste(RED, (30, 0, 60, 30))
    data = encode_image(wide)
    assert (decode_image(data, 30, crop="center") == RED).all()
    squashed = decode_image(data, 30, crop="none")
    assert (
        (squashed[:, :8] == 255).all()
        and (squashed[:, 13:17] == RED).all()
        and (squashed[:, 22:] == 255).all()
    )
    crops = [decode_image(data, 30, crop="random", rng=np.random.default_rng(seed)) for seed in range(20)]
    assert len({c.tobytes() for c in crops}) > 5
    again = decode_image(data, 30, crop="random", rng=np.random.default_rng(3))
    np.testing.assert_array_equal(again, crops[3])
    with pytest.raises(ValueError, match="rng"):
        decode_image(data, 30, crop="random")


def test_random_crops_follow_the_paper():
    """2102.12092, A.2 and B.1: offset of the square, and side of the image over side of the crop."""
    wide = np.zeros((320, 960, 3), np.uint8)
    wide[:, :, 0] = np.linspace(0, 255, 960).round()[None]  # the value encodes the column
    for crop, left_min, left_max, zooms in (
        ("random", 0, 640, (9 / 8, 12 / 8)),
        ("narrow", 240, 400, (1.0, 9 / 8)),
    ):
        left, right = [], []
        for seed in range(300):
            got = (
                crop_and_resize(wide, 64, crop=crop, rng=np.random.default_rng(seed))[32, :, 0].astype(float)
                * 959
                / 255
            )
            left.append(got[0])
            right.append(got[-1])
        widths = (np.array(right) - left) * 64 / 63  # columns that the crop spans
        zoom = 320 / widths
        assert (
            zooms[0] - 0.05 < zoom.min() < zooms[0] + 0.04 and zooms[1] - 0.06 < zoom.max() < zooms[1] + 0.06
        )
        slack = 320 * (1 - 1 / zooms[1]) + 8
        assert (
            left_min - 8 <= min(left) < left_min + 40
            and left_max + 320 - 60 - slack < max(right) <= left_max + 320 + 8
        )
    with pytest.raises(ValueError, match="as rng for crop='narrow', got None"):
        crop_and_resize(wide, 64, crop="narrow")


@pytest.mark.parametrize(("kind", "side"), [("JPEG", 700), ("PNG", 333), ("WEBP", 16), ("JPEG", 1)])
@pytest.mark.parametrize("crop", ["none", "center", "random", "narrow"])
def test_every_size_becomes_square(kind, side, crop):
    data = encode_image(solid_image(size=(side, side * 2)), kind)
    got = decode_image(data, 32, crop=crop, rng=np.random.default_rng(0))
    assert got.shape == (32, 32, 3) and (abs(got.astype(int) - RED) < 6).all()


def test_downscaling_averages():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    data = encode_image(Image.fromarray(checks.astype(np.uint8)))
    assert (abs(decode_image(data, 8).astype(int) - 128) < 8).all()


def png_with_large_header():
    data = bytearray(encode_image(solid_image()))
    data[16:24] = (9000).to_bytes(4) * 2
    head, rest = bytes(data[:12]), bytes(data[12:29])
    return head + rest + zlib.crc32(rest).to_bytes(4) + bytes(data[33:])


def test_unusable_images_name_the_cause():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    for data, cause in [
        (b"", "empty image file"),
        (b"GIF? no.", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg/>", "not an image"),
        (encode_image(noise, "JPEG")[:900], "truncated image"),
        (encode_image(noise)[:900], "truncated image"),
        (png_with_large_text(), "corrupt image"),
        (png_with_large_header(), "too many pixels"),
    ]:
        with pytest.raises(BadImageError) as error:
            decode_image(data, 8)
        assert error.value.cause == cause, (cause, str(error.value))
    assert pickle.loads(pickle.dumps(error.value)).cause == "too many pixels"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of odd tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_images_raise_no_other_error(kind):
    rng = np.random.default_rng(1)
    data = encode_image(Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)), kind)
    for _ in range(150):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for at in rng.integers(0, len(damaged), rng.integers(0, 6)):
            damaged[at] = rng.integers(256)
        try:
            assert decode_image(bytes(damaged), 8).shape == (8, 8, 3)
        except BadImageError as error:
            assert error.cause in ("not an image", "truncated image", "corrupt image", "too many pixels")


@pytest.mark.slow
def test_memory_of_large_images_does_not_grow_with_the_threads(tmp_path):
    """Six images of 60 million pixels, of 180 MB each, take at most one image more at once than one after another."""
    code = """
import io, resource, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from dalle_jax.data.images import BadImageError, decode_image
out = io.BytesIO(); Image.new("RGB", (10_000, 6_000), "red").save(out, "PNG"); data = out.getvalue()
big = io.BytesIO(); Image.new("1", (10_000, 10_000)).save(big, "PNG")  # 100 million: rejected by its header
try: decode_image(big.getvalue(), 64)
except BadImageError as error: assert error.cause == "too many pixels"
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for _ in range(2): decode_image(data, 64)
print(peak())
with ThreadPoolExecutor(6) as pool: list(pool.map(lambda _: decode_image(data, 64), range(6)))
print(peak())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    one, six = map(int, out.split())
    assert six - one < 180, f"{one} MiB one after another, {six} MiB at once"


def test_load_image_names_the_path(tmp_path):
    save_png(tmp_path / "made" / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert (load_image(tmp_path / "made" / "a.png", 4) == 0).all()
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["a.png"]
    (tmp_path / "b.png").write_bytes(b"no")
    with pytest.raises(BadImageError, match=r"b\.png: Expected an image"):
        load_image(tmp_path / "b.png", 4)
    with pytest.raises(BadImageError, match=r"c\.png: No such file"):
        load_image(tmp_path / "c.png", 4)


def test_png_round_trip_and_grid():
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(encode_png(images_NHWC[0]), 16), images_NHWC[0])
    bare = np.asarray(image_grid(images_NHWC, 3))
    assert bare.shape == (4 + 2 * 20, 4 + 3 * 20, 3)
    np.testing.assert_array_equal(bare[24:40, 24:40], images_NHWC[4])
    labels = ["a red square", "", "红色的方块和 blue", "many words " * 30, "x" * 300 + "\n\x00\ud800 é 😀"]
    image = image_grid(images_NHWC, 3, labels, scale=2)
    assert image.width == 4 + 3 * 132 and image.height > 2 * 36
    assert np.asarray(image)[40:56, 4:132].min() < 128  # the label of the first image
    with pytest.raises(ValueError, match="one label for each of 5 images, got 2"):
        image_grid(images_NHWC, 3, ["a", "b"])
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\), got float32"):
        image_grid(images_NHWC.astype(np.float32), 3)
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        encode_png(images_NHWC)


# --- tars -----------------------------------------------------------------------------------------------


def test_tar_rows(tmp_path):
    path = write_records(tmp_path / "a.tar", good_records(6) | good_records(2, "val", 20))
    rows = open_source(config.TarSource(path=path), "train")
    assert len(rows) == 6 and rows.report() == {} and rows.replacements == {}
    assert rows.captions(2) == {"en": ("image 2", "number 2"), "zh": ("第2张",)}
    assert (rows.image(2, 8, "center") == (10, 100, 200)).all()
    held_out = open_source(config.TarSource(path=path), "eval", languages=("zh",))
    assert [held_out.captions(i) for i in range(len(held_out))] == [{"zh": ("第20张",)}, {"zh": ("第21张",)}]
    with pytest.raises(IndexError):
        rows.image(6, 8, "center")


def test_several_tars_and_globs(tmp_path):
    write_records(tmp_path / "b1.tar", good_records(2, first=10))
    write_records(tmp_path / "b0.tar", good_records(2, first=20))
    a = write_records(tmp_path / "a.tar", good_records(1))
    rows = open_source(config.TarSource(path=f"{tmp_path}/b*.tar, {a},{a}"), "train")
    assert [rows.captions(i)["en"][0] for i in range(len(rows))] == [
        f"image {i}" for i in (20, 21, 10, 11, 0)
    ]
    assert rows.image(4, 8, "center")[0, 0, 0] == 0 and rows.image(0, 8, "center")[0, 0, 0] == 100


def test_other_field_names_and_single_captions(tmp_path):
    image = encode_image(solid_image())
    records = {
        "a": (image, {"caption": " one "}),
        "b": (image, {"text": "two", "captions": ["no"]}),
        "c": (image, {"text": ["", None, 3, "three"], "cn": "三", "split": "train"}),
    }
    path = write_records(tmp_path / "a.tar", records)
    rows = open_source(config.TarSource(path=path, captions_field="text", captions_zh_field="cn"), "train")
    assert [rows.captions(i) for i in range(3)] == [
        {"en": ("one",)},
        {"en": ("two",)},
        {"en": ("three",), "zh": ("三",)},
    ]


def test_unusable_records_are_counted_by_cause(tmp_path):
    image = encode_image(solid_image())
    records = good_records(100) | {
        "no-json": (image, None),
        "no-image": (None, {"captions": ["a"]}),
        "broken": (image, b"{"),
        "list": (image, [1]),
        "deep": (image, b"[" * 100_000),
        "not-utf8": (image, b'{"captions": ["\xff"]}'),
        "silent": (image, {"captions": ["", 3], "captions_zh": []}),
        "empty": (b"", {"captions": ["a"]}),
        "odd-split": (image, {"captions": ["a"], "split": 7}),
        "elsewhere": (None, {"captions": ["a"], "split": "val"}),
    }
    path = write_records(tmp_path / "a.tar", records)
    want = {
        "no caption file": 1,
        "no image": 1,
        "invalid JSON": 4,
        "no caption in en or zh": 1,
        "empty image file": 1,
    }
    rows = open_source(config.TarSource(path=path, max_bad_fraction=0.1), "train")
    assert len(rows) == 100 and rows.report() == want | {"split is not a string": 1}
    with pytest.raises(
        ValueError, match=r"(?s)9 of 109 records of .*max_bad_fraction.*4  invalid JSON\n.*1  no caption file"
    ):
        open_source(config.TarSource(path=path), "train")


def test_images_without_captions_are_rows_without_languages(tmp_path):
    path = write_records(tmp_path / "a.tar", {f"{i}": (encode_image(solid_image()), None) for i in range(3)})
    rows = open_source(config.TarSource(path=path), "train", languages=())
    assert len(rows) == 3 and rows.captions(1) == {} and rows.image(1, 4, "none").shape == (4, 4, 3)


def test_broken_images_are_replaced_by_the_next_row(tmp_path):
    records = good_records(40)
    for i in (3, 4, 39):
        name = f"train{i:03d}"
        records[name] = (records[name][0][:-30], records[name][1])
    path = write_records(tmp_path / "a.tar", records)
    rows = open_source(config.TarSource(path=path, max_bad_fraction=0.1), "train")
    replacement = {3: 5, 4: 5, 39: 0}

    def read(i):
        return rows.image(i, 8, "center")[0, 0, 0] // 5, rows.captions(i)["en"][0]

    order = np.random.default_rng(0).permutation(40).repeat(3).tolist()
    with ThreadPoolExecutor(4) as pool:
        for i, got in zip(order, pool.map(read, order), strict=True):
            expected = replacement.get(i, i)
            assert got == (expected, f"image {expected}")
    assert rows.replacements == replacement and rows.report() == {"truncated image": 3}
    strict = open_source(config.TarSource(path=path, max_bad_fraction=0.05), "train")
    with pytest.raises(ValueError, match=r"(?s)3 of 40 records.*3  truncated image"):
        [strict.image(i, 8, "center") for i in range(40)]


def test_a_tar_without_a_usable_image_is_an_error(tmp_path):
    path = write_records(tmp_path / "a.tar", {f"{i}": (b"no", {"caption": "a"}) for i in range(3)})
    rows = open_source(config.TarSource(path=path, max_bad_fraction=1.0), "train")
    with pytest.raises(ValueError, match=r"(?s)No image of .* can be used.*3  not an image"):
        rows.image(0, 8, "center")


def test_hostile_members(tmp_path):
    image, metadata = encode_image(solid_image()), json.dumps({"caption": "a"}).encode()
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("../../escape", "/root", "dir/ü-" + "long" * 60, "same", "same"):
            add_member(tar, f"{name}.PNG", image)
            add_member(tar, f"{name}.json", metadata)
        add_member(tar, "dir", b"", type=tarfile.DIRTYPE)
        add_member(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")
        add_member(tar, "link.json", metadata)
        add_member(tar, "._same.png", b"macOS")
        add_member(tar, "README.txt", b"hello")
        add_member(tar, "two.png", image)
        add_member(tar, "two.webp", encode_image(solid_image("blue"), "WEBP", lossless=True))
        add_member(tar, "two.json", metadata)
    rows = open_source(config.TarSource(path=str(path), max_bad_fraction=0.5), "train")
    assert len(rows) == 5 and rows.report() == {"no image": 1}  # the link
    assert (rows.image(4, 8, "center") == (0, 0, 255)).all()  # webp replaces png
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_invalid_paths_and_files_are_rejected(tmp_path):
    def open_tar(path, split="train"):
        return open_source(config.TarSource(path=str(path)), split)

    good = write_records(tmp_path / "good.tar", good_records(20))
    data = (tmp_path / "good.tar").read_bytes()
    with pytest.raises(ValueError, match=r"path is empty"):
        open_tar("")
    with pytest.raises(FileNotFoundError, match=r"gone\.tar' does not exist"):
        open_tar(tmp_path / "gone.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*x\*\.tar"):
        open_tar(tmp_path / "x*.tar")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_tar(tmp_path)
    for name, content, message in [
        ("empty.tar", b"", "not a tar"),
        ("text.tar", b"hello " * 500, "not a tar"),
        ("gzip.tar", b"\x1f\x8b\x08" + bytes(600), "not a tar"),
        ("short-in-data.tar", data[:900], "cut short"),
        ("short-in-header.tar", data[: 512 * 4 + 100], "cut short"),
        ("no-end.tar", data[: 512 * 8], "cut short"),
        ("damaged.tar", data[: 512 * 4] + b"\xff" * 512 + data[512 * 5 :], "damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_tar(tmp_path / name)
    with pytest.raises(ValueError, match=r"rows of split 'val'.*'train' \(20\).*data\.source\.eval_split"):
        open_tar(good, "eval")
    with pytest.raises(ValueError, match=r"rows of split 'train'.*no records"):
        open_tar(write_records(tmp_path / "void.tar", {}))
    with pytest.raises(ValueError, match="Expected split 'train' or 'eval'"):
        open_tar(good, "test")


def test_the_fingerprint_depends_on_the_rows(tmp_path):
    def fingerprint_of(records, split="train", name="a.tar"):
        return open_source(
            config.TarSource(path=write_records(tmp_path / name, records)), split
        ).fingerprint()

    first = fingerprint_of(good_records(3))
    assert fingerprint_of(good_records(3), name="moved.tar") == first
    assert fingerprint_of(good_records(4)) != first
    assert fingerprint_of(good_records(3, first=1)) != first


# --- scenes ---------------------------------------------------------------------------------------------


def test_scene_rows():
    rows = open_source(config.ScenesSource(count=50), "train")
    assert len(rows) == 50 and rows.image(3, 32, "random").shape == (32, 32, 3)
    captions = rows.captions(3)
    assert set(captions) == {"en", "zh"} and all(
        len(texts) >= 1 and all(texts) for texts in captions.values()
    )
    assert set(open_source(config.ScenesSource(), "train", languages=("zh",)).captions(0)) == {"zh"}
    held_out = open_source(config.ScenesSource(count=50), "eval")
    assert any((held_out.image(i, 32, "none") != rows.image(i, 32, "none")).any() for i in range(3))
    other = open_source(config.ScenesSource(count=60, seed=1), "train")
    assert other.fingerprint() != rows.fingerprint()
    assert open_source(config.ScenesSource(count=60), "train").fingerprint() == rows.fingerprint()


def test_sampled_captions():
    rows = open_source(config.ScenesSource(count=50), "train")
    assert len(list(iter_captions(rows, 20))) == 20
    assert len(list(iter_captions(rows, 10_000))) == sum(
        len(texts) for i in range(50) for texts in rows.captions(i).values()
    )


def test_a_webdataset_tar(tmp_path):
    """Captions in text files, metadata in JSON files; captions of the JSON take precedence."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, files in {
            "0": {"jpg": encode_image(solid_image(), "JPEG"), "txt": b"one cat\n\n two cats \n"},
            "1": {
                "png": encode_image(solid_image()),
                "txt": b"text",
                "json": b'{"caption": "of the JSON", "split": "train"}',
            },
            "2": {"png": encode_image(solid_image()), "txt": "ein Käfer".encode(), "json": b'{"width": 20}'},
            "3": {"png": encode_image(solid_image()), "txt": b"\xff\xfe"},
            "4": {"png": encode_image(solid_image()), "txt": b" \n"},
            "5": {"png": encode_image(solid_image())},
            "6": {"txt": b"a text alone is no record"},
            "7": {"png": encode_image(solid_image()), "txt": b"held out", "json": b'{"split": "val"}'},
        }.items():
            for kind, data in files.items():
                add_member(tar, f"{name}.{kind}", data)
    source = config.TarSource(path=str(tmp_path / "a.tar"), max_bad_fraction=0.9)
    rows = open_source(source, "train")
    captions = [rows.captions(i) for i in range(len(rows))]
    assert captions == [{"en": ("one cat", "two cats")}, {"en": ("of the JSON",)}, {"en": ("ein Käfer",)}]
    assert rows.report() == {"unreadable caption file": 1, "no caption in en or zh": 1, "no caption file": 1}
    assert open_source(source, "eval").captions(0) == {"en": ("held out",)}
    assert len(open_source(source, "train", languages=())) == 6
