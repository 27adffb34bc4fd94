"""Tests of `pipelines.load`: every kind of run has its pipeline, and unsupported calls are errors."""

import jax
import numpy as np
import pytest

import dalle_jax
from dalle_jax.checkpoint.export import write_run
from dalle_jax.config import (
    ClipConfig,
    DataConfig,
    DiffusionConfig,
    DVAEConfig,
    ScenesSource,
    TowerConfig,
    TrainConfig,
)
from dalle_jax.models.registry import MODELS, load_class, model_shapes
from dalle_jax.pipelines import (
    ClipPipeline,
    DiffusionPipeline,
    ImageRequest,
    TextToImagePipeline,
    TokenizerPipeline,
    load,
)

DATA = DataConfig(source=ScenesSource(count=8))
TOKENIZER = DVAEConfig(image_size=16, groups=2, blocks=1, width=8, decoder_width=8, vocab=9)
TOWER = TowerConfig(dim=8, layers=1, heads=1)
CLIP = ClipConfig(
    image_size=16, patch_size=8, vision=TOWER, text_vocab=300, text_len=4, embed_dim=4, text=TOWER
)
DIFFUSION = DiffusionConfig(
    image_size=16, patch_size=4, width=8, channel_multipliers=(1,), blocks=1, attention_sizes=(), num_classes=2
)  # fmt: skip


def write(path, model):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: np.asarray(0.1 * rng.normal(size=s.shape), np.float32), model_shapes(model)
    )
    write_run(path, TrainConfig(model=model, data=DATA), params, 3)
    return path


def test_every_model_has_a_pipeline():
    kinds = {spec.kind: load_class(spec.pipeline).kind for spec in MODELS.values()}
    assert kinds == {
        "dvae": "tokenizer", "vqgan": "tokenizer", "dalle": "text-to-image", "bart": "text-to-image", "clip": "clip",
        "diffusion": "diffusion",
    }  # fmt: skip


def test_a_tokenizer_encodes_decodes_and_reconstructs(tmp_path):
    tokenizer = dalle_jax.load(str(write(tmp_path / "dvae", TOKENIZER)))
    assert isinstance(tokenizer, TokenizerPipeline) and (tokenizer.run.step, tokenizer.image_size) == (3, 16)
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    codes = tokenizer.encode(images, batch_size=2)
    assert codes.shape == (3, TOKENIZER.num_codes) and codes.dtype == np.int32
    decoded = np.round(tokenizer.decode(codes) * 255)
    np.testing.assert_allclose(tokenizer.reconstruct(images), decoded, atol=1)
    assert load(tmp_path / "dvae").fingerprint == tokenizer.fingerprint
    with pytest.raises(
        ValueError, match=r"dvae is a tokenizer run .* it reads no captions\. Use the run of a Tra"
    ):
        tokenizer.sample([ImageRequest("a red circle")])


def test_a_run_loads_with_its_tokenizer(tmp_path):
    path = write(tmp_path / "diffusion", DIFFUSION)
    with pytest.raises(FileNotFoundError, match="has no image_tokenizer/ yet; train it first"):
        load(path, TokenizerPipeline)
    write(path / "image_tokenizer", TOKENIZER)
    assert load(path, TokenizerPipeline).config == TOKENIZER


def test_a_model_of_classes_generates_without_captions(tmp_path):
    model = load(write(tmp_path / "diffusion", DIFFUSION))
    assert isinstance(model, DiffusionPipeline) and model.is_class_conditional and model.languages == ()
    for request, match in (
        (ImageRequest("a red circle", label=1), "reads no captions"),
        (ImageRequest(label=2), "expected 0 to 1"),
        (ImageRequest(label=1, codes=np.zeros(4, np.int32)), "does not read codes"),
        (ImageRequest(label=1, temperature=0.5), "does not read temperature"),
        (ImageRequest(label=1, strength=0.5), "needs an image to start from"),
    ):
        with pytest.raises(ValueError, match=match):
            model.sample([request])


def test_a_run_of_another_kind_is_rejected(tmp_path):
    path = write(tmp_path / "clip", CLIP)
    for expected, match in (
        (TextToImagePipeline, "is a run of stage clip; expected a Transformer"),
        (DiffusionPipeline, "is a run of stage clip; expected a diffusion model"),
        (TokenizerPipeline, "is a run of stage clip, which has no image tokenizer"),
    ):
        with pytest.raises(ValueError, match=match):
            load(path, expected)
    with pytest.raises(FileNotFoundError, match=r"has no text_tokenizer\.model"):
        load(path, ClipPipeline)
    with pytest.raises(FileNotFoundError, match="Expected a run directory"):
        load(tmp_path / "none")
