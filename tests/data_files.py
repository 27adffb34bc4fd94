"""Files of small data sets that tests write, and what tests read from them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from dalle_jax import config
from dalle_jax.data.codes import CodesInfo, ShardWriter, describe_codes_source, open_codes_dir
from dalle_jax.data.loader.pipeline import train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.text.tokenizers import TextTokenizer, train_text_tokenizer

NUM_ROWS, IMAGE_SIZE, CODES_SIDE = 37, 16, 4


def encode_image(image, kind="PNG", **options):
    """Return a Pillow image as the bytes of a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def solid_image(color=(220, 30, 40), size=(20, 20)):
    return Image.new("RGB", size, color)


def png_with_large_text():
    """Return a PNG with a compressed comment of 3 MB, more than Pillow reads."""
    comment = PngImagePlugin.PngInfo()
    comment.add_text("a", "x" * 3_000_000, zip=True)
    return encode_image(solid_image(), pnginfo=comment)


def add_member(tar, name, data, **fields):
    """Add a file to a tar; fields: of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def write_records(path, records):
    """Write a tar of records: name -> (bytes of an image or None, a JSON value, bytes or None)."""
    with tarfile.open(path, "w") as tar:
        for name, (image, fields) in records.items():
            if image is not None:
                add_member(tar, f"{name}.png", image)
            if fields is not None:
                data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
                add_member(tar, f"{name}.json", data)
    return str(path)


def write_numbered_tar(path, rows=NUM_ROWS, broken=()):
    """Write a tar whose row i has red = i everywhere and captions with the number i.

    Images are wider than high, so that crops differ. The last 5 rows are the split "val". The images of the rows
    `broken` are cut short.
    """
    rng = np.random.default_rng(0)
    records = {}
    for i in range(rows):
        image = rng.integers(0, 256, (24, 40, 3), np.uint8)
        image[..., 0] = i
        data = encode_image(Image.fromarray(image))[: 200 if i in broken else None]
        captions = {"captions": [f"row {i}", f"image of {i}"], "captions_zh": [f"第{i}行", f"图{i}"]}
        records[str(i)] = data, captions | {"split": "train" if i < rows - 5 else "val"}
    return config.TarSource(path=write_records(path, records), max_bad_fraction=0.2)


def train_tokenizer(path):
    """Train a vocabulary on the captions of `write_numbered_tar`."""
    captions = [f"{word} {i}" for word in ("row", "image of") for i in range(NUM_ROWS)]
    train_text_tokenizer(captions + [f"第{i}行 图" for i in range(NUM_ROWS)], path, vocab=400)
    return TextTokenizer.load(path)


def take_batches(data, source, tokenizer, n, *, start=0, image_size=IMAGE_SIZE, **options):
    """Return the first n training batches; tokenizer: None leaves captions out."""
    text = dict(text=tokenizer, text_vocab=400, text_len=12, bpe_dropout=0.3) if tokenizer else {}
    with train_batches(data, source, start=start, image_size=image_size, **text, **options) as batches:
        return [next(batches) for _ in range(n)]


def assert_same_batches(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# --- codes ------------------------------------------------------------------------------------------------


def data_config(source, codes=None, **fields):
    return config.DataConfig(
        source=source, batch_size=8, codes=None if codes is None else str(codes), **fields
    )


def codes_info(source, data, rows=None, **changes):
    values = dict(
        rows=len(source) if rows is None else rows, shard_rows=7, num_codes=CODES_SIDE**2, vocab=256,
        image_size=CODES_SIDE, crop="center", tokenizer="abc", languages=data.languages,
        classes=tuple(source.classes), source=describe_codes_source(data.source), fingerprint=source.fingerprint(),
    )  # fmt: skip
    return CodesInfo(**(values | changes))


def write_shard(directory, info, k, source):
    """Write shard k with the red channel of each image as its codes."""
    with ShardWriter(directory, info, k) as writer:
        for i in info.shard(k):
            red = source.image(i, info.image_size, "center")[..., 0].reshape(-1)[: info.num_codes]
            writer.add(red.astype(np.int32), source.captions(i), source.label(i))


def write_codes(directory, data, rows=None, **changes):
    """Write a directory of codes of the training split of `data`; return its description."""
    source = open_source(data.source, "train", languages=data.languages)
    info = codes_info(source, data, rows, **changes)
    open_codes_dir(Path(directory), info)
    for k in range(info.shards):
        write_shard(directory, info, k, source)
    return info
