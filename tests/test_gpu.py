"""A GPU must agree with the CPU, and its sampler must not need more memory than reported: pytest -m gpu, on a machine
with one.

The CPU is the reference: the same functions with the same parameters in float32, products in full precision.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import DalleConfig, DiffusionConfig, DVAEConfig
from dalle_jax.models import autoregressive, dalle, dvae
from dalle_jax.models.diffusion import unet
from dalle_jax.nn import flash
from dalle_jax.nn.attention import dense_attention
from dalle_jax.nn.masks import attention_mask
from dalle_jax.sampling.generate import generate, row_keys

pytestmark = pytest.mark.gpu

CFG = DalleConfig(
    text_vocab=50, text_len=8, image_vocab=64, grid=8, dim=64, layers=4, heads=2, dtype="float32",
    attention=("full", "row", "column", "conv"), conv_kernel=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: jax runs on {jax.default_backend()}")


def on_both(fn, *args):
    """Return the results of `fn` on the GPU and on the CPU."""
    found = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("float32"):
            found.append(jax.device_get(jax.jit(fn)(*jax.device_put(args, device))))
    return found


def randomize(params, key=1):
    """Add noise to every leaf, so that no zero hides an error."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return tree.unflatten(
        [leaf + 0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


def rows(cfg, count):
    text = jax.random.randint(jax.random.key(2), (count, cfg.text_len), 0, cfg.text_vocab)
    return text, jax.random.randint(jax.random.key(3), (count, cfg.num_codes), 0, cfg.image_vocab)


def assert_near(got, want, rtol):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max() + 1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["full", "row", "conv"])
def test_cudnn_equals_dense_attention(kind):
    """Output and gradients in bfloat16, against dense attention in float32 on the same numbers."""
    length, width = CFG.text_len + CFG.num_codes, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (2, length, 3, width), jnp.bfloat16) for key in keys)
    mask = jnp.asarray(attention_mask(kind, CFG.text_len, CFG.grid))

    def run(attention_fn, *x):
        return jax.jit(jax.value_and_grad(lambda x: (attention_fn(*x) * weights).astype(jnp.float32).sum()))(
            x
        )

    got = run(lambda *x: flash.cudnn_attention(*x, None if kind == "full" else mask), q, k, v)
    with jax.default_matmul_precision("float32"):
        want = run(
            lambda q, k, v: dense_attention(q, k, v, mask), *(x.astype(jnp.float32) for x in (q, k, v))
        )
    assert_near(jax.tree.map(lambda x: np.asarray(x, np.float32), got[1]), want[1], 3e-2)


def test_transformer_loss_and_gradients():
    params, (text, codes) = randomize(dalle.init(CFG, jax.random.key(0))), rows(CFG, 4)
    cfg = dataclasses.replace(CFG, cond_drop_prob=0.0)

    def run(params, text, codes):
        return jax.value_and_grad(lambda p: dalle.loss(cfg, p, text, codes, jax.random.key(4))[0])(params)

    got, want = on_both(run, params, text, codes)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_near(got[1], want[1], 1e-3)


def test_greedy_codes_equal_those_of_the_cpu():
    """Every kind of layer and its cache, with guidance. Codes may differ where two logits are equal up to rounding."""
    params, (text, _) = randomize(dalle.init(CFG, jax.random.key(0))), rows(CFG, 4)

    def run(params, text):
        return generate(
            CFG, params, text, row_keys(range(4)), temperature=0.0, guidance_scale=jnp.float32(1.5)
        )

    got, want = on_both(run, params, text)
    scores = jax.jit(lambda p, t, c: dalle.logits(CFG, p, t, c)[1])
    for row in np.flatnonzero((got != want).any(axis=1)):
        position = int(np.argmax(got[row] != want[row]))
        with jax.default_device(jax.devices("cpu")[0]):
            codes = jnp.asarray(want[row])[None]
            own, none = (
                scores(params, t[None], codes)[0, position] for t in (text[row], dalle.null_text(CFG))
            )
        one, other = np.asarray(none + 1.5 * (own - none))[[got[row, position], want[row, position]]]
        assert abs(one - other) < 1e-3, (
            f"row {row}, code {position}: scores {one} on the GPU, {other} on the CPU"
        )


def test_tokenizer_and_unet():
    cfg = DVAEConfig(image_size=32, groups=3, blocks=1, width=16, decoder_width=16, vocab=64)
    params = dvae.init(cfg, jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    got, want = on_both(lambda p, x: dvae.decode(cfg, p, dvae.encode(cfg, p, x)), params, image)
    assert_near(got, want, 1e-3)

    net = DiffusionConfig(
        image_size=16, width=32, channel_multipliers=(1, 2), blocks=1, attention_sizes=(8,), dropout=0.0
    )
    weights = randomize(unet.init(net, jax.random.key(0)))
    noised = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    times, one = jnp.full((2,), 0.5), jnp.full((2,), 0.7)

    def predict(p, x):
        return unet.predict(net, p, x, times, one, one, unet.encode_conditions(net, p, unet.Conditions()))

    assert_near(*on_both(predict, weights, noised), 1e-3)


def test_the_sampler_needs_no_more_memory_than_reported():
    """`memory_analysis`, which `info --batch-size` and `--compile-only --sample` print, bounds the peak of the
    device."""
    device = jax.devices("gpu")[0]
    cfg = dataclasses.replace(CFG, dim=512, heads=8, layers=8, grid=16, dtype="bfloat16")
    params = jax.device_put(
        autoregressive.prepare_for_decode(cfg, dalle.init(cfg, jax.random.key(0))), device
    )
    text, keys = jax.device_put((rows(cfg, 64)[0], row_keys(range(64))), device)
    compiled = generate.lower(cfg, params, text, keys).compile()
    stats = compiled.memory_analysis()
    reported = stats.output_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    before = device.memory_stats()["bytes_in_use"]
    jax.block_until_ready(compiled(params, text, keys))
    taken = device.memory_stats()["peak_bytes_in_use"] - before
    assert 0.5 * reported < taken < 1.1 * reported, (
        f"{taken / 2**20:.0f} MiB were used, {reported / 2**20:.0f} MiB reported"
    )
