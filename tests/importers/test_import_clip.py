"""Imported CLIPs against their reference implementations: equal embeddings of images and captions.

As in test_import_tokenizers.py: golden files by default, `-m parity` for larger models, newly made.
"""

import gzip
import importlib
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from foreign_checkpoints import read_arrays, shapes_by_name, torch_zip
from safetensors.numpy import save_file

from dalle_jax import cli
from dalle_jax.checkpoint.load import load_run
from dalle_jax.config import ClipConfig, TowerConfig
from dalle_jax.importers import clip as importer
from dalle_jax.importers.formats import safetensors
from dalle_jax.importers.tensors import Tensor
from dalle_jax.models import clip
from dalle_jax.pipelines import ClipPipeline, load
from dalle_jax.text import byte_bpe
from dalle_jax.text.tokenizers import BosEosTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def imported(tmp_path, source):
    out = tmp_path / "run"
    assert cli.main(["import", "clip", str(source), "--out", str(out)]) == 0
    return load_run(out)


def check(run, path):
    with np.load(path / "answers.npz") as file:
        want = {name: file[name] for name in file.files}
    cfg = run.config.model
    assert want["images_0"].shape[1] == cfg.image_size
    tokens = jnp.asarray(want["tokens_0"], jnp.int32)
    vectors = {
        "image_0": clip.encode_image(cfg, run.params, jnp.asarray(want["images_0"])),
        "text_0": clip.encode_text(cfg, run.params, tokens),
    }
    for name, got in vectors.items():
        assert float(np.max(np.abs(got - want[name])) / np.max(np.abs(want[name]))) < 1e-5
        assert (
            float(np.min(np.linalg.norm(want[name][:, None] - want[name][None], axis=-1)[[0, 1], [1, 2]]))
            > 1e-2
        )
    scores = clip.similarity(cfg, run.params, jnp.asarray(want["images_0"]), tokens)
    np.testing.assert_allclose(scores, (want["image_0"] * want["text_0"]).sum(axis=1), atol=1e-5)


def test_openai_golden(tmp_path):
    run = imported(tmp_path, GOLDEN / "clip_openai" / "ViT.pt")
    assert run.config.model.vision == TowerConfig(dim=16, layers=1, heads=1)
    assert (run.config.model.activation, run.config.model.dtype) == ("quick-gelu", "float32")
    check(run, GOLDEN / "clip_openai")


def test_hugging_face_golden(tmp_path):
    run = imported(tmp_path, GOLDEN / "clip_hugging_face")
    assert run.config.model.vision == TowerConfig(dim=16, layers=2, heads=2)
    assert run.config.model.text == TowerConfig(dim=12, layers=2, heads=3)
    check(run, GOLDEN / "clip_hugging_face")


def test_the_vocabulary_is_imported(tmp_path, capsys):
    """The letters of CLIP are 512 pieces, so the table of the golden model is extended to that length."""
    source, golden = tmp_path / "clip", GOLDEN / "clip_hugging_face"
    source.mkdir()
    (source / "config.json").write_bytes((golden / "config.json").read_bytes())
    tensors, metadata = safetensors.lazy_safetensors(golden / "model.safetensors")
    arrays = read_arrays(tensors)
    name = "text_model.embeddings.token_embedding.weight"
    arrays[name] = np.pad(arrays[name], ((0, 515 - len(arrays[name])), (0, 0)))
    save_file(arrays, source / "model.safetensors", metadata)
    letters = byte_bpe._letters()
    words = [*letters, *(letter + "</w>" for letter in letters), "bc</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    (source / "merges.txt").write_text("#version: 0.2\nb c</w>\n", encoding="utf-8")
    (source / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    run = imported(tmp_path, source)
    assert "it has no vocabulary" not in capsys.readouterr().out
    ids = BosEosTokenizer.load(run.path / "text_tokenizer.model").encode("A bc", text_vocab=515, text_len=5)
    np.testing.assert_array_equal(ids, [513, vocab["a</w>"], 512, 514, 514])
    (source / "vocab.json").write_text(json.dumps(vocab | {"more": 515}), encoding="utf-8")
    assert cli.main(["import", "clip", str(source), "--out", str(tmp_path / "more")]) == 1
    assert "of 515 pieces, the size of the model, got 516" in capsys.readouterr().err


def test_a_missing_vocabulary_is_reported(tmp_path, capsys):
    run = imported(tmp_path, GOLDEN / "clip_hugging_face")
    assert "it has no vocabulary" in capsys.readouterr().out
    with pytest.raises(
        FileNotFoundError,
        match=r"text_tokenizer\.model in .*, got none\. Import .* with --text-tokenizer FILE",
    ):
        load(run.path, ClipPipeline)


def reference(package):
    pytest.importorskip("torch")
    if (
        importlib.util.find_spec(package) is None
    ):  # not imported: clip imports torchvision, which the tests do not use
        pytest.skip(f"{package} is not installed")
    return importlib.import_module("golden.reference")


LARGER = {
    "vision": (128, 2),
    "text": (64, 3),
    "patch": 8,
    "image_size": 40,
    "text_len": 11,
    "embed_dim": 48,
    "seed": 1,
}


@pytest.mark.parity
def test_openai_parity(tmp_path):
    reference("clip").clip_openai(tmp_path / "x", **LARGER)
    check(imported(tmp_path, tmp_path / "x" / "ViT.pt"), tmp_path / "x")


@pytest.mark.parity
@pytest.mark.parametrize(("activation", "safe"), [("quick_gelu", True), ("gelu", False)])
def test_hugging_face_parity(tmp_path, activation, safe):
    sizes = LARGER | {"vision": (48, 6, 2), "text": (40, 4, 3), "activation": activation, "safe": safe}
    reference("transformers").clip_hugging_face(tmp_path / "x", **sizes)
    check(imported(tmp_path, tmp_path / "x"), tmp_path / "x")


def test_files_of_other_models_are_rejected(tmp_path, capsys):
    for arrays, message in (
        ({"visual.layer1.0.conv1.weight": np.zeros(2, np.float32)}, "got one with a ResNet"),
        ({"encoder.weight": np.zeros(2, np.float32)}, "Expected CLIP with a tensor vision_model."),
        (
            {"visual.conv1.weight": np.zeros((2, 3, 4, 4), np.float32)},
            "with a tensor token_embedding.weight",
        ),
    ):
        path = torch_zip(tmp_path / "x.pt", arrays)
        assert cli.main(["import", "clip", str(path), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clip-openai", "clip-hugging-face"])
def test_the_published_model_is_detected_from_its_tensors(tmp_path, name):
    shapes = json.loads(gzip.decompress((GOLDEN / "published.json.gz").read_bytes()))[name]
    tensors = {k: Tensor(tuple(shape), np.dtype(np.float32), None) for k, shape in shapes.items()}
    model = importer.from_tensors(tmp_path / "ViT-B-32.pt", tensors)
    assert model.config == ClipConfig(dtype="float32")
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes_by_name(model.config).values()) == 151_277_313
    assert sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values()) == 151_277_313
