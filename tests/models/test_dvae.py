"""Tests of the discrete VAE: the published architecture, losses by hand, gradients and initialization.

The reference below is NumPy in float64: a convolution is a sum of shifted products, max-pooling and upsampling are
loops, and parameters have their published names (openai/DALL-E, encoder.pkl and decoder.pkl).
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import DVAEConfig, Schedule
from dalle_jax.models import dvae, tokenizer_losses
from dalle_jax.models.tokenizer_losses import schedule_value
from dalle_jax.parallel.sharding import path_name

# Bottlenecks of 4 and 8 channels: `conv2d` gathers inputs of up to 4 channels.
TINY = DVAEConfig(image_size=6, groups=2, blocks=2, width=16, decoder_width=5, vocab=11)


def published_names(cfg: DVAEConfig) -> dict[str, str]:
    """Return published name -> parameter path; `w` is [out, in, k, k], our kernel [k, k, in, out]."""
    table = {}
    widths = {"encoder": [cfg.width * 2**g for g in range(cfg.groups)]}
    widths["decoder"] = widths["encoder"][::-1]
    for part, sizes in widths.items():
        layers = {"blocks.input": "input", "blocks.output.conv": "output"}
        inputs = cfg.width if part == "encoder" else cfg.decoder_width
        for g, size in enumerate(sizes, 1):
            for b in range(1, cfg.blocks + 1):
                theirs, ours = f"blocks.group_{g}.block_{b}", f"groups/group_{g}_block_{b}"
                for c in range(1, 5):
                    layers[f"{theirs}.res_path.conv_{c}"] = f"{ours}/conv_{c}"
                if inputs != size:
                    layers[f"{theirs}.id_path"] = f"{ours}/id_path"
                inputs = size
        for theirs, ours in layers.items():
            table[f"{part}.{theirs}.w"] = f"{part}/{ours}/kernel"
            table[f"{part}.{theirs}.b"] = f"{part}/{ours}/bias"
    return table


def flat(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def shapes(cfg):
    return jax.eval_shape(lambda key: dvae.init(cfg, key), jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    """Parameters large enough that every layer matters, biases and residual paths included."""
    rng = np.random.default_rng(0)

    def random_leaf(path, leaf):
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
        gain = 2.5 if "conv_" in path_name(path) else 1.5
        if "decoder/output" in path_name(path):  # mu, and log b nearer to 0
            gain = np.array([4.0] * 3 + [0.2] * 3)
        return jnp.asarray(gain * rng.normal(size=leaf.shape) / math.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(random_leaf, shapes(TINY))


@pytest.fixture(scope="module")
def images():
    """Patches of saturated colors, so that codes differ, with noise."""
    rng = np.random.default_rng(1)
    patches = np.repeat(np.repeat(rng.integers(0, 2, (2, 3, 3, 3)), 2, axis=1), 2, axis=2)
    return (0.85 * patches + 0.15 * rng.random((2, 6, 6, 3))).astype(np.float32)


encode_logits = jax.jit(dvae.encode_logits, static_argnums=0)
decode = jax.jit(dvae.decode, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def decode_stats(cfg, params, z):
    return dvae.DVAEDecoder(cfg).apply({"params": params["decoder"]}, z)


# --- the architecture ------------------------------------------------------------------------------------


def conv(x, w, b):
    """Compute cross-correlation with zero padding and stride 1; w is [k, k, in, out]."""
    k = len(w)
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    out = np.zeros((*x.shape[:1], height, width, w.shape[-1])) + b
    for i in range(k):
        for j in range(k):
            out += x[:, i : i + height, j : j + width] @ w[i, j]
    return out


def relu(x):
    return np.maximum(x, 0)


class Reference:
    """The published encoder and decoder with the published parameter names."""

    def __init__(self, cfg, params):
        ours = flat(params)
        self.cfg = cfg
        self.p = {name: np.asarray(ours[path], np.float64) for name, path in published_names(cfg).items()}

    def conv(self, x, name):
        return conv(x, self.p[f"{name}.w"], self.p[f"{name}.b"])

    def groups(self, x, part, between):
        layers = self.cfg.groups * self.cfg.blocks
        for g in range(1, self.cfg.groups + 1):
            for b in range(1, self.cfg.blocks + 1):
                name = f"{part}.blocks.group_{g}.block_{b}"
                y = x
                for c in range(1, 5):
                    y = self.conv(relu(y), f"{name}.res_path.conv_{c}")
                if f"{name}.id_path.w" in self.p:
                    x = self.conv(x, f"{name}.id_path")
                x = x + y / layers**2
            if g < self.cfg.groups:
                x = between(x)
        return x

    def encode(self, images):
        def pool(x):
            rows, columns = x.shape[1] // 2, x.shape[2] // 2
            out = np.zeros((len(x), rows, columns, x.shape[-1]))
            for i in range(rows):
                for j in range(columns):
                    out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
            return out

        x = self.conv(0.8 * images.astype(np.float64) + 0.1, "encoder.blocks.input")
        return self.conv(relu(self.groups(x, "encoder", pool)), "encoder.blocks.output.conv")

    def decode(self, z):
        def double(x):
            out = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[-1]))
            for i in range(out.shape[1]):
                for j in range(out.shape[2]):
                    out[:, i, j] = x[:, i // 2, j // 2]
            return out

        x = self.conv(z.astype(np.float64), "decoder.blocks.input")
        return self.conv(relu(self.groups(x, "decoder", double)), "decoder.blocks.output.conv")


def test_encoder_equals_the_reference(params, images):
    want = Reference(TINY, params).encode(images)
    got = encode_logits(TINY, params, images)
    assert got.shape == (2, 3, 3, 11) and got.dtype == jnp.float32 and want.std() > 0.3
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_encode_is_the_most_probable_code_in_raster_order(params, images):
    codes = jax.jit(dvae.encode, static_argnums=0)(TINY, params, images)
    want = Reference(TINY, params).encode(images).argmax(-1)
    assert codes.shape == (2, 9) and codes.dtype == jnp.int32 and len(np.unique(want)) > 2
    for b in range(2):
        for i in range(9):
            assert codes[b, i] == want[b, i // 3, i % 3]


def test_decoder_equals_the_reference(params):
    rng = np.random.default_rng(2)
    soft = rng.dirichlet(np.full(11, 0.3), (2, 3, 3)).astype(np.float32)
    want = Reference(TINY, params).decode(soft)
    got = decode_stats(TINY, params, soft)
    assert got.shape == (2, 6, 6, 6) and want.std() > 0.3
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_codes_are_one_hot_vectors(params):
    """A table lookup equals the 1x1 convolution of a one-hot vector; pixels are sigmoid(mu), unmapped."""
    codes = np.random.default_rng(3).integers(0, 11, (2, 9)).astype(np.int32)
    want = Reference(TINY, params).decode(np.eye(11)[codes.reshape(2, 3, 3)])
    want = np.clip((1 / (1 + np.exp(-want[..., :3])) - 0.1) / 0.8, 0, 1)
    got = np.asarray(decode(TINY, params, codes))
    assert got.shape == (2, 6, 6, 3) and got.dtype == np.float32
    assert got.min() >= 0 and got.max() <= 1 and got.std() > 0.1
    assert (got == 0).any() or (got == 1).any()  # so that clipping is tested
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "channels"), [(7, 3), (3, 2), (3, 4), (3, 5), (1, 6)])
def test_conv_equals_the_plain_one(size, channels):
    """In each of its faster forms."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 5, 6, channels)).astype(np.float32)
    p = {"kernel": rng.normal(size=(size, size, channels, 3)), "bias": rng.normal(size=3)}
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    got = dvae.Conv(3, size, dtype=jnp.float32).apply({"params": p}, x)
    names = ("NHWC", "HWIO", "NHWC")
    plain = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=names)
    np.testing.assert_allclose(got, plain + p["bias"][None, None, None], rtol=1e-4, atol=1e-4)
    by_loop = conv(x.astype(np.float64), np.asarray(p["kernel"]), np.asarray(p["bias"]))
    np.testing.assert_allclose(got, by_loop, rtol=1e-4, atol=1e-4)


