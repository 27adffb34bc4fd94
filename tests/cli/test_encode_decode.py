"""`dalle-jax encode` and `dalle-jax decode` on a tiny tokenizer: results and invalid input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import GRID, SIZE, VOCAB, json_of, refused, run, tiny_dalle
from PIL import Image

from dalle_jax.checkpoint.load import load_run
from dalle_jax.config import (
    DataConfig,
    FolderSource,
)
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.loader.pipeline import open_train_source
from dalle_jax.data.sources import open_source
from dalle_jax.models import dvae
from dalle_jax.pipelines import TokenizerPipeline, load
from dalle_jax.train.tasks import make_task

pytestmark = pytest.mark.usefixtures("small_batches")

ENCODE, DECODE = (jax.jit(f, static_argnums=0) for f in (dvae.encode, dvae.decode))


# --- encode and decode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dvae", "dalle"])
def test_encode_and_decode_equal_the_functions_of_the_tokenizer(made, image_files, tmp_path, stage):
    model = load(made.dvae, TokenizerPipeline)
    true = np.stack([np.asarray(Image.open(p)) for p in image_files])
    result = json_of("encode", made.out / stage, *image_files, "--out", tmp_path / "codes.npz")
    assert (result["rows"], result["codes_per_image"]) == (3, GRID * GRID)
    with np.load(tmp_path / "codes.npz") as file:
        codes, names = file["codes"], file["names"].tolist()
    assert names == [str(p) for p in image_files] and codes.dtype == np.int32
    want = ENCODE(model.config, model.run.params, jnp.asarray(true / np.float32(255)))
    np.testing.assert_array_equal(codes, want)

    json_of("decode", made.out / stage, tmp_path / "codes.npz", "--out", tmp_path / "images.npz")
    back = np.load(tmp_path / "images.npz")["images"]
    assert (
        back.dtype == np.float32 and back.shape == (3, SIZE, SIZE, 3) and 0 <= back.min() <= back.max() <= 1
    )
    np.testing.assert_allclose(back, DECODE(model.config, model.run.params, want), atol=1e-6)

    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "mine.txt").write_text("unchanged")
    json_of("decode", made.out / stage, tmp_path / "codes.npz", "--out", tmp_path / "dir")
    assert sorted(p.name for p in (tmp_path / "dir").iterdir()) == [
        "00000.png", "00001.png", "00002.png", "mine.txt",
    ]  # fmt: skip
    np.testing.assert_allclose(
        np.asarray(Image.open(tmp_path / "dir" / "00001.png")) / 255, back[1], atol=0.51 / 255
    )


@pytest.mark.parametrize("rows", [None, 10])
def test_training_reads_the_encoded_codes(made, tmp_path, rows):
    out = tmp_path / "codes"
    flags = () if rows is None else ("--rows", rows)
    again = (
        "encode",
        made.dvae,
        "--data",
        made.dalle,
        *flags,
        "--shard-rows",
        16,
        "--out",
        out,
        "--eval-rows",
        16,
    )
    results = [json_of(*again, "--process", p, "--processes", 2) for p in (1, 0)] + [json_of(*again)]
    shards = 1 if rows else 3
    assert [r["made"] for r in results] == [shards // 2, shards - shards // 2, 0]
    assert [r["missing"] for r in results] == [shards - shards // 2, 0, 0]
    coded, model = CodesDataset(out), load(made.dvae, TokenizerPipeline)
    assert (len(coded), coded.info.tokenizer, coded.info.shards) == (rows or 40, model.fingerprint, shards)
    source = open_source(tiny_dalle().data.source, "train")
    true = np.stack([source.image(i, SIZE, "center") for i in range(len(coded))])
    want = ENCODE(model.config, model.run.params, jnp.asarray(true / np.float32(255)))
    np.testing.assert_array_equal([coded.row(i)[0] for i in range(len(coded))], want)
    assert [coded.captions(i) for i in range(10)] == [source.captions(i) for i in range(10)]
    config = tiny_dalle(made.out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, codes=str(out)))
    task = make_task(config)
    task.prepare(made.dalle)
    assert len(CodesDataset(out / "eval")) == 16
    pixels = make_task(tiny_dalle(made.out))
    pixels.prepare(made.dalle)
    for got, want in zip(task.eval_batches(), pixels.eval_batches(), strict=True):
        assert got.keys() == {"codes", "text"}
        np.testing.assert_array_equal(got["text"], want["text"])
        image = jnp.asarray(want["image"] / np.float32(255))
        np.testing.assert_array_equal(got["codes"], ENCODE(model.config, model.run.params, image))
    assert task.sample_grid(load_run(made.dalle).params, task.frozen, jax.random.key(0)).size[0] > 4 * SIZE
    held_out = json.loads((out / "eval/codes.json").read_text())
    for name, value, message in (
        ("tokenizer", "fedcba9876543210", "of tokenizer fedcba9876543210"),
        ("source", held_out["source"].replace('"seed": 0', '"seed": 5'), "seed 5 there, 0 here"),
    ):
        (out / "eval/codes.json").write_text(json.dumps({**held_out, name: value}))
        with pytest.raises(ValueError, match=message):
            make_task(config).prepare(made.dalle)


def test_encode_reads_a_folder_without_a_configuration(made, folder, tmp_path):
    result = json_of("encode", made.dvae, "--data", folder, "--out", tmp_path / "codes")
    rows = open_source(FolderSource(path=str(folder)), "train")
    assert result["rows"] == len(rows) and CodesDataset(tmp_path / "codes").captions(0) == rows.captions(0)
    data = DataConfig(source=FolderSource(path="moved"), codes=str(tmp_path / "codes"))
    assert len(open_train_source(data)) == len(rows)


def test_codes_of_another_tokenizer_stop_training_and_warn_in_decode(made, tmp_path):
    out = tmp_path / "codes"
    encode = ("encode", made.dvae, "--data", made.dalle, "--rows", 8, "--out", out, "--eval-rows", 0)
    json_of(*encode)
    info = json.loads((out / "codes.json").read_text()) | {"tokenizer": "0123456789abcdef"}
    (out / "codes.json").write_text(json.dumps(info))
    assert "holds other codes (tokenizer '0123456789abcdef' there" in refused(*encode)
    config = tiny_dalle(made.out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, codes=str(out)))
    with pytest.raises(
        ValueError,
        match=r"Expected data\.codes of this run's tokenizer .*, got .* of tokenizer 0123456789abcdef",
    ):
        make_task(config).prepare(made.dalle)
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32), tokenizer=np.array("0123456789abcdef"))
    done = run("decode", made.dvae, tmp_path / "c.npz", "--out", tmp_path / "i.npz")
    assert done.code == 0 and "warning" in done.err and "made by tokenizer 0123456789abcdef" in done.err


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"codes": np.full((2, 64), VOCAB)}, "Expected codes in [0, 32), got codes from 32 to 32 in row 0"),
        ({"codes": np.full((2, 64), -1)}, "got codes from -1 to -1 in row 0"),
        ({"codes": np.zeros((2, 63), int)}, "Expected 64 codes per image (8 x 8), got 63"),
        ({"codes": np.zeros((2, 64))}, "codes of integers (images, 64), at least one row, got float64 (2, 64)"),
        ({"codes": np.zeros((0, 64), int)}, "integers (images, 64), at least one row, got int64 (0, 64)"),
        ({"codes": np.zeros(64, int)}, "got int64 (64,)"),
        ({"tokens": np.zeros((2, 64), int)}, "Expected an array `codes` in"),
        ({"codes": np.array([[{}]])}, "Expected an npz file of numbers, got"),
        ("text", "Expected a whole npz file, got"),
        ("npy", "(File is not a zip file). Use a file that `dalle-jax encode`"),
        ("cut", "Expected a whole npz file, got"),
        ("missing", "Expected an npz file, got no file"),
    ],
)  # fmt: skip
def test_invalid_code_files_are_rejected(made, tmp_path, arrays, expected):
    path = tmp_path / "codes.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros((2, 64), int))
    elif arrays == "cut":
        np.savez(path, codes=np.zeros((20, 64), int))
        path.write_bytes(path.read_bytes()[:5000])
    elif arrays == "text":
        path.write_text("codes")
    message = refused("decode", made.dvae, path, "--out", tmp_path / "out")
    assert expected in message and "unsafely" not in message


def test_encode_rejects_invalid_input(made, image_files, tmp_path):
    out = tmp_path / "codes.npz"
    (tmp_path / "broken.png").write_bytes(image_files[0].read_bytes()[:60])
    message = refused("encode", made.dvae, image_files[0], tmp_path / "broken.png", "--out", out)
    assert "broken.png: The image does not decode" in message and not out.exists()
    assert "Cannot read the image" in refused("encode", made.dvae, tmp_path / "none.png", "--out", out)
    assert "Expected images to encode, or --data DATA" in refused("encode", made.dvae, "--out", out)
    assert "Expected images to encode, or --data DATA" in refused(
        "encode", made.dvae, image_files[0], "--data", made.dvae, "--out", out
    )
    assert "Expected --rows with --data, got it without" in refused(
        "encode", made.dvae, image_files[0], "--rows", 2, "--out", out
    )
    ahead = ("encode", made.dvae, "--data", made.dvae, "--out", tmp_path / "codes")
    assert "Expected rows in [1, 40], the rows of the source, got 41" in refused(*ahead, "--rows", 41)
    message = refused(*ahead, "--process", 2, "--processes", 2)
    assert "Expected process in [0, 2), the number of processes, got 2" in message
    assert "Expected --process with --processes, got one of them" in refused(*ahead, "--process", 2)
    assert "Expected shard_rows of at least 1, got 0" in refused(*ahead, "--shard-rows", 0)
    assert "configuration file or name, got none.py" in refused(
        "encode", made.dvae, "--data", "none.py", "--out", out
    )


def test_unwritable_outputs_are_rejected(made, image_files, tmp_path):
    (tmp_path / "file").write_text("mine")
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32))
    assert "directory for --out, got the file" in refused(
        "sample", made.dalle, "a", "--out", tmp_path / "file"
    )
    assert "Expected a writable --out, got" in refused(
        "sample", made.dalle, "a", "--out", tmp_path / "file" / "s"
    )
    assert "name of a file for --out, got the directory" in refused(
        "encode", made.dvae, image_files[0], "--out", tmp_path
    )
    assert "Expected a writable --out, got" in refused(
        "encode", made.dvae, image_files[0], "--out", tmp_path / "file" / "c.npz"
    )
    assert "directory for --out, got the file" in refused(
        "decode", made.dvae, tmp_path / "c.npz", "--out", tmp_path / "file"
    )
    assert "directory for --out, got the file" in refused("demo", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
