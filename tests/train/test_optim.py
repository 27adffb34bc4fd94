"""Schedule, weight decay mask, optimizers and averaged parameters against values computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.config import OptimConfig
from dalle_jax.train.optim import decay_mask, learning_rate, make_optimizer, update_ema


def test_cosine_schedule_by_hand():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=4, final_lr_ratio=0.25)
    rate = learning_rate(cfg, steps=12)
    by_hand = {
        0: 0.0,
        1: 0.25,
        3: 0.75,
        4: 1.0,
        6: 0.25 + 0.75 * (1 + math.sqrt(0.5)) / 2,
        8: 0.625,
        12: 0.25,
    }
    for count, want in by_hand.items():
        assert float(rate(count)) == pytest.approx(want, rel=1e-6), count
    assert float(rate(50)) == pytest.approx(0.25)


def test_decay_steps_set_the_end_of_the_schedule():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=0, final_lr_ratio=0.0, decay_steps=4)
    rate = learning_rate(cfg, steps=1000)
    assert [round(float(rate(i)), 6) for i in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]


def test_constant_schedule_and_warmup_longer_than_the_run():
    constant = learning_rate(OptimConfig(learning_rate=2.0, warmup_steps=2, schedule="constant"), steps=3)
    assert [float(constant(i)) for i in range(5)] == [0.0, 1.0, 2.0, 2.0, 2.0]
    short = learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=10, final_lr_ratio=0.5), steps=4)
    assert float(short(4)) == pytest.approx(0.4) and float(short(10)) == pytest.approx(0.5)


def test_weight_decay_applies_to_kernels_only():
    params = {
        "text_embed": jnp.ones((5, 3)),
        "blocks": {
            "norm_attn": {"scale": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))},
            "attn": {
                "q": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
                "q_scale": jnp.ones((2, 3)),
            },
        },
    }
    mask = decay_mask(params)
    assert jax.tree.leaves(mask).count(True) == 1 and mask["blocks"]["attn"]["q"]["kernel"]

    cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    tx = make_optimizer(cfg, 10, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["attn"]["q"]["kernel"], -0.05, rtol=1e-6)
    updates["blocks"]["attn"]["q"]["kernel"] = jnp.zeros(())
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_frozen_parameters_keep_their_values_and_have_no_state():
    params = {name: {"kernel": jnp.ones((4, 3))} for name in ("t5", "head")}
    for optimizer in ("adamw", "adafactor"):
        cfg = OptimConfig(
            optimizer=optimizer, learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1.0
        )
        tx = make_optimizer(cfg, 10, params)
        state = tx.init(params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        assert not updates["t5"]["kernel"].any() and updates["head"]["kernel"].all()
        alone = make_optimizer(cfg, 10, {"head": params["head"]}).init({"head": params["head"]})
        assert sum(x.size for x in jax.tree.leaves(state)) == sum(x.size for x in jax.tree.leaves(alone))


def test_first_adam_update_and_clipping():
    params = {"head": {"kernel": jnp.zeros((2,)), "bias": jnp.zeros((2,))}}
    grads = {"head": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([0.0, 4.0])}}
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=1.0, b1=0.0, b2=0.0)
    tx = make_optimizer(cfg, 10, params)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], [-0.1, 0.0], atol=1e-6)
    mu = optax.tree.get(state, "mu")  # b1 = 0: the clipped gradient itself; norm 5 clipped to 1
    np.testing.assert_allclose(mu["head"]["kernel"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(mu["head"]["bias"], [0.0, 0.8], rtol=1e-6)
    off = make_optimizer(OptimConfig(clip_norm=0.0), 10, params)
    assert len(off.init(params)) == 1 and len(tx.init(params)) == 2


def test_ema_by_hand():
    cfg = OptimConfig(ema_decay=0.9, ema_every=2)
    ema = {"a": jnp.array([1.0, 0.3], jnp.float32)}
    new = {"a": jnp.array([2.0, 0.1], jnp.float32)}
    for step in (0, 1, 3):
        np.testing.assert_array_equal(update_ema(ema, new, cfg, step)["a"], ema["a"])
    np.testing.assert_allclose(update_ema(ema, new, cfg, 2)["a"], [1.9, 0.12], rtol=1e-6)  # d = 1/10
    np.testing.assert_allclose(update_ema(ema, new, cfg, 4)["a"][0], 1 * 2 / 11 + 2 * 9 / 11, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, new, cfg, 2000)["a"][0], 1.1, rtol=1e-6)  # d = 0.9 in the end
    traced = jax.jit(lambda s: update_ema(ema, new, cfg, s))(jnp.int32(4))
    np.testing.assert_allclose(traced["a"], update_ema(ema, new, cfg, 4)["a"], rtol=1e-6)


# --- smaller optimizer states -------------------------------------------------------------------------------


def test_bfloat16_moments_approximate_float32():
    """Half the bytes; after 40 noisy gradients the update differs from AdamW's by a few percent."""
    params = {"head": {"kernel": jnp.zeros((64, 64))}}
    found = {}
    for name in ("adamw", "adamw_bf16"):
        cfg = OptimConfig(
            optimizer=name, learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0
        )
        tx = make_optimizer(cfg, 100, params)
        update, state = jax.jit(tx.update), tx.init(params)
        first = jax.tree.map(lambda leaf: leaf.dtype, state)
        for i in range(40):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (64, 64))
            updates, state = update({"head": {"kernel": 0.3 + noise}}, state, params)
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == first  # the dtypes do not change
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
        found[name] = updates["head"]["kernel"], {m.dtype for m in moments}, sum(m.nbytes for m in moments)
    want, kinds, size = found["adamw"]
    got, own_kinds, own_size = found["adamw_bf16"]
    assert kinds == {jnp.dtype("float32")} and own_kinds == {jnp.dtype("bfloat16")} and own_size * 2 == size
    assert got.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    assert 1e-4 < error < 0.05


def test_bfloat16_moments_need_a_small_b2():
    with pytest.raises(ValueError, match=r"of at most 0\.99 with adamw_bf16, got 0\.9 and 0\.999"):
        OptimConfig(optimizer="adamw_bf16", b2=0.999)


def test_first_adafactor_update_by_hand():
    """The square of a gradient a_i b_j is a product of row and column means, so every entry moves by the learning rate.

    The state of a 128 x 256 matrix has 128 + 256 sums.
    """
    gradient = jnp.outer(1.0 + jnp.arange(128.0), jnp.where(jnp.arange(256) % 2, 3.0, -1.0))
    params = {"head": {"kernel": jnp.zeros((128, 256))}}
    cfg = OptimConfig(
        optimizer="adafactor",
        learning_rate=0.5,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        clip_norm=0,
    )
    tx = make_optimizer(cfg, 10, params)
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 128 + 256 + 10
    updates, _ = tx.update({"head": {"kernel": gradient}}, state, params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.5 * jnp.sign(gradient), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adafactor"])
def test_weight_decay_applies_to_kernels_only_in_each_optimizer(name):
    params = {"head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    cfg = OptimConfig(
        optimizer=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5
    )
    tx = make_optimizer(cfg, 10, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["head"]["bias"])
