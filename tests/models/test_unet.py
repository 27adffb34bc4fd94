"""Tests of the U-Net, its loss and its denoiser: conditions, independent rows, equal results on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import CodesConfig, DiffusionConfig, MeshConfig, NoiseConfig, TextEncoderConfig
from dalle_jax.models.diffusion import denoise, loss, text_encoder, unet
from dalle_jax.models.diffusion.likelihood import bits_per_dim, log_likelihood
from dalle_jax.models.diffusion.schedule import alpha_sigma
from dalle_jax.nn.norm import GroupNorm
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, param_shardings

# All options: patches, two levels, attention with captions, labels, codes, a low-resolution image.
CFG = DiffusionConfig(
    image_size=16, patch_size=2, width=8, channel_multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_dim=4,
    scale_shift_norm=True, resample="block", dropout=0.1, text=TextEncoderConfig(text_vocab=11, text_len=3, dim=8,
    layers=2,
    heads=2, mlp_ratio=2), num_classes=3, codes=CodesConfig(vocab=7, grid=4, width=3), low_res_size=4,
    cond_drop_prob=0.5,
    noise=NoiseConfig(kind="cosine"), prediction="v",
)  # fmt: skip
# A network of one level without conditions.
PLAIN = DiffusionConfig(
    image_size=8, patch_size=2, width=8, channel_multipliers=(1,), blocks=1, attention_sizes=(), dropout=0.0,
    noise=NoiseConfig(kind="cosine"),
)  # fmt: skip
CONDITIONED = dataclasses.replace(
    PLAIN, text=CFG.text, num_classes=3, prediction="v", dropout=0.1, cond_drop_prob=0.5
)
B = 8
# Without compiler optimizations, as these programs run once or twice.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(cfg, seed=0):
    """Return parameters without zeros: the initial ones predict 0 for every input."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: unet.init(cfg, jax.random.key(0)))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


def images(rows=B, side=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(rows, side, side, 3)), jnp.float32)


def random_conditions(rows=B, seed=1):
    rng = np.random.default_rng(seed)
    return unet.Conditions(
        text=jnp.asarray(rng.integers(0, 14, (rows, 3)), jnp.int32),
        label=jnp.asarray(rng.integers(0, 3, rows), jnp.int32),
        codes=jnp.asarray(rng.integers(0, 7, (rows, 16)), jnp.int32),
        low_res=2 * images(rows, 4, seed) - 1,
    )


@fast_jit
def _predict(params, x, t_B, conditions):
    at = alpha_sigma(CFG.noise, t_B)
    encoded = unet.encode_conditions(CFG, params, conditions)
    return unet.predict(CFG, params, x, t_B, at.alpha, at.sigma, encoded)


def predict(params, x, conditions):
    return np.asarray(_predict(params, x, jnp.linspace(0.1, 0.9, len(x)), conditions))


def test_patchify():
    """A patch holds its pixels row by row, colors last; unpatchify inverts it."""
    x = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = unet.patchify(x, 2)
    want = [*x[1, 2, 0], *x[1, 2, 1], *x[1, 3, 0], *x[1, 3, 1]]
    np.testing.assert_array_equal(patches[1, 1, 0], want)
    np.testing.assert_array_equal(unet.unpatchify(patches, 2), x)


def test_timestep_embedding_by_hand():
    got = np.asarray(unet.timestep_embedding(jnp.array([0.0, 2.0]), 4))  # rates 1 and 1 / 10,000
    np.testing.assert_allclose(got[0], [0, 0, 1, 1], atol=1e-7)
    np.testing.assert_allclose(got[1], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], rtol=1e-5)


def test_every_condition_has_an_effect_in_its_row_only(params):
    x, conditions = images(), random_conditions()
    before = predict(params, x, conditions)
    for name, value in conditions._asdict().items():
        other = value.at[2].set((value[2] + 1) % 3 if name != "low_res" else -value[2])
        after = predict(params, x, conditions._replace(**{name: other}))
        changed = np.abs(after - before).max(axis=(1, 2, 3))
        assert changed[2] > 1e-3, name
        np.testing.assert_allclose(np.delete(changed, 2), 0, atol=1e-5, err_msg=name)
    after = predict(params, x.at[2].add(0.5), conditions)
    assert np.flatnonzero(np.abs(after - before).max(axis=(1, 2, 3)) > 1e-4).tolist() == [2]


