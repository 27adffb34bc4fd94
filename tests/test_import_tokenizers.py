"""Imported tokenizers against their reference implementations: the same codes, scores and pictures.

Default: small golden files that the reference implementations made (golden/reference.py has the command). With
`-m parity`, where the packages are installed: larger models made anew.
"""

import dataclasses
import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import cli, tokenizer
from dalle_jax.importers import families
from dalle_jax.tokenizer import dvae, losses, quantize, vqgan
from dalle_jax.train.rundir import load_run

GOLDEN = Path(__file__).parent / "golden"


def relative(got, want):
    """Largest difference over the largest number that is wanted."""
    return float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))


def imported(tmp_path, family, source, **flags):
    """The run that the command makes."""
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert cli.main(["import", family, str(source), "--out", str(out), *words]) == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    return load_run(out)


def answers(path):
    """(images, {name: array}) of each shape that the reference was asked."""
    with np.load(path / "answers.npz") as file:
        found = {name: file[name] for name in file.files}
    count = sum(name.startswith("images_") for name in found)
    return [{n.rsplit("_", 1)[0]: x for n, x in found.items() if n.endswith(f"_{i}")} for i in range(count)]


def check_dvae(run, asked):
    for want in asked:
        images = want["images"]
        side, wide = images.shape[1:3]
        logits = dvae.Encoder(run.config.model).apply(
            {"params": run.params["encoder"]}, losses.map_pixels(jnp.asarray(images))
        )
        assert relative(logits, want["logits"]) < 1e-5
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), want["codes"])
        stats = dvae.Decoder(run.config.model).apply({"params": run.params["decoder"]}, want["codes"])
        assert relative(dvae._pixels(stats), want["pixels"]) < 1e-5
        if side == wide:
            cfg = dataclasses.replace(run.config.model, image_size=side)
            codes = tokenizer.encode(cfg, run.params, images)
            np.testing.assert_array_equal(codes, want["codes"].reshape(len(codes), -1))
            assert relative(tokenizer.decode(cfg, run.params, codes), want["pixels"]) < 1e-5


def check_vqgan(run, asked):
    for want in asked:
        cfg, images = run.config.model, want["images"]
        side, wide = images.shape[1:3]
        z = vqgan.latents(cfg, run.params, jnp.asarray(images))
        assert relative(z, want["latents"]) < 1e-5
        codes = quantize.codes(cfg.quantizer, run.params["quantize"], z)
        np.testing.assert_array_equal(codes, want["codes"])
        found = quantize.lookup(cfg.quantizer, run.params["quantize"], jnp.asarray(want["codes"]))
        assert relative(vqgan.from_range(cfg, vqgan._draw(cfg, run.params, found)[0]), want["pixels"]) < 1e-5
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
    pytest.importorskip(package)
    return importlib.import_module("golden.reference")


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_openai_dvae_parity(tmp_path, zipped):
    reference("dall_e").openai_dvae(
        tmp_path / "x", width=64, blocks=2, vocab=512, decoder_width=32, seed=1, zipped=zipped
    )
    check_dvae(imported(tmp_path, "openai-dvae", tmp_path / "x"), answers(tmp_path / "x"))


# Three resolutions of two blocks, with the references' own 32 groups.
WIDE = {"width": 32, "multipliers": (1, 2, 2), "latent": 32, "vocab": 64, "seed": 1}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("taming_vqgan", "taming", {"blocks": 2, "attention": (4,), **WIDE}),
        ("taming_vqgan", "taming", {"blocks": 2, "attention": (16, 8), **WIDE}),
        ("taming_gumbel", "taming", {"blocks": 2, "attention": (4,), **WIDE}),
        ("flax_vqgan", "vqgan_jax", {"blocks": 2, "attention": (4,), **WIDE}),
        ("llamagen_vq", "tokenizer.tokenizer_image", WIDE),
    ],
)
def test_vqgan_parity(tmp_path, name, package, options):
    family, check, file = CHECKS[name]
    getattr(reference(package), name)(tmp_path / "x", **options)
    check(imported(tmp_path, family, tmp_path / "x" / file), answers(tmp_path / "x"))


def test_a_family_that_is_not_known_is_told(capsys, tmp_path):
    assert cli.main(["import", "openai-dvea", "x", "--out", str(tmp_path / "out")]) == 1
    assert "no family 'openai-dvea'; perhaps you meant 'openai-dvae'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="want one of openai-dvae"):
        families.load("zzz", tmp_path)