def test_max_pool_gradient_has_one_winner_per_window():
    """It goes to the largest value, among equal values to one of them, so flat images train like others."""
    x = np.random.default_rng(5).normal(size=(1, 4, 4, 2)).astype(np.float32)
    x[0, :2, :2] = 0.5  # all equal
    weights = np.random.default_rng(6).normal(size=(1, 2, 2, 2)).astype(np.float32)
    got = np.asarray(jax.grad(lambda x: (dvae._max_pool(x) * weights).sum())(x))
    for i in range(2):
        for j in range(2):
            for c in range(2):
                window = np.s_[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
                (winner,) = np.flatnonzero(got[window])
                assert x[window].ravel()[winner] == x[window].max()
                assert got[window].ravel()[winner] == weights[0, i, j, c]


@pytest.mark.parametrize("cfg", [TINY, DVAEConfig()], ids=["tiny", "published"])
def test_parameters_are_the_published_ones(cfg):
    """Each has one published name; at full size the shapes are those of encoder.pkl and decoder.pkl."""
    ours, table = flat(shapes(cfg)), published_names(cfg)
    assert sorted(table.values()) == sorted(ours)
    if cfg is TINY:
        return
    hwio = {name: ours[path].shape for name, path in table.items()}
    assert hwio["encoder.blocks.input.w"] == (7, 7, 3, 256)
    assert hwio["encoder.blocks.output.conv.w"] == (1, 1, 2048, 8192)
    assert hwio["decoder.blocks.input.w"] == (1, 1, 8192, 128)
    assert hwio["decoder.blocks.output.conv.w"] == (1, 1, 256, 6)
    sizes = {"encoder": (256, 512, 1024, 2048), "decoder": (2048, 1024, 512, 256)}
    kernels = {"encoder": (3, 3, 3, 1), "decoder": (1, 3, 3, 3)}
    for part in sizes:
        inputs = {"encoder": 256, "decoder": 128}[part]
        for g, size in enumerate(sizes[part], 1):
            for b in (1, 2):
                name, narrow = f"{part}.blocks.group_{g}.block_{b}", size // 4
                into = (inputs, narrow, narrow, narrow)
                out = (narrow, narrow, narrow, size)
                for c, k in enumerate(kernels[part]):
                    assert hwio[f"{name}.res_path.conv_{c + 1}.w"] == (k, k, into[c], out[c])
                if inputs != size:
                    assert hwio[f"{name}.id_path.w"] == (1, 1, inputs, size)
                inputs = size
    skips = sorted(re.findall(r"(\w)\w+\.blocks\.group_(\d)\.block_(\d)\.id_path\.w", " ".join(table)))
    assert skips == [("d", str(g), "1") for g in (1, 2, 3, 4)] + [("e", str(g), "1") for g in (2, 3, 4)]


# --- losses and metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "b"), [(0.0, 1.0), (0.0, 0.3), (1.5, 0.5), (-2.0, 0.8), (0.7, 0.1)])
def test_logit_laplace_is_a_density(mu, b):
    """It integrates to 1 over (0, 1), by a sum with equal steps of the logit."""
    t = np.linspace(-14, 14, 40_001)
    x = 1 / (1 + np.exp(-t))
    nll = jax.jit(tokenizer_losses.logit_laplace_nll)(
        jnp.asarray(x, jnp.float32), jnp.float32(mu), jnp.float32(math.log(b))
    )
    mass = np.trapezoid(np.exp(-nll) * x * (1 - x), t)
    assert abs(mass - 1) < 2e-3


def test_logit_laplace_by_hand():
    """exp(-|logit x - mu| / b) / (2 b x (1 - x)); logit 0.8 = log 4."""
    nll = jax.jit(tokenizer_losses.logit_laplace_nll)(
        jnp.float32(0.8), jnp.float32(1.0), jnp.log(jnp.float32(0.5))
    )
    want = math.exp(-(math.log(4) - 1) / 0.5) / (2 * 0.5 * 0.8 * 0.2)
    np.testing.assert_allclose(math.exp(-nll), want, rtol=1e-5)
    nll = jax.jit(tokenizer_losses.logit_laplace_nll)(*map(jnp.float32, (0.5, 0.0, 0.0)))  # 1 / (2 / 4) = 2
    np.testing.assert_allclose(nll, -math.log(2), rtol=1e-6)


def test_pixel_map():
    """phi(x) = 0.8 x + 0.1 for x in [0, 1], and its inverse, clipped."""
    np.testing.assert_allclose(
        tokenizer_losses.map_pixels(jnp.array([0.0, 0.5, 1.0])), [0.1, 0.5, 0.9], rtol=1e-6
    )
    back = tokenizer_losses.unmap_pixels(jnp.array([0.05, 0.1, 0.3, 0.9, 0.97]))
    np.testing.assert_allclose(back, [0, 0, 0.25, 1, 1], atol=1e-6)


def test_kl_to_uniform():
    np.testing.assert_allclose(
        jax.jit(tokenizer_losses.kl_to_uniform)(jnp.full((2, 6), 3.7)), [0, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(tokenizer_losses.kl_to_uniform)(100.0 * jnp.eye(6)), np.full(6, math.log(6)), rtol=1e-6
    )
    # (3/4, 1/4) against (1/2, 1/2)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(
        jax.jit(tokenizer_losses.kl_to_uniform)(jnp.log(jnp.array([3.0, 1.0]))), want, rtol=1e-5
    )


def test_codebook_imbalance():
    """It is 0 for one-hot distributions that are balanced over the batch, and log V for one code."""
    assert abs(jax.jit(tokenizer_losses.codebook_imbalance)(100.0 * jnp.eye(6).reshape(2, 3, 6))) < 1e-5
    one = jnp.broadcast_to(100.0 * jnp.eye(6)[2], (4, 6))
    np.testing.assert_allclose(jax.jit(tokenizer_losses.codebook_imbalance)(one), math.log(6), rtol=1e-5)
    half = 100.0 * jnp.eye(6)[jnp.array([0, 1])]
    np.testing.assert_allclose(jax.jit(tokenizer_losses.codebook_imbalance)(half), math.log(3), rtol=1e-5)


def test_psnr():
    """An error of 0.1 everywhere is 20 dB, of 0.01 is 40 dB, per image; equal images have a finite value."""
    x = jnp.full((3, 2, 2, 3), 0.5)
    y = x.at[0].add(0.1).at[1].add(-0.01)
    np.testing.assert_allclose(jax.jit(tokenizer_losses.psnr)(x, y), [20.0, 40.0, 100.0], rtol=1e-3)
    one = jax.jit(tokenizer_losses.psnr)(x[:1], x[:1].at[0, 0, 0, 0].add(0.2))
    np.testing.assert_allclose(one, [-10 * math.log10(0.04 / 12)], rtol=1e-4)


def test_codebook_use():
    codebook_use = jax.jit(tokenizer_losses.codebook_use, static_argnums=1)
    use, perplexity = codebook_use(jnp.array([[0, 0, 3], [3, 0, 3]]), 8)
    np.testing.assert_allclose((use, perplexity), (2 / 8, 2.0), rtol=1e-5)
    use, perplexity = codebook_use(jnp.array([[5, 5]]), 4 + 4)
    np.testing.assert_allclose((use, perplexity), (1 / 8, 1.0), rtol=1e-5)
    use, perplexity = codebook_use(jnp.array([[0, 0, 0, 1]]), 2)
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    np.testing.assert_allclose((use, perplexity), (1.0, want), rtol=1e-5)


# --- the training loss -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(cfg, params, images, key, tau, kl_weight, code_usage_weight):
    weights = {"tau": tau, "kl_weight": kl_weight, "code_usage_weight": code_usage_weight}

    def value(params):
        return dvae.loss(cfg, params, images, key, **weights)

    return jax.value_and_grad(value, has_aux=True)(params)


def test_loss_by_hand(params, images):
    """Gumbel noise and temperature apply before the softmax; both terms are sums over an image divided by H W 3."""
    key, tau = jax.random.key(5), 0.7
    reference = Reference(TINY, params)
    logits = reference.encode(images)
    noisy = (logits + np.asarray(jax.random.gumbel(key, logits.shape), np.float64)) / tau
    soft = np.exp(noisy - noisy.max(-1, keepdims=True))
    soft /= soft.sum(-1, keepdims=True)
    stats = reference.decode(soft)
    x = 0.8 * images + 0.1
    mu, b = stats[..., :3], np.exp(stats[..., 3:])
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kl = (p * np.log(p * 11)).sum(-1)  # (2, 3, 3)
    values = 6 * 6 * 3
    want = {
        0.0: np.mean([-np.log(density[i]).sum() / values for i in range(2)]),
        2.5: np.mean([(-np.log(density[i]).sum() + 2.5 * kl[i].sum()) / values for i in range(2)]),
    }
    assert abs(want[2.5] - want[0.0]) > 0.01
    for beta, value in want.items():
        (got, metrics), _ = loss_and_grad(TINY, params, images, key, tau, beta, 0.0)
        np.testing.assert_allclose(got, value, rtol=1e-4)
    np.testing.assert_allclose(metrics["reconstruction"], want[0.0], rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-4)
    decoded = np.clip((1 / (1 + np.exp(-mu)) - 0.1) / 0.8, 0, 1)
    psnr = [-10 * math.log10(np.mean((decoded[i] - images[i]) ** 2)) for i in range(2)]
    np.testing.assert_allclose(metrics["psnr"], np.mean(psnr), rtol=1e-3)
    _, counts = np.unique(logits.argmax(-1), return_counts=True)
    np.testing.assert_allclose(metrics["codebook_use"], len(counts) / 11, rtol=1e-5)
    fraction = counts / counts.sum()
    np.testing.assert_allclose(metrics["perplexity"], np.exp(-(fraction * np.log(fraction)).sum()), rtol=1e-4)
    bounded = dataclasses.replace(TINY, min_scale=0.3)  # b + 0.3 instead of b
    (got, _) = jax.jit(lambda p: dvae.loss(bounded, p, images, key, tau=tau, kl_weight=0.0))(params)
    b += 0.3
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    np.testing.assert_allclose(got, -np.log(density).mean(), rtol=1e-4)
    (balanced, _), _ = loss_and_grad(TINY, params, images, key, tau, 0.0, 3.0)
    mean = p.mean((0, 1, 2))
    np.testing.assert_allclose(balanced - want[0.0], 3.0 * (mean * np.log(mean * 11)).sum(), rtol=1e-3)


def test_kl_weight_of_the_paper():
    """With 32 x 32 codes and 256 x 256 x 3 values it is beta / 192."""
    cfg = DVAEConfig()
    assert (256 * 256 * 3) / cfg.num_codes == 192 == cfg.image_size**2 * 3 / cfg.num_codes


def test_gradient_goes_through_the_relaxation(params, images):
    """Encoder and decoder get gradients from the reconstruction alone. The encoder's is that of the relaxed loss
    itself, so it equals the finite difference along it; a straight-through gradient would not."""
    key = jax.random.key(6)
    (value, _), grads = loss_and_grad(TINY, params, images, key, 1.0, 0.0, 0.0)
    for name, grad in flat(grads).items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-8, name
    for part in ("encoder", "decoder"):
        norm2 = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads[part]))
        size = 2e-3 / math.sqrt(norm2)
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda p, g, s=sign * size: p + s * g, params[part], grads[part])
            ends.append(loss_and_grad(TINY, {**params, part: moved}, images, key, 1.0, 0.0, 0.0)[0][0])
        slope = float(ends[0] - ends[1]) / (2 * size)
        np.testing.assert_allclose(slope, norm2, rtol=0.05)
    assert np.isfinite(value)