def test_group_norm_equals_the_reference():
    """NumPy in float64; fewer groups where the channels are not divisible."""
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(3.0, 2.0, (2, 3, 5, 12)), rng.normal(size=12), rng.normal(size=12)
    for asked, groups in ((3, 3), (8, 4), (5, 1)):
        split = x.reshape(2, 15, groups, -1)
        mean, var = (f(split, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
        want = ((split - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        got = GroupNorm(asked).apply({"params": params}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_group_norm_keeps_the_time_embedding():
    """With groups of one channel a norm would remove what is equal at every position, so there are fewer groups."""
    params, x, ones = random_params(PLAIN), 2 * images(2, 8) - 1, jnp.ones(2)
    encoded = unet.encode_conditions(PLAIN, params, unet.Conditions())

    def predict_at(cfg, t):
        return np.asarray(unet.predict(cfg, params, x, t * ones, 0.6 * ones, 0.8 * ones, encoded))

    assert np.abs(predict_at(PLAIN, 0.2) - predict_at(PLAIN, 0.9)).max() > 1e-2
    single = dataclasses.replace(PLAIN, norm_groups=8)
    np.testing.assert_allclose(predict_at(single, 0.2), predict_at(single, 0.9), atol=1e-3)


def test_null_text_is_every_pad_token():
    np.testing.assert_array_equal(text_encoder.null_text(CFG.text), [11, 12, 13])
    null = loss.null_conditions(CFG, random_conditions())
    np.testing.assert_array_equal(null.text, [[11, 12, 13]] * B)
    np.testing.assert_array_equal(null.label, [3] * B)
    np.testing.assert_array_equal(null.codes, random_conditions().codes)


_loss = fast_jit(loss.loss, static_argnums=0, static_argnames="train")


def test_the_initial_network_predicts_zero():
    """Its last convolution is 0, so the loss of x_0 is the mean square of the images."""
    cfg = dataclasses.replace(PLAIN, prediction="x0")
    params = fast_jit(lambda: unet.init(cfg, jax.random.key(0)))()
    x = images(side=8)
    value, metrics = _loss(cfg, params, x, unet.Conditions(), jax.random.key(1))
    np.testing.assert_allclose(value, np.mean((2 * np.asarray(x) - 1) ** 2), rtol=1e-5)
    bands = [float(metrics[f"band_{i}"]) for i in (1, 2, 3, 4)]  # 8 spread times: two rows in each quarter
    np.testing.assert_allclose(np.mean(bands), value, rtol=1e-5)


def test_bands_are_rows_by_time():
    """With images of value 0, except 1 in the row of the latest time, only the last band has a loss."""
    cfg = dataclasses.replace(PLAIN, prediction="x0")
    params = jax.tree.map(jnp.zeros_like, random_params(cfg))
    key = jax.random.key(3)
    t_B = loss.low_discrepancy_times(cfg.noise, jax.random.split(key, 4)[0], B)
    x = jnp.full((B, 8, 8, 3), 0.5).at[int(jnp.argmax(t_B))].set(1.0)
    _, metrics = _loss(cfg, params, x, unet.Conditions(), key)
    got = [float(metrics[f"band_{i}"]) for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(got, [0, 0, 0, 0.5], atol=1e-6)  # the last band holds two rows


def text_and_label(rows=B):
    return unet.Conditions(text=random_conditions(rows).text, label=random_conditions(rows).label)


def test_training_drops_conditions_and_units():
    """Captions and labels by `cond_drop_prob`, units by `dropout`; evaluation drops nothing."""
    params, key, conditions = random_params(CONDITIONED), jax.random.key(0), text_and_label()
    other = conditions._replace(text=(conditions.text + 1) % 11, label=(conditions.label + 1) % 3)

    def value(cond_drop_prob, dropout, train, conditions=conditions):
        cfg = dataclasses.replace(CONDITIONED, cond_drop_prob=cond_drop_prob, dropout=dropout)
        return float(_loss(cfg, params, images(side=8), conditions, key, train=train)[0])

    no_drop = value(0.0, 0.0, True)
    assert value(1.0, 0.0, True) == pytest.approx(value(1.0, 0.0, True, other), rel=1e-6)
    assert abs(no_drop - value(0.0, 0.0, True, other)) > 1e-4 and abs(no_drop - value(1.0, 0.0, True)) > 1e-4
    assert abs(no_drop - value(0.0, 0.1, True)) > 1e-4
    assert value(1.0, 0.1, False) == pytest.approx(no_drop, rel=1e-5)


def test_remat_and_bfloat16():
    cfg, key, x = dataclasses.replace(PLAIN, prediction="v"), jax.random.key(0), images(side=8)
    params = random_params(cfg)

    def value_and_grad(cfg):
        value, grads = fast_jit(
            jax.value_and_grad(lambda p: loss.loss(cfg, p, x, unet.Conditions(), key)[0])
        )(params)
        return float(value), np.asarray(grads["unet"]["conv_in"]["kernel"])

    want, grads = value_and_grad(cfg)
    got, again = value_and_grad(dataclasses.replace(cfg, remat=True))
    assert got == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(again, grads, rtol=1e-3, atol=1e-4 * np.abs(grads).max())
    half = float(_loss(dataclasses.replace(cfg, dtype="bfloat16"), params, x, unet.Conditions(), key)[0])
    assert half == pytest.approx(want, rel=0.05) and half != want


def test_eight_devices_are_one():
    """Loss and gradients under a mesh that splits rows, parameters and heads."""
    cfg = dataclasses.replace(CONDITIONED, head_dim=4)
    params, key = random_params(cfg), jax.random.key(0)
    step = fast_jit(jax.value_and_grad(lambda p, x, conditions: loss.loss(cfg, p, x, conditions, key)[0]))
    want, grads = step(params, images(side=8), text_and_label())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, param_shardings(mesh, params))
        got, again = step(spread, *jax.device_put((images(side=8), text_and_label()), batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1e-3, float(jnp.abs(b).max())))


# --- the denoiser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioned_params():
    return random_params(CONDITIONED)


def denoised(params, conditions, *, use_cfg, clip="none", **settings):
    encoded = denoise.encode_conditions_cfg(CONDITIONED, params, conditions, use_cfg=use_cfg)
    context = denoise.DenoiserContext(params, encoded, **settings)
    at = alpha_sigma(CONDITIONED.noise, 0.5)
    denoiser = fast_jit(denoise.make_denoiser(CONDITIONED, use_cfg=use_cfg, clip=clip))
    return np.asarray(denoiser(context, 2 * images(4, 8) - 1, 0.5, at.alpha, at.sigma))


def test_guidance_extrapolates_from_null_through_the_condition(conditioned_params):
    params, conditions = conditioned_params, text_and_label(4)
    cond, null = (
        denoised(params, c, use_cfg=False)
        for c in (conditions, loss.null_conditions(CONDITIONED, conditions))
    )
    assert np.abs(cond - null).max() > 0.01
    for scale, want in ((1.0, cond), (0.0, null), (3.0, null + 3 * (cond - null))):
        got = denoised(params, conditions, use_cfg=True, guidance_scale=jnp.float32(scale))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    outside = denoised(
        params, conditions, use_cfg=True, guidance_scale=jnp.float32(3), guidance_low=jnp.float32(0.6)
    )  # t is 0.5
    np.testing.assert_allclose(outside, cond, rtol=1e-4, atol=1e-4 * np.abs(cond).max())


def test_clipping_of_x0(conditioned_params):
    params, conditions = conditioned_params, text_and_label(4)
    unclipped = denoised(params, conditions, use_cfg=False)
    assert np.abs(unclipped).max() > 1.5  # so that clipping has an effect
    np.testing.assert_allclose(
        denoised(params, conditions, use_cfg=False, clip="range"), np.clip(unclipped, -1, 1), atol=1e-5
    )
    got = denoised(params, conditions, use_cfg=False, clip="quantile", quantile=jnp.float32(0.9))
    s = np.maximum(np.quantile(np.abs(unclipped).reshape(4, -1), 0.9, axis=1), 1)[:, None, None, None]
    np.testing.assert_allclose(got, np.clip(unclipped, -s, s) / s, rtol=1e-4, atol=1e-4)


def test_a_denoiser_is_made_once():
    """Samplers are compiled per function, so another one for the same options would compile again."""
    assert denoise.make_denoiser(CFG, use_cfg=True) is denoise.make_denoiser(
        dataclasses.replace(CFG), use_cfg=True
    )
    assert denoise.make_denoiser(CFG, use_cfg=True) is not denoise.make_denoiser(CFG)


def test_likelihood_of_a_network_in_bfloat16():
    """It exists, although products in bfloat16 have no forward mode, and rounding changes it by little."""
    cfg = dataclasses.replace(PLAIN, prediction="v")
    params, x = random_params(cfg), 2 * images(2, 8) - 1
    context = denoise.DenoiserContext(params, unet.encode_conditions(cfg, params, unet.Conditions()))
    by_dtype = []
    for dtype in ("float32", "bfloat16"):
        denoiser = denoise.make_denoiser(dataclasses.replace(cfg, dtype=dtype), clip="none")
        nats = log_likelihood(cfg.noise, denoiser, context, x, jax.random.key(0), num_steps=4)
        by_dtype.append(np.asarray(bits_per_dim(nats, 8 * 8 * 3)))
    np.testing.assert_allclose(*by_dtype, rtol=2**-7)


def test_exploding_noise_is_scaled_for_the_network():
    """The input of the network at sigma 50 equals that at the same time without noise for the scaled image."""
    cfg = dataclasses.replace(PLAIN, noise=NoiseConfig(kind="ve"), prediction="score")
    params, x = random_params(cfg), 2 * images(2, 8) - 1
    encoded = unet.encode_conditions(cfg, params, unet.Conditions())
    t, ones = jnp.full(2, 0.7), jnp.ones(2)
    at_50 = unet.predict(cfg, params, x * jnp.sqrt(1 + 50.0**2), t, ones, 50 * ones, encoded)
    at_0 = unet.predict(dataclasses.replace(cfg, prediction="eps"), params, x, t, ones, 0 * ones, encoded)
    np.testing.assert_allclose(np.asarray(at_50) * 50, at_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text": None}, "the condition text of this model, got none"),
        ({"label": None}, "the condition label of this model, got none"),
        ({"low_res": None}, "the condition low_res of this model, got none"),
        ({"text": jnp.zeros((8, 4), jnp.int32)}, r"text of integers \(batch, 3\), got int32 \(8, 4\)"),
        ({"codes": jnp.zeros((8, 9), jnp.int32)}, r"codes of shape \(batch, 16\), got \(8, 9\)"),
        ({"low_res": jnp.zeros((8, 5, 5, 3))}, r"low_res of shape \(batch, 4, 4, 3\), got \(8, 5, 5, 3\)"),
    ],
)
def test_invalid_conditions_raise(change, match):
    with pytest.raises(ValueError, match=match):
        unet.encode_conditions(CFG, {"text_encoder": {}}, random_conditions()._replace(**change))


def test_unused_conditions_and_other_sizes_raise():
    with pytest.raises(ValueError, match="no condition label"):
        unet.encode_conditions(PLAIN, {}, unet.Conditions(label=jnp.zeros(2, jnp.int32)))
    with pytest.raises(ValueError, match=r"images of shape \(2, 8, 8, 3\), got \(2, 9, 8, 3\)"):
        unet.predict(PLAIN, {}, jnp.zeros((2, 9, 8, 3)), jnp.ones(2), jnp.ones(2), jnp.ones(2), None)
