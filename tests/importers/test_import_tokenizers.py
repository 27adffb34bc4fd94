"""Imported tokenizers against their reference implementations: equal codes, logits and images.

Default: small golden files that the reference implementations made (golden/reference.py has the command). With
`-m parity`, where the packages are installed: larger models, newly made.
"""

import dataclasses
import gzip
import importlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_checkpoints import shapes_by_name
from PIL import Image

from dalle_jax import cli
from dalle_jax.checkpoint.load import load_run
from dalle_jax.config import (
    DVAEConfig,
    GumbelQuantizer,
    MeshConfig,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
)
from dalle_jax.importers import load_params, open_model, openai_dvae
from dalle_jax.importers import vqgan as importer
from dalle_jax.importers.tensors import Tensor
from dalle_jax.models import dvae, tokenizer, tokenizer_losses
from dalle_jax.models.vqgan import autoencoder, quantizers
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train.initialize import init_from_run
from dalle_jax.train.state import TrainState

GOLDEN = Path(__file__).parents[1] / "golden"


def relative(got, want):
    """Return the largest difference divided by the largest expected value."""
    return float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))


def imported(tmp_path, family, source, **flags):
    """Import a model by the command and load its run."""
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert cli.main(["import", family, str(source), "--out", str(out), *words]) == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    return load_run(out)


def answers(path):
    """Return the inputs and outputs of the reference for each image shape."""
    with np.load(path / "answers.npz") as file:
        found = {name: file[name] for name in file.files}
    count = sum(name.startswith("images_") for name in found)
    return [{n.rsplit("_", 1)[0]: x for n, x in found.items() if n.endswith(f"_{i}")} for i in range(count)]


def check_dvae(run, cases):
    for want in cases:
        images = want["images"]
        side, wide = images.shape[1:3]
        logits = dvae.DVAEEncoder(run.config.model).apply(
            {"params": run.params["encoder"]}, tokenizer_losses.map_pixels(jnp.asarray(images))
        )
        assert relative(logits, want["logits"]) < 1e-5
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), want["codes"])
        stats = dvae.DVAEDecoder(run.config.model).apply({"params": run.params["decoder"]}, want["codes"])
        assert relative(dvae._pixels(stats), want["pixels"]) < 1e-5
        if side == wide:
            cfg = dataclasses.replace(run.config.model, image_size=side)
            codes = tokenizer.encode(cfg, run.params, images)
            np.testing.assert_array_equal(codes, want["codes"].reshape(len(codes), -1))
            assert relative(tokenizer.decode(cfg, run.params, codes), want["pixels"]) < 1e-5


def check_vqgan(run, cases):
    for want in cases:
        cfg, images = run.config.model, want["images"]
        side, wide = images.shape[1:3]
        z = autoencoder.encode_latents(cfg, run.params, jnp.asarray(images))
        assert relative(z, want["latents"]) < 1e-5
        codes = quantizers.nearest_codes(cfg.quantizer, run.params["quantize"], z)
        np.testing.assert_array_equal(codes, want["codes"])
        latents = quantizers.embed_codebook(cfg.quantizer, run.params["quantize"], jnp.asarray(want["codes"]))
        pixels, _ = autoencoder._decode_latents(cfg, run.params, latents)
        assert relative(autoencoder.from_pixel_range(cfg, pixels), want["pixels"]) < 1e-5
        if side == wide:
            cfg = dataclasses.replace(cfg, image_size=side)
            codes = tokenizer.encode(cfg, run.params, images)
            np.testing.assert_array_equal(codes, want["codes"].reshape(len(codes), -1))
            assert relative(tokenizer.decode(cfg, run.params, codes), want["pixels"]) < 1e-5


CHECKS = {  # golden directory: (family, check, name of the file in it)
    "openai_dvae": ("openai-dvae", check_dvae, ""),
    "taming_vqgan": ("taming-vqgan", check_vqgan, "model.ckpt"),
    "taming_gumbel": ("taming-vqgan", check_vqgan, "model.ckpt"),
    "flax_vqgan": ("flax-vqgan", check_vqgan, ""),
    "llamagen_vq": ("llamagen-vq", check_vqgan, "vq.pt"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_golden(tmp_path, name):
    family, check, file = CHECKS[name]
    check(imported(tmp_path, family, GOLDEN / name / file), answers(GOLDEN / name))


def reference(package):
    pytest.importorskip("torch")
    if (
        importlib.util.find_spec(package) is None
    ):  # not imported: clip imports torchvision, which the tests do not use
        pytest.skip(f"{package} is not installed")
    return importlib.import_module("golden.reference")


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_openai_dvae_parity(tmp_path, zipped):
    reference("dall_e").openai_dvae(
        tmp_path / "x", width=64, blocks=2, vocab=512, decoder_width=32, seed=1, zipped=zipped
    )
    check_dvae(imported(tmp_path, "openai-dvae", tmp_path / "x"), answers(tmp_path / "x"))


# Three resolutions of two blocks, with the 32 groups of the references.
WIDE = {"width": 32, "multipliers": (1, 2, 2), "latent": 32, "vocab": 64, "seed": 1}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("taming_vqgan", "taming", {"blocks": 2, "attention": (4,), **WIDE}),
        ("taming_vqgan", "taming", {"blocks": 2, "attention": (16, 8), **WIDE}),
        ("taming_gumbel", "taming", {"blocks": 2, "attention": (4,), **WIDE}),
        ("flax_vqgan", "vqgan_jax", {"blocks": 2, "attention": (4,), **WIDE}),
        ("llamagen_vq", "tokenizer", WIDE),
    ],
)
def test_vqgan_parity(tmp_path, name, package, options):
    family, check, file = CHECKS[name]
    with jax.numpy_rank_promotion("allow"):  # the reference in Flax adds arrays of different rank
        getattr(reference(package), name)(tmp_path / "x", **options)
    check(imported(tmp_path, family, tmp_path / "x" / file), answers(tmp_path / "x"))