def test_noise_and_temperature_matter(params, images):
    def value(seed, tau):
        return float(loss_and_grad(TINY, params, images, jax.random.key(seed), tau, 0.0, 0.0)[0][0])

    assert value(0, 1.0) == value(0, 1.0) != value(1, 1.0)
    assert value(0, 1.0) != value(0, 0.1)


def test_bfloat16_convolutions(params, images):
    """Convolutions are in bfloat16, logits and loss in float32 and near those of float32."""
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    got, want = encode_logits(cfg, params, images), encode_logits(TINY, params, images)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.sqrt(np.mean((got - want) ** 2)) / np.std(want) < 0.05
    image = jax.eval_shape(lambda: dvae.decode(cfg, params, np.zeros((1, 9), np.int32)))
    assert image.dtype == jnp.float32


SMALLER = DVAEConfig(image_size=6, groups=2, blocks=1, width=8, decoder_width=5, vocab=11)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(dvae.init, static_argnums=0)(SMALLER, jax.random.key(0))


def test_init(fresh):
    """Parameters are float32, biases zero, kernels not, and no two kernels share a random key."""
    kernels = []
    for name, leaf in flat(fresh).items():
        assert leaf.dtype == jnp.float32
        if name.endswith("bias"):
            assert (leaf == 0).all(), name
        else:
            leaf = np.asarray(leaf).ravel()
            assert leaf.std() > 0.02, name
            kernels.append(leaf / leaf.std())
    units = np.concatenate(kernels)
    assert len(np.unique(units)) > 0.99 * len(units)


