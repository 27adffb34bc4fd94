"""Tests of `pipelines.load`: every kind of run has its pipeline, and unsupported calls are errors."""

import jax
import jax.numpy as jnp
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
from dalle_jax.models.registry import MODELS, load_registry_class, model_shapes
from dalle_jax.pipelines import (
    ClipPipeline,
    DiffusionPipeline,
    DiffusionSamplingConfig,
    ImageRequest,
    Pipeline,
    SamplingConfig,
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
    kinds = {spec.kind: load_registry_class(spec.pipeline).kind for spec in MODELS.values()}
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
        ValueError, match=r"got .*dvae of stage dvae, an image tokenizer\. Use the run of a Transformer"
    ):
        tokenizer.sample([ImageRequest("a red circle")])


def test_a_run_loads_with_its_tokenizer(tmp_path):
    path = write(tmp_path / "diffusion", DIFFUSION)
    with pytest.raises(
        FileNotFoundError, match=r"Expected image_tokenizer/ in .*, got none\. Train the run first"
    ):
        load(path, TokenizerPipeline)
    write(path / "image_tokenizer", TOKENIZER)
    assert load(path, TokenizerPipeline).config == TOKENIZER


def test_a_model_of_classes_generates_without_captions(tmp_path):
    model = load(write(tmp_path / "diffusion", DIFFUSION))
    assert isinstance(model, DiffusionPipeline) and model.is_class_conditional and model.languages == ()
    for request, match in (
        (ImageRequest("a red circle", label=1), "Expected no captions for a model without text"),
        (ImageRequest(label=2), r"Expected labels in \[0, 2\), got labels from 2 to 2"),
        (
            ImageRequest(label=1, codes=np.zeros(4, np.int32)),
            "Expected requests without codes for this model",
        ),
        (
            ImageRequest(label=1, temperature=0.5),
            "Expected requests without temperature for a diffusion model",
        ),
        (
            ImageRequest(label=1, strength=0.5),
            "Expected an image to start from with a mask or a strength, got none",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            model.sample([request])


def test_a_run_of_another_kind_is_rejected(tmp_path):
    path = write(tmp_path / "clip", CLIP)
    for expected, match in (
        (TextToImagePipeline, "Expected the run of a Transformer .* of stage clip"),
        (DiffusionPipeline, "Expected the run of a diffusion model, .* of stage clip"),
        (TokenizerPipeline, "Expected a run with an image tokenizer, .* of stage clip"),
    ):
        with pytest.raises(ValueError, match=match):
            load(path, expected)
    with pytest.raises(ValueError, match="Expected None or the class of one kind of pipeline"):
        load(path, Pipeline)
    with pytest.raises(FileNotFoundError, match=r"Expected text_tokenizer\.model in .*, got none"):
        load(path, ClipPipeline)
    with pytest.raises(FileNotFoundError, match="Expected a run directory"):
        load(tmp_path / "none")


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, None, "1", jnp.float32(1)])
def test_seeds_that_are_no_integers_in_range_are_rejected(seed):
    with pytest.raises(ValueError, match=r"Expected an integer seed in \[0, 2\*\*32\), got"):
        ImageRequest("a", seed)


def test_requests_accept_numbers_of_numpy_and_jax():
    for number in (2, np.int64(2), jnp.int32(2), np.float32(2), jnp.float32(2), jnp.bfloat16(2)):
        request = ImageRequest("a", guidance_scale=number, strength=number)
        assert isinstance(request.guidance_scale, float) and request.guidance_scale == request.strength == 2
    for seed in (np.uint32(2**32 - 1), jnp.uint32(2**32 - 1)):
        assert type(ImageRequest("a", seed).seed) is int and ImageRequest("a", seed).seed == 2**32 - 1
    np.testing.assert_array_equal(ImageRequest("a", prefix_codes=[1, 2]).prefix_codes, np.array([1, 2]))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (ImageRequest, {"prompt": None}),
        (ImageRequest, {"guidance_scale": "2"}),
        (ImageRequest, {"temperature": jnp.ones(2)}),
        (ImageRequest, {"top_p": True}),
        (SamplingConfig, {"temperature": None}),
        (SamplingConfig, {"top_k": 2.5}),
        (SamplingConfig, {"preview_rows": None}),
        (DiffusionSamplingConfig, {"num_steps": 2.0}),
        (DiffusionSamplingConfig, {"num_steps": None}),
        (DiffusionSamplingConfig, {"spacing": "linear"}),
        (DiffusionSamplingConfig, {"sampler": ["ddim"]}),
        (DiffusionSamplingConfig, {"eta": "0"}),
        (DiffusionSamplingConfig, {"guidance_interval": 0.5}),
        (DiffusionSamplingConfig, {"guidance_interval": (0, None)}),
        (DiffusionSamplingConfig, {"threshold": "x"}),
    ],
)
def test_settings_of_wrong_types_are_rejected(make, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(**settings)


def test_another_configuration_or_strings_are_rejected_by_sample(tmp_path):
    model = load(write(tmp_path / "diffusion", DIFFUSION))
    with pytest.raises(
        ValueError, match="Expected config as a DiffusionSamplingConfig, got a SamplingConfig"
    ):
        model.sample([ImageRequest(label=1)], SamplingConfig())
    with pytest.raises(ValueError, match="Expected each request as an ImageRequest, got 'a cat'"):
        model.sample(["a cat"])


def test_a_tokenizer_rejects_no_rows_and_batch_size_0(tmp_path):
    tokenizer = load(write(tmp_path / "dvae", TOKENIZER), TokenizerPipeline)
    images = np.zeros((1, 16, 16, 3), np.uint8)
    codes = tokenizer.encode(images)
    for call, match in (
        (lambda: tokenizer.encode(images[:0]), "at least one"),
        (lambda: tokenizer.decode(codes[:0]), "at least one"),
        (lambda: tokenizer.encode(images, batch_size=0), "Expected batch_size of at least 1, got 0"),
        (lambda: tokenizer.decode(codes, batch_size=0), "Expected batch_size of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