TAMING = importer.from_tensors, importer.TAMING, None, None
LLAMAGEN = importer.from_tensors, importer.LLAMAGEN, None, None
PUBLISHED = {  # model of golden/published.json.gz: ((its importer, options), number of parameters, configuration)
    "openai-dvae": ((openai_dvae.from_tensors, None), 53_786_240 + 43_829_766, DVAEConfig()),
    "taming-f16-1024": (TAMING, 72_141_699, VQGANConfig(quantizer=VectorQuantizer(vocab=1024))),
    "taming-f16-16384": (TAMING, 76_073_859, VQGANConfig()),
    "taming-f8-gumbel": (
        TAMING, None,
        VQGANConfig(channel_multipliers=(1, 1, 2, 4), attention_levels=(3,), quantizer=GumbelQuantizer()),
    ),
    "llamagen-f16": (LLAMAGEN, 71_883_403, VQGANConfig(quantizer=VectorQuantizer(dim=8, normalize=True))),
    "llamagen-f8": (
        LLAMAGEN, 70_109_835,
        VQGANConfig(
            channel_multipliers=(1, 2, 2, 4), attention_levels=(3,), quantizer=VectorQuantizer(dim=8, normalize=True)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected_from_their_tensors(name):
    """From names and shapes of the full-size models of the reference; no array is allocated."""
    (importer_of, *more), count, want = PUBLISHED[name]
    shapes = json.loads(gzip.decompress((GOLDEN / "published.json.gz").read_bytes()))[name]
    tensors = {k: Tensor(tuple(shape), np.dtype(np.float32), None) for k, shape in shapes.items()}
    tensors.pop("quantize.codebook_used", None)
    model = importer_of("x", tensors, *more)
    assert model.config == want
    ours = sum(int(np.prod(leaf.shape)) for leaf in shapes_by_name(model.config).values())
    assert ours == sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    assert count in (None, ours)


@pytest.mark.parametrize("name", ["openai_dvae", "taming_gumbel"])
def test_the_commands_accept_an_imported_run(tmp_path, name):
    """Encoding and decoding by the commands equal the functions of the model."""
    family, _, file = CHECKS[name]
    imported(tmp_path, family, GOLDEN / name / file, **{"image-size": 16})
    run, codes = str(tmp_path / "run"), str(tmp_path / "codes.npz")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    assert cli.main(["encode", run, str(tmp_path / "image.png"), "--out", codes]) == 0
    assert cli.main(["decode", run, codes, "--out", str(tmp_path / "images.npz")]) == 0
    loaded = load_run(run)
    images = jnp.asarray(image[None] / 255, jnp.float32)
    want = tokenizer.encode(loaded.config.model, loaded.params, images)
    with np.load(codes) as found, np.load(tmp_path / "images.npz") as decoded:
        np.testing.assert_array_equal(found["codes"], want)
        np.testing.assert_allclose(
            decoded["images"], tokenizer.decode(loaded.config.model, loaded.params, want), atol=1e-5
        )


def test_a_training_initializes_from_an_imported_run(tmp_path):
    loaded = imported(tmp_path, "openai-dvae", GOLDEN / "openai_dvae", **{"image-size": 16})
    config = TrainConfig(
        model=loaded.config.model, run=str(tmp_path / "more"), init_from=str(tmp_path / "run")
    )
    zeros = jax.tree.map(jnp.zeros_like, loaded.params)
    state = TrainState(step=jnp.int32(0), params=zeros, opt_state=(), ema={})
    initialized = init_from_run(state, config, make_mesh(MeshConfig(), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, initialized.params, loaded.params)


@pytest.mark.parametrize("name", ["openai_dvae", "taming_gumbel"])
def test_a_model_in_memory_equals_the_imported_run(tmp_path, name):
    family, _, file = CHECKS[name]
    model = load_params(family, GOLDEN / name / file, image_size=None)
    run = imported(tmp_path, family, GOLDEN / name / file)
    assert model.config == run.config.model
    assert (model.text_tokenizer, model.image_tokenizer) == (None, None)
    jax.tree.map(np.testing.assert_array_equal, model.params, jax.device_get(run.params))


def test_an_unknown_family_is_rejected(capsys, tmp_path):
    assert cli.main(["import", "openai-dvea", "x", "--out", str(tmp_path / "out")]) == 1
    assert "a family of models, got 'openai-dvea'. Use 'openai-dvae'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Use one of openai-dvae"):
        open_model("zzz", tmp_path)