def test_initial_logits_have_a_moderate_scale(fresh, images):
    assert 0.03 < encode_logits(SMALLER, fresh, images).std() < 10


# --- schedules -------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    """A half-cosine: start, middle, a quarter at (1 + cos 45 degrees) / 2, end, and constant afterwards."""
    down = Schedule(start=1.0, end=0.2, steps=100)
    at = {0: 1.0, 25: 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 50: 0.6, 100: 0.2, 10_000: 0.2}
    for step, want in at.items():
        np.testing.assert_allclose(schedule_value(down, jnp.int32(step)), want, rtol=1e-5)
    up = Schedule(start=0.0, end=6.6, steps=5_000)
    for step, want in ((0, 0.0), (2_500, 3.3), (5_000, 6.6)):
        np.testing.assert_allclose(schedule_value(up, jnp.int32(step)), want, atol=1e-5)
    assert schedule_value(Schedule(start=3.0, end=0.5, steps=0), jnp.int32(0)) == 0.5
    assert schedule_value(down, jnp.int32(3)).dtype == jnp.float32


def test_schedules_of_the_paper():
    """A.2: tau 1 to 1/16 over 150,000 steps, beta from 0 to 6.6 over 5,000; no term but the bound."""
    cfg = DVAEConfig()
    assert cfg.tau == Schedule(start=1.0, end=0.0625, steps=150_000)
    assert cfg.kl_weight == Schedule(start=0.0, end=6.6, steps=5_000)
    assert cfg.code_usage_weight.start == cfg.code_usage_weight.end == cfg.min_scale == 0.0


# --- invalid input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images of shape \(batch, 6, 6, 3\), got \(2, 8, 8, 3\)"),
        (np.zeros((6, 6, 3), np.float32), r"got \(6, 6, 3\)"),
        (np.zeros((2, 6, 6, 4), np.float32), r"got \(2, 6, 6, 4\)"),
        (np.zeros((2, 6, 6, 3), np.uint8), r"float images in \[0, 1\], got uint8\. Divide"),
    ],
)
def test_invalid_images_raise(params, images, match):
    with pytest.raises(ValueError, match=match):
        dvae.encode(TINY, params, images)
    with pytest.raises(ValueError, match=match):
        dvae.loss(TINY, params, images, jax.random.key(0), tau=1.0, kl_weight=0.0)


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (np.zeros((2, 8), np.int32), r"codes of shape \(batch, 9\), got \(2, 8\)"),
        (np.zeros((2, 3, 3), np.int32), r"codes of shape \(batch, 9\), got \(2, 3, 3\)"),
        (np.zeros((2, 9), np.float32), r"int32 codes in \[0, 11\), got float32"),
    ],
)
def test_invalid_codes_raise(params, codes, match):
    with pytest.raises(ValueError, match=match):
        dvae.decode(TINY, params, codes)
