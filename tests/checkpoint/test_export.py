"""Tests of export to safetensors: equal parameters after a round trip, and errors for invalid files."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from fake_task import tiny_config
from foreign_checkpoints import read_arrays
from safetensors.numpy import save_file

from dalle_jax import cli
from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.checkpoint.params_file import read_params, write_params
from dalle_jax.config import DalleConfig, VectorQuantizer, VQGANConfig, to_json
from dalle_jax.importers.formats.safetensors import lazy_safetensors
from dalle_jax.models import dalle, tokenizer
from dalle_jax.pipelines import ImageRequest, TextToImagePipeline, TokenizerPipeline, load
from dalle_jax.text import tokenizers
from dalle_jax.train.initialize import copy_text_tokenizer, with_init_model

VQGAN = VQGANConfig(
    image_size=8, width=4, channel_multipliers=(1, 1), blocks=1, attention_levels=(), latent_width=4,
    quantizer=VectorQuantizer(vocab=8, dim=2), adversarial=None,
)  # fmt: skip


def make_run(path, model=None):
    """Write a run directory with initial parameters of a tiny tokenizer at step 5."""
    config = tiny_config(path) if model is None else tiny_config(path, model=model)
    params = tokenizer.init(config.model, jax.random.key(0))
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    checkpoints = CheckpointManager(path / "checkpoints", keep=1)
    checkpoints.save(5, {"params": params if model is None else {"tokenizer": params}})
    checkpoints.wait()
    checkpoints.close()
    return params


@pytest.mark.parametrize("model", [None, VQGAN], ids=["dvae", "vqgan"])
def test_an_exported_run_is_the_same_model(tmp_path, model):
    params = make_run(tmp_path / "run", model)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_run(tmp_path / "out")
    assert loaded.step == 5
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
    assert (
        load(tmp_path / "out", TokenizerPipeline).fingerprint
        == load(tmp_path / "run", TokenizerPipeline).fingerprint
    )
    assert cli.main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_exported_transformer_is_the_same_model(tmp_path):
    """Vocabulary and image tokenizer are exported too; codes are equal, and a run can be initialized from it."""
    model = DalleConfig(
        text_vocab=400,
        text_len=6,
        image_vocab=8,
        grid=8,
        dim=8,
        layers=1,
        heads=1,
        dtype="float32",
        remat="none",
    )
    config = tiny_config(tmp_path / "run", model=model)
    make_run(tmp_path / "dvae")
    tokenizers.train_text_tokenizer(
        ["a red circle", "a blue square", "红色的圆"], tmp_path / "run" / "text_tokenizer.model", vocab=400
    )
    frozen = load_run(tmp_path / "dvae")
    write_run(tmp_path / "run" / "image_tokenizer", frozen.config, frozen.params, frozen.step)
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    params = jax.tree.map(lambda x: 5 * x, dalle.init(model, jax.random.key(1)))
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(3, {"params": params})
    checkpoints.wait()
    checkpoints.close()
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", "text_tokenizer.model", "image_tokenizer"}
    one, other = (load(tmp_path / name, TextToImagePipeline) for name in ("run", "out"))
    jax.tree.map(np.testing.assert_array_equal, params, other.run.params)
    assert other.run.step == 3 and other.tokenizer.fingerprint == one.tokenizer.fingerprint
    assert (tmp_path / "out" / "text_tokenizer.model").read_bytes() == (
        tmp_path / "run" / "text_tokenizer.model"
    ).read_bytes()
    codes = [next(m.sample([ImageRequest("a red circle")])).codes for m in (one, other)]
    np.testing.assert_array_equal(*codes)
    assert len(np.unique(codes[0])) > 1
    initialized = with_init_model(dataclasses.replace(config, init_from=str(tmp_path / "out")))
    assert initialized.model == model
    assert copy_text_tokenizer(
        dataclasses.replace(initialized, init_from=str(tmp_path / "out")), tmp_path / "copied"
    )


def test_the_file_follows_the_format(tmp_path):
    """Parsed by hand: length, table, arrays in order."""
    arrays = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(2, ml_dtypes.bfloat16)}
    assert write_params(tmp_path / "x", arrays, 5) == 8
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert table == {
        "__metadata__": {"format": "dalle_jax", "step": "5"},
        "a.b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "c": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    }
    assert raw[8 + length :] == arrays["a"]["b"].tobytes() + b"\x80\x3f\x80\x3f"
    back, metadata = lazy_safetensors(tmp_path / "x")
    assert metadata == table["__metadata__"] and back["c"].read().dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back["a.b"].read(), arrays["a"]["b"])


def _raw(path, table, data=b""):
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_invalid_files_are_rejected(tmp_path):
    def entry(**changes):
        return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}

    two = {"w": entry()["w"], "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    for table, data, message in (
        (b"\x80\x04pickle", b"", "invalid UTF-8 in header"),
        ([1], b"", "invalid JSON in header: invalid type: sequence"),
        (entry(), b"1234", "file not fully covered"),
        (entry(shape=[3]), b"x" * 12, "invalid shape, data type, or offset for tensor"),
        (entry(data_offsets=[-8, 0]), b"x" * 8, "integer `-8`, expected usize"),
        (entry(dtype="\x1b[31m"), b"x" * 8, r"unknown variant `\\x1b\[31m`"),
        (two, b"x" * 12, "invalid offset for tensor `v`"),  # the arrays overlap
        ({"v": two["v"]}, b"x" * 12, "invalid offset for tensor `v`"),  # unused bytes before the array
    ):
        with pytest.raises(ValueError, match=f"Expected a whole safetensors file, got .*bad: .*{message}"):
            lazy_safetensors(_raw(tmp_path / "bad", table, data))
    for data in (b"\xff" * 100, b""):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ValueError, match=r"Expected a whole safetensors file, got .*bad: .*header too"):
            lazy_safetensors(tmp_path / "bad")
    for table, message in (
        ({"w\x1b[31m": entry()["w"]}, r"printable characters, got 'w\\x1b\[31m'"),
        (entry(dtype="F8_E4M3", shape=[8]), "Expected array w of a dtype in F64, .*, got F8_E4M3"),
        (entry(shape=[1] * 70 + [2]), "array w .* at most 64 axes, got F32 of 71 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            lazy_safetensors(_raw(tmp_path / "bad", table, b"x" * 8))


def test_parameters_must_fit_the_configuration(tmp_path):
    params = make_run(tmp_path / "run", VQGAN)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "model.safetensors"
    tensors, metadata = lazy_safetensors(file)
    whole = read_arrays(tensors)
    name = "encoder.conv_in.bias"
    np.testing.assert_array_equal(whole[name], params["encoder"]["conv_in"]["bias"])
    for changes, message in (
        ({name: None}, f"configuration in .*, got no {name}"),
        ({"extra.bias": np.zeros(1, np.float32)}, "arrays of a vqgan .*, got also extra.bias"),
        (
            {name: np.zeros(5, np.float32)},
            rf"array {name} to be float32 \(4,\) by config\.json, got float32 \(5,\)",
        ),
        ({name: np.zeros(4, np.float16)}, f"array {name} .* got float16"),
        ({name: np.full(4, np.nan, np.float32)}, f"finite values in array {name}"),
    ):
        changed = {k: v for k, v in (whole | changes).items() if v is not None}
        save_file(changed, file, metadata)
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path / "out")
    with pytest.raises(ValueError, match=r"Expected the arrays of .*, got no "):
        read_params(file, DalleConfig(dim=8, heads=1, layers=1))


def test_export_overwrites_nothing(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "run")]) == 1
    assert "a new or empty directory for --out" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "Expected a run directory" in capsys.readouterr().err and not (tmp_path / "out").exists()
