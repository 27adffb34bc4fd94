"""The kernels of a step's products, interpreted on a CPU, are the layers that they stand for, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families
from test_families import FAMILIES

from dalle_jax import autoregressive
from dalle_jax.nn.attention import GATES, Block, activate, norm
from dalle_jax.nn.linear_kernel import CHANNELS, ROWS, block_step, linear, serves
from dalle_jax.nn.matrices import affine, by_output, join, quantize

rng = np.random.default_rng(0)
BY_INPUT = {"attn": {"out": {"kernel": jnp.ones((2, 2))}}}


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def close(got, want, dtype):
    assert got.dtype == want.dtype
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=size * (1e-5 if dtype == jnp.float32 else 0.02))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_one_kernel_is_norm_product_activation_and_sum(kind, rows, dtype):
    """Channels and outputs are no multiples of the tiles."""
    channels, outputs = CHANNELS + 24, 40
    p = {"kernel": (normal(channels, outputs) / 20).astype(dtype), "bias": normal(outputs)}
    own = {"scale": normal(channels)} | ({"bias": normal(channels)} if kind == "layer" else {})
    x, residual = (3 + 2 * normal(rows, channels)).astype(dtype), normal(rows, outputs).astype(dtype)
    y = norm(kind).apply({"params": own}, x)
    want = residual + activate("gelu-tanh", affine(p, y, dtype))
    got = linear(
        by_output(p), x, dtype, norm=(kind, own, 1e-5), activation="gelu-tanh", residual_BF=residual, interpret=True
    )  # fmt: skip
    close(got, want, dtype)
    close(linear(by_output(p), x, dtype, out=jnp.float32, interpret=True), affine(p, x, jnp.float32), dtype)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_matrices_in_8_bits(weights):
    p = quantize({"kernel": normal(70, 20), "bias": normal(20)}, weights)
    x = normal(2, 70)
    close(linear(by_output(p), x, jnp.float32, interpret=True), affine(p, x, jnp.float32), jnp.float32)


@pytest.mark.parametrize(
    "choices",
    [
        {"activation": "gelu-tanh"},
        {"activation": "gelu", "sandwich": True, "qk_norm": True},
        {"activation": "swiglu", "norm": "rms", "biases": False},
        {"activation": "geglu"},
    ],
    ids=lambda choices: choices["activation"],
)
def test_a_step_is_the_block(choices):
    """Each family's block, with attention that only mixes its arguments."""
    block = Block(heads=2, mlp_width=24, out_std=0.1, dtype=jnp.float32, **{"qk_norm": False, **choices})
    x = normal(3, 1, 16)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, jnp.ones((1, 1), bool))["params"]
    params = jax.tree.map(lambda s: normal(*s.shape), shapes)
    turns = jnp.stack([jnp.cos(jnp.arange(4.0)), jnp.sin(jnp.arange(4.0))])[None, None]

    def look(q, k, v):
        return q * k + v, (k, v)

    want, (k, v) = block.apply({"params": params}, x, look=look, turns=turns)
    got, cache = block_step(block, by_output(join(params)), x, look, turns, interpret=True)
    close(got, want, jnp.float32)
    close(cache[0], k, jnp.float32)
    close(cache[1], v, jnp.float32)
    assert (choices["activation"] in GATES) == ("gate_up" in join(params)["mlp"])


@pytest.mark.parametrize("name", ["mindalle", "llamagen"])
def test_scores_are_those_of_xla(name):
    cfg = FAMILIES[name]
    ready = autoregressive.unstack(cfg, test_families.lively(cfg), platform="gpu")
    assert serves(ready, 2) and not serves(ready, ROWS + 1)
    text, codes = test_families.rows(cfg, 2)
    _, cache = autoregressive.prefill(cfg, ready, text)
    step = jax.jit(autoregressive.decode_step, static_argnums=(0, 5))
    (want, _), (got, _) = (
        step(cfg, ready, cache, codes[:, 0], 0, how) for how in ("xla", "pallas-interpret")
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for other in (
        autoregressive.unstack(cfg, test_families.lively(cfg), "w8a8", platform="gpu"),
        {"blocks": (BY_INPUT,)},
    ):
        assert not serves(other, 1)
