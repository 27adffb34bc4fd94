"""Tests of VQGAN: quantizers by hand, published sizes, gradients of the adversarial step, a training run."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_task import tiny_config

from dalle_jax.checkpoint.load import load_run
from dalle_jax.config import (
    AdversarialConfig,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    ScenesSource,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
    from_json,
    to_json,
)
from dalle_jax.models import lpips, tokenizer, tokenizer_losses
from dalle_jax.models.vqgan import adversarial, autoencoder, discriminator, quantizers
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import param_shardings
from dalle_jax.pipelines import TokenizerPipeline, load
from dalle_jax.train import loop
from dalle_jax.train.adversarial_optim import adversarial_optimizer

ADVERSARIAL = AdversarialConfig(
    disc_start_step=3, disc_warmup_steps=2, width=4, layers=2, r1_every=2, learning_rate=1e-3
)
TINY = VQGANConfig(
    image_size=16, width=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), latent_width=8,
    quantizer=VectorQuantizer(vocab=16, dim=4), adversarial=ADVERSARIAL,
)  # fmt: skip


def key(n=0):
    return jax.random.key(n)


def images(n=4, size=16):
    return jax.random.uniform(key(9), (n, size, size, 3))


@pytest.fixture(scope="module")
def params():
    return adversarial.init(TINY, key())


# --- quantizers ---------------------------------------------------------------------------------------------


def test_nearest_code_by_hand():
    cfg = VectorQuantizer(vocab=3, dim=2, commitment_weight=0.25)
    params = {"embedding": jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])}
    z = jnp.array([[[[0.9, 0.1], [0.4, 0.0]]]])
    out = quantizers.quantize(cfg, params, z, key())
    np.testing.assert_array_equal(out.codes, [[[1, 0]]])  # the first of two equal codes
    np.testing.assert_allclose(out.z, [[[[1.0, 0.0], [0.0, 0.0]]]], atol=1e-6)
    square = (0.1**2 + 0.1**2 + 0.4**2) / 4
    np.testing.assert_allclose(out.loss, 1.25 * square, rtol=1e-5)


def test_commitment_trains_the_encoder_and_the_other_term_the_codebook():
    cfg = VectorQuantizer(vocab=2, dim=1, codebook_weight=1.0, commitment_weight=0.25)
    table, z = jnp.array([[0.0], [10.0]]), jnp.array([[[[2.0]]]])

    def loss(table, z):
        return quantizers.quantize(cfg, {"embedding": table}, z, key()).loss

    to_table, to_z = jax.grad(loss, argnums=(0, 1))(table, z)
    np.testing.assert_allclose(to_table, [[-4.0], [0.0]])  # d (2 - e)^2 / de at e = 0
    np.testing.assert_allclose(to_z, [[[[1.0]]]])  # 0.25 d (z - 0)^2 / dz


@pytest.mark.parametrize(
    "cfg", [VectorQuantizer(vocab=8, dim=3), FiniteScalarQuantizer(levels=(8, 5, 4))], ids=["vq", "fsq"]
)
def test_gradient_passes_straight_through(cfg):
    params = quantizers.init(cfg, key())
    z = jax.random.normal(key(1), (1, 2, 2, 3)) * 0.1
    grad = jax.grad(lambda z: quantizers.quantize(cfg, params, z, key()).z.sum())(z)
    if cfg.kind == "vq":
        np.testing.assert_allclose(grad, 1.0, rtol=1e-6)
    else:
        assert (np.asarray(grad) > 0).all()  # tanh is steep near 0


def test_normalized_codes_ignore_length():
    cfg = VectorQuantizer(vocab=2, dim=2, normalize=True)
    params = {"embedding": jnp.array([[1.0, 0.0], [0.0, 9.0]])}
    z = jnp.array([[[[5.0, 4.0], [0.1, 0.2]]]])
    np.testing.assert_array_equal(quantizers.nearest_codes(cfg, params, z), [[[0, 1]]])
    np.testing.assert_allclose(
        quantizers.embed_codebook(cfg, params, jnp.array([[[1]]])), [[[[0.0, 1.0]]]], atol=1e-6
    )


def test_fsq_codes_cover_every_level():
    """All codes have different vectors on the published grid, and these vectors have the same codes."""
    cfg = FiniteScalarQuantizer(levels=(5, 4, 3))
    assert cfg.vocab == 60
    codes = jnp.arange(60).reshape(1, 6, 10)
    z = quantizers.embed_codebook(cfg, {}, codes)
    assert len(np.unique(np.asarray(z).reshape(60, 3), axis=0)) == 60
    np.testing.assert_allclose(np.unique(z[..., 0]), [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(np.unique(z[..., 1]), [-1, -0.5, 0, 0.5])
    half = np.array([2, 2, 1])
    levels = np.array([5, 4, 3])
    spread, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2 == 0, 0.5, 0)
    raw = np.arctanh((np.asarray(z) * half + offset) / spread) - np.arctanh(offset / spread)
    np.testing.assert_array_equal(quantizers.nearest_codes(cfg, {}, jnp.asarray(raw)), codes)
    np.testing.assert_allclose(quantizers.quantize(cfg, {}, jnp.asarray(raw), key()).z, z, atol=1e-6)


def test_fsq_with_an_even_number_of_levels():
    """Four levels by hand: 1.5015 tanh(z + atanh(1 / 3.003)) - 0.5, rounded to -2, -1, 0, 1 (2309.15505, A.1)."""
    cfg = FiniteScalarQuantizer(levels=(4, 5))
    edges = [-1.1496, -0.3460, 0.4576]
    z = [-9.0] + [edge + step for edge in edges for step in (-0.01, 0.01)] + [9.0]
    raw = jnp.array([[[[x, 0.0] for x in z]]])
    values = quantizers.embed_codebook(cfg, {}, quantizers.nearest_codes(cfg, {}, raw))
    np.testing.assert_allclose(values[0, 0, :, 0], np.array([-2, -2, -1, -1, 0, 0, 1, 1]) / 2)
    np.testing.assert_allclose(values[0, 0, :, 1], 0)


def test_gumbel_samples_in_training_and_takes_the_largest_logit_in_encoding():
    cfg = GumbelQuantizer(vocab=2, dim=1, kl_weight=1.0)
    params = {
        "proj": {"kernel": jnp.array([[math.log(3.0), 0.0]]), "bias": jnp.zeros(2)},
        "embedding": jnp.array([[1.0], [2.0]]),
    }
    z = jnp.ones((1, 100, 100, 1))
    out = quantizers.quantize(cfg, params, z, key(), tau=0.5)
    fraction = float((out.codes == 0).mean())
    assert abs(fraction - 0.75) < 0.02
    np.testing.assert_allclose(out.z[..., 0], out.codes + 1.0, atol=1e-6)  # one-hot in the forward pass
    np.testing.assert_allclose(
        out.loss, math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25), rtol=1e-5
    )
    assert (quantizers.nearest_codes(cfg, params, z) == 0).all()


# --- the network ----------------------------------------------------------------------------------------------


def _count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_published_sizes():
    """Parameter counts of taming-transformers' f16-1024 and f16-16384 and of LlamaGen's VQ-16 and VQ-8."""
    full = VQGANConfig()
    shapes = jax.eval_shape(lambda k: autoencoder.init(full, k), key())
    assert _count(shapes["encoder"]) == 29_298_176
    assert _count(shapes["decoder"]) == 42_449_795
    assert _count(shapes) == 76_073_859
    small = dataclasses.replace(full, quantizer=VectorQuantizer(vocab=1024))
    assert _count(jax.eval_shape(lambda k: autoencoder.init(small, k), key())) == 72_141_699
    low = dataclasses.replace(full, quantizer=VectorQuantizer(vocab=16_384, dim=8, normalize=True))
    assert _count(jax.eval_shape(lambda k: autoencoder.init(low, k), key())) == 71_883_403
    eight = dataclasses.replace(low, channel_multipliers=(1, 2, 2, 4), attention_levels=(3,))
    assert _count(jax.eval_shape(lambda k: autoencoder.init(eight, k), key())) == 70_109_835


@pytest.mark.parametrize("quantizer", [VectorQuantizer(), GumbelQuantizer(), FiniteScalarQuantizer()])
def test_every_parameter_has_one_sharding_rule(quantizer):
    cfg = VQGANConfig(quantizer=quantizer)
    mesh = make_mesh(tiny_config().mesh)
    param_shardings(mesh, jax.eval_shape(lambda k: autoencoder.init(cfg, k), key()))
    param_shardings(mesh, jax.eval_shape(lambda k: adversarial.init(cfg, k), key()))


def test_downsampling_pads_on_the_right_and_at_the_bottom():
    """A kernel of ones over an image of ones sums 9 pixels except at the last row and column."""
    cfg = dataclasses.replace(TINY, width=1, channel_multipliers=(1, 1), attention_levels=())
    params = autoencoder.init(cfg, key())["encoder"]

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "down_0_downsample":
            outputs.append(out)
        return out

    outputs = []
    params = jax.tree.map(jnp.zeros_like, params)
    params["conv_in"]["bias"] = jnp.ones(1)
    params["down_0_downsample"]["kernel"] = jnp.ones((3, 3, 1, 1))
    with nn.intercept_methods(record):
        autoencoder.VQGANEncoder(cfg).apply({"params": params}, jnp.zeros((1, 8, 8, 3)))
    np.testing.assert_allclose(outputs[0][0, :, :, 0], [[9, 9, 9, 6]] * 3 + [[6, 6, 6, 4]])


@pytest.mark.parametrize(
    "quantizer",
    [TINY.quantizer, GumbelQuantizer(vocab=16, dim=4), FiniteScalarQuantizer(levels=(4, 4))],
    ids=["vq", "gumbel", "fsq"],
)
def test_tokenizer_functions_with_each_quantizer(quantizer):
    cfg = dataclasses.replace(TINY, quantizer=quantizer)
    params = tokenizer.init(cfg, key())
    codes = tokenizer.encode(cfg, params, images())
    assert (
        codes.shape == (4, 64) and codes.dtype == jnp.int32 and codes.min() >= 0 and codes.max() < cfg.vocab
    )
    pixels = tokenizer.decode(cfg, params, codes)
    assert pixels.shape == (4, 16, 16, 3) and pixels.dtype == jnp.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    with pytest.raises(ValueError, match=r"images of shape \(batch, 16, 16, 3\), got \(4, 8, 8, 3\)"):
        tokenizer.encode(cfg, params, images(size=8))
    with pytest.raises(ValueError, match=r"codes of shape \(batch, 64\), got \(4, 3\)"):
        tokenizer.decode(cfg, params, codes[:, :3])


def test_configurations_round_trip_and_are_checked():
    config = TrainConfig(model=dataclasses.replace(TINY, quantizer=FiniteScalarQuantizer(levels=(8, 5))))
    assert from_json(TrainConfig, to_json(config)) == config
    with pytest.raises(ValueError, match=r"image_size divisible by 16 .*, got 20"):
        VQGANConfig(image_size=20)
    with pytest.raises(ValueError, match=r"attention_levels in \[0, 5\), got \(5,\)"):
        VQGANConfig(attention_levels=(5,))
    with pytest.raises(ValueError, match="levels of one or more"):
        FiniteScalarQuantizer(levels=(8, 1))
    with pytest.raises(ValueError, match=r"images of at least .* pixels for adversarial\.layers .* got 16"):
        discriminator.init(AdversarialConfig(layers=3), 16, key())


# --- perceptual losses --------------------------------------------------------------------------------------


def test_pyramid_by_hand():
    x = jnp.zeros((1, 2, 2, 3))
    y = x.at[0, 0, 0].set(1.0)  # mean 1/4; bands: 3/4 at one pixel, 1/4 at three
    np.testing.assert_allclose(
        tokenizer_losses.laplacian_pyramid_loss(x, y), ((0.75 + 3 * 0.25) / 4 + 0.25) / 2, rtol=1e-6
    )


def _lpips_file(path, **changes):
    arrays, rng = {}, np.random.default_rng(0)
    for i, (size, inputs, outputs, *_) in enumerate(lpips._ALEXNET):
        fan = size * size * inputs
        arrays[f"AlexNet_0.Conv_{i}.kernel"] = rng.normal(0, fan**-0.5, (size, size, inputs, outputs))
        arrays[f"AlexNet_0.Conv_{i}.bias"] = np.zeros(outputs)
        arrays[f"NetLinLayer_{i}.Conv_0.kernel"] = np.ones((1, 1, outputs, 1))
    arrays |= changes
    np.savez(path, **{k: np.asarray(v, np.float32) for k, v in arrays.items() if v is not None})
    return path


def test_lpips_is_a_distance_and_checks_its_file(tmp_path):
    params = lpips.load_lpips(_lpips_file(tmp_path / "good.npz"))
    x = images(2, 64) * 2 - 1
    y = x.at[1].multiply(-1)
    distance = lpips.lpips(params, x, y)
    assert distance[0] == 0 and distance[1] > 0
    np.testing.assert_allclose(distance, lpips.lpips(params, y, x), rtol=1e-5)
    with pytest.raises(
        FileNotFoundError, match=r"got no file .*none\.npz\. Set model\.lpips to the weights of LPIPS"
    ):
        lpips.load_lpips(tmp_path / "none.npz")
    name = "AlexNet_0.Conv_2.bias"
    for value, message in (
        (None, f"Expected the arrays of LPIPS, got .* without array {name}"),
        (np.zeros(3), rf"Expected array {name} of shape \(384,\), got \(3,\)"),
        (np.full(384, np.nan), f"Expected finite values in array {name}"),
    ):
        with pytest.raises(ValueError, match=message):
            lpips.load_lpips(_lpips_file(tmp_path / "bad.npz", **{name: value}))
    with pytest.raises(ValueError, match=r"Expected the arrays of LPIPS, got .* with array extra"):
        lpips.load_lpips(_lpips_file(tmp_path / "bad.npz", extra=np.zeros(1)))


# --- the adversarial step -----------------------------------------------------------------------------------


def test_adversarial_losses_by_hand():
    real, fake = jnp.array([0.0, 2.0]), jnp.array([0.0, -2.0])
    np.testing.assert_allclose(adversarial.generator_loss("hinge", fake), 1.0)
    np.testing.assert_allclose(adversarial.discriminator_loss("hinge", real, fake), (0.5 + 0.5) / 2)
    soft = math.log(2) + math.log1p(math.exp(-2))
    np.testing.assert_allclose(adversarial.discriminator_loss("non-saturating", real, fake), soft, rtol=1e-6)
    other = (math.log(2) + math.log1p(math.exp(2))) / 2
    np.testing.assert_allclose(adversarial.generator_loss("non-saturating", fake), other, rtol=1e-6)


def test_patch_logits_do_not_depend_on_the_batch(params):
    x = images() * 2 - 1
    batched = discriminator.patch_logits(ADVERSARIAL, params["discriminator"], x)
    alone = discriminator.patch_logits(ADVERSARIAL, params["discriminator"], x[:1])
    np.testing.assert_allclose(batched[:1], alone, atol=1e-5)


def test_disc_factor():
    cfg = AdversarialConfig(disc_start_step=10, disc_warmup_steps=4)
    factors = [float(adversarial.disc_factor(cfg, jnp.int32(s))) for s in (9, 10, 11, 13, 99)]
    assert factors == [0.0, 0.25, 0.5, 1.0, 1.0]
    at_once = AdversarialConfig(disc_start_step=10, disc_warmup_steps=0)
    assert adversarial.disc_factor(at_once, jnp.int32(10)) == 1.0


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_gradients_equal_those_of_the_full_loss(params, kind):
    """One backward pass equals the gradient of the whole weighted loss with a constant adaptive weight."""
    adversarial_cfg = dataclasses.replace(
        ADVERSARIAL, loss=kind, disc_start_step=0, disc_warmup_steps=0, r1_every=1
    )
    cfg = dataclasses.replace(TINY, adversarial=adversarial_cfg)
    x, step = images(), jnp.int32(5)
    grads, metrics, _ = jax.jit(adversarial.adversarial_gradients, static_argnums=0)(
        cfg, params, None, x, key(1), step
    )
    real, disc_params = 2 * x - 1, params["discriminator"]

    def parts(tokenizer):
        out = autoencoder.reconstruct(cfg, tokenizer, x, key(1))
        rec = (
            jnp.abs(real - out.pixels).mean()
            + tokenizer_losses.laplacian_pyramid_loss(real, out.pixels).mean()
        )
        return (
            rec,
            adversarial.generator_loss(
                kind, discriminator.patch_logits(adversarial_cfg, disc_params, out.pixels)
            ),
            out,
        )

    def last_norm(i):
        grad = jax.grad(lambda p: parts(p)[i])(params["tokenizer"])["decoder"]["conv_out"]["kernel"]
        return jnp.linalg.norm(grad)

    rec, adv = last_norm(0), last_norm(1)
    np.testing.assert_allclose(metrics["norm_reconstruction"], rec, rtol=1e-4)
    np.testing.assert_allclose(metrics["norm_adversarial"], adv, rtol=1e-4)
    weight = 0.8 * rec / (adv + 1e-4)

    def full_loss(tokenizer):
        rec, adv, out = parts(tokenizer)
        return rec + out.loss + weight * adv

    want = jax.grad(full_loss)(params["tokenizer"])
    assert optax.tree.norm(optax.tree.sub(want, grads["tokenizer"])) < 1e-4 * optax.tree.norm(want)

    fake = jax.lax.stop_gradient(parts(params["tokenizer"])[2].pixels)

    def disc_loss(p):
        loss = adversarial.discriminator_loss(
            kind,
            discriminator.patch_logits(adversarial_cfg, p, real),
            discriminator.patch_logits(adversarial_cfg, p, fake),
        )
        return loss + adversarial_cfg.r1_weight * adversarial.r1_penalty(adversarial_cfg, p, real)

    want = jax.grad(disc_loss)(disc_params)
    assert optax.tree.norm(optax.tree.sub(want, grads["discriminator"])) < 1e-3 * optax.tree.norm(want)


def test_the_discriminator_is_constant_before_its_start(params):
    x = images()
    step = jax.jit(adversarial.adversarial_gradients, static_argnums=0)
    grads, metrics, _ = step(TINY, params, None, x, key(1), jnp.int32(2))
    assert optax.tree.norm(grads["discriminator"]) == 0 and math.isnan(metrics["log_d_real"])
    alone = dataclasses.replace(TINY, adversarial=None)
    want, *_ = step(alone, {"tokenizer": params["tokenizer"]}, None, x, key(1), jnp.int32(2))
    assert optax.tree.norm(optax.tree.sub(want["tokenizer"], grads["tokenizer"])) < 1e-5
    tx = adversarial_optimizer(TINY, optax.sgd(0.1))
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    norms = []
    for _ in range(5):
        updates, state = tx.update(ones, state, params)
        norms.append(float(optax.tree.norm(updates["discriminator"])))
    # It starts at step 3, and each value of its first step is Adam's first: the learning rate.
    first = ADVERSARIAL.learning_rate * math.sqrt(_count(params["discriminator"]))
    assert norms[:3] == [0, 0, 0]
    np.testing.assert_allclose(norms[3], first, rtol=1e-3)


def run_config(run, steps):
    """Train past the start of the discriminator after step 3: eight devices, two microbatches, restarted codes."""
    quantizer = dataclasses.replace(TINY.quantizer, dead_code_restart_steps=2)
    return tiny_config(
        run, model=dataclasses.replace(TINY, image_size=32, quantizer=quantizer), steps=steps,
        data={"batch_size": 8, "source": ScenesSource(max_objects=1)}, optim={"grad_accum_steps": 2},
        eval_rows=8, eval_every=6, save_every=3, sample_every=6,
    )  # fmt: skip


def test_a_run_encodes_and_decodes(tmp_path, capfd):
    """After training past the start of the discriminator, through the functions for any tokenizer."""
    outcome = loop.train(run_config(tmp_path / "run", 6))
    assert outcome.finished and "eval_psnr" in outcome.metrics
    assert "model.lpips is not set" in capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    log_d = [row["log_d_real"] for row in rows if "log_d_real" in row]
    assert log_d[:3] == [None] * 3 and all(value < 0 for value in log_d[3:])
    assert sum(row.get("codes_restarted", 0) for row in rows) > 0
    assert set(outcome.state.params) == {"tokenizer", "discriminator"}
    assert set(outcome.state.ema) == {"tokenizer"}  # an average of the discriminator has no use
    run = load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((run.params, outcome.state.ema["tokenizer"])))
    assert set(run.params) == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}
    loaded = load(tmp_path / "run", TokenizerPipeline)
    codes = loaded.encode(np.asarray(images(size=32) * 255).astype(np.uint8))
    assert loaded.decode(codes).shape == (4, 32, 32, 3)


@pytest.mark.slow
def test_resume_at_the_start_of_the_discriminator(tmp_path):
    whole = loop.train(run_config(tmp_path / "whole", 6))
    loop.train(run_config(tmp_path / "parts", 3))
    parts = loop.train(run_config(tmp_path / "parts", 6))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((whole.state, parts.state)))


@pytest.mark.slow
def test_init_from_a_run(tmp_path):
    """`init_from` initializes the tokenizer; the discriminator is initialized randomly."""
    before = loop.train(run_config(tmp_path / "first", 3)).state
    config = dataclasses.replace(run_config(tmp_path / "second", 1), init_from=str(tmp_path / "first"))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e-12))
    after = loop.train(config).state
    want, got = (jax.device_get(s) for s in (before.ema["tokenizer"], after.params["tokenizer"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, got)
