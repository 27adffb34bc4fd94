"""Tests of the Transformer options in the combinations of public model families.

Cached logits equal uncached ones, no position depends on the future, every parameter has one sharding rule and a
gradient. The parity tests compare the families with their reference implementations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, TINY_FAMILY, family_batch, family_params

from dalle_jax.config import BartConfig, DalleConfig, T5Config
from dalle_jax.models import autoregressive, dalle
from dalle_jax.nn.rope import apply_rope, axial_rope_table
from dalle_jax.parallel.sharding import param_axes, path_name

family = pytest.mark.parametrize("cfg", FAMILIES.values(), ids=FAMILIES)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, text_BT, codes_BN):
    return autoregressive.logits(cfg, params, text_BT, codes_BN)


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached_logits(cfg, params, text_CT, codes_BN, prefix_len):
    """Compute image logits from position `prefix_len` on over the caches; two samples per caption, with guidance."""
    params = autoregressive.prepare_for_decode(cfg, params)
    first, cache = autoregressive.prefill(
        cfg, params, text_CT, codes_BN[:, :prefix_len], samples_per_caption=2, use_cfg=True
    )

    def step(cache, position):
        code_B = codes_BN[:, position]
        logits_BV, cache = autoregressive.decode_step(
            cfg, params, cache, jnp.concatenate([code_B, code_B]), position
        )
        return cache, logits_BV

    _, rest = jax.lax.scan(step, cache, prefix_len + jnp.arange(cfg.num_codes - 1 - prefix_len))
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


@family
def test_cached_equals_uncached(cfg):
    params = family_params(cfg)
    text, codes = family_batch(cfg, 4)
    captions = text[:2]
    own = logits(cfg, params, jnp.repeat(captions, 2, axis=0), codes)[1]
    nulls = jnp.broadcast_to(autoregressive.null_text(cfg), text.shape)
    if isinstance(cfg, DalleConfig):
        nulls = dalle.null_texts(cfg, jnp.repeat(captions, 2, axis=0))
    null = logits(cfg, params, nulls, codes)[1]
    want = np.concatenate([own, null])
    assert want.std() > 0.2 and np.abs(own - null).max() > 0.1
    for prefix_len in (0, 6):
        got = cached_logits(cfg, params, captions, codes, prefix_len)
        np.testing.assert_allclose(got, want[:, prefix_len:], rtol=2e-4, atol=2e-4)


@family
def test_no_future_leak(cfg):
    params = family_params(cfg)
    text, codes = family_batch(cfg, 1)
    changed = (codes + 1) % cfg.image_vocab
    many = jnp.stack(
        [jnp.where(jnp.arange(cfg.num_codes) >= t, changed[0], codes[0]) for t in range(cfg.num_codes)]
    )
    got = logits(cfg, params, jnp.repeat(text, len(many), axis=0), many)[1]
    want = logits(cfg, params, jnp.repeat(text, len(many), axis=0), jnp.repeat(codes, len(many), axis=0))[1]
    for t in range(cfg.num_codes - 1):
        np.testing.assert_allclose(got[t, : t + 1], want[t, : t + 1], rtol=1e-5, atol=1e-5)
        assert np.abs(got[t, t + 1] - want[t, t + 1]).max() > 1e-3


@family
def test_every_parameter_has_a_rule_and_a_gradient(cfg):
    params = family_params(cfg)
    text, codes = family_batch(cfg, 3)
    cfg = dataclasses.replace(cfg, cond_drop_prob=0.3)
    loss = jax.jit(lambda p: autoregressive.loss(cfg, p, text, codes, jax.random.key(3))[0])
    grads = jax.grad(loss)(params)
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = path_name(path)
        param_axes(name, grad.shape)
        if name.startswith("t5/"):  # frozen
            assert not grad.any()
        elif name != "blocks/attn/k/bias":  # softmax cancels it
            assert np.abs(grad).max() > 1e-6, name


def test_padding_is_the_pad_piece():
    """Pad tokens are mapped to `pad_id`, as inputs and as targets of the text head."""
    cfg = FAMILIES["mindalle"]
    params = family_params(cfg)
    text, codes = family_batch(cfg)
    spelled = jnp.where(text < cfg.text_vocab, text, cfg.pad_id)
    for one, other in zip(logits(cfg, params, text, codes), logits(cfg, params, spelled, codes), strict=True):
        np.testing.assert_array_equal(one, other)
    key = jax.random.key(0)
    assert (
        autoregressive.loss(cfg, params, text, codes, key)[0]
        == autoregressive.loss(cfg, params, spelled, codes, key)[0]
    )
    assert params["text_embed"].shape[0] == cfg.text_vocab


def test_the_encoder_masks_padding():
    """Piece 1 and pad tokens are equal, their positions have no effect, and a truncated caption keeps its end token."""
    cfg = FAMILIES["dalle_mini"]
    params = family_params(cfg)
    codes = family_batch(cfg, 4)[1][:1].repeat(4, axis=0)
    text = np.array([[0, 5, 2, 11, 12], [0, 5, 2, 1, 1], [0, 5, 6, 7, 8], [0, 5, 6, 7, 2]])
    got = logits(cfg, params, jnp.asarray(text), codes)[1]
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[2], got[3])
    moved = dict(params, text_pos=params["text_pos"].at[3:].multiply(-3.0))
    other = logits(cfg, moved, jnp.asarray(text), codes)[1]
    np.testing.assert_array_equal(other[:2], got[:2])
    assert np.abs(other[2:] - got[2:]).max() > 1e-2


def test_an_encoded_caption_does_not_depend_on_text_len():
    """Logits with text_len 3 equal those with text_len 6, also of a null caption, which uses the last vectors. A
    caption of text_len pieces was truncated, and keeps its end token."""
    small = FAMILIES["llamagen_t2i"]
    large = dataclasses.replace(small, text_len=6)
    params = family_params(large)
    cut = dict(params, text_null=params["text_null"][3:])
    codes = family_batch(small, 4)[1]
    text = np.array([[4, 1, 8, 0, 0, 0], [1, 7, 8, 0, 0, 0], [2, 5, 1, 0, 0, 0], [6, 7, 7, 0, 0, 0]])
    wide = np.where(text > 0, text, np.array([[9, 9, 9, 9, 9, 9]] * 3 + [[7] * 6]))
    want = logits(small, cut, jnp.asarray(text[:, :3], jnp.int32), codes)[1]
    got = logits(large, params, jnp.asarray(wide, jnp.int32), codes)[1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (
        np.abs(want[:-1] - logits(small, cut, jnp.asarray(text[1:, :3], jnp.int32), codes[:-1])[1]).max()
        > 0.1
    )
    ended, unended = jnp.asarray([[2, 5, 1]], jnp.int32), jnp.asarray([[2, 5, 3]], jnp.int32)
    np.testing.assert_array_equal(
        logits(small, cut, ended, codes[:1])[1], logits(small, cut, unended, codes[:1])[1]
    )
    np.testing.assert_array_equal(
        dalle.null_texts(large, wide), np.minimum(np.arange(6) + 6, [[7], [6], [8], [7]])
    )


def test_a_resized_decoder_cache():
    """Logits with room for the start token and 8 codes equal those with room for all; rows may be at different
    positions."""
    cfg = FAMILIES["dalle_mini"]
    params = autoregressive.prepare_for_decode(cfg, family_params(cfg))
    text, codes = family_batch(cfg, 2)
    _, cache = jax.jit(autoregressive.prefill, static_argnums=0)(cfg, params, text, codes[:, :6])
    step = jax.jit(autoregressive.decode_step, static_argnums=0)
    want, _ = step(cfg, params, cache, codes[:, 6], jnp.int32(6))
    small = autoregressive.resize_cache(cfg, cache, 8)
    assert {x.shape[1] for x in jax.tree.leaves(small.self_kv)} == {9}
    got, small = step(cfg, params, small, codes[:, 6], jnp.int32(6))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    large = autoregressive.resize_cache(cfg, small, cfg.num_codes)
    assert {x.shape[1] for x in jax.tree.leaves(large.self_kv)} == {cfg.num_codes}
    for grown, before in zip(jax.tree.leaves(large.self_kv), jax.tree.leaves(small.self_kv), strict=True):
        np.testing.assert_array_equal(grown[:, :9], before)
    apart, _ = step(cfg, params, cache, codes[jnp.arange(2), jnp.array([6, 2])], jnp.array([6, 2]))
    np.testing.assert_allclose(apart[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        apart[1], logits(cfg, family_params(cfg), text, codes)[1][1, 3], rtol=1e-4, atol=1e-4
    )


def test_rope_by_hand():
    """With heads of 4 channels one pair is rotated by the row and one by the column, by 1 radian each; text is zero."""
    rope = axial_rope_table(2, 3, 4)
    x = np.random.default_rng(0).normal(size=(1, 11, 1, 4))
    got = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(rope)[None])[0, :, 0]
    np.testing.assert_array_equal(got[:2], 0)
    for position in range(9):
        row, column = divmod(position, 3)
        pairs = np.array([x[0, 2 + position, 0, :2] @ [1, 1j], x[0, 2 + position, 0, 2:] @ [1, 1j]])
        want = pairs * np.exp([1j * row, 1j * column])
        np.testing.assert_allclose(
            got[2 + position], [want[0].real, want[0].imag, want[1].real, want[1].imag], atol=1e-6
        )
    # position (1, 1); the second pair of each half rotates a hundredth as far
    second = axial_rope_table(0, 3, 8)[4]
    np.testing.assert_allclose(second[0], np.cos([1, 0.01, 1, 0.01]), atol=1e-6)


def test_invalid_configurations_raise():
    with pytest.raises(ValueError, match=r"DalleConfig\.pad_id in \[0, 6\), got 6"):
        dataclasses.replace(TINY_FAMILY, pad_id=6)
    with pytest.raises(ValueError, match="dim / heads to be a multiple of 4 for pos_embed rope2d, got 2"):
        dataclasses.replace(TINY_FAMILY, pos_embed="rope2d", heads=8)
    with pytest.raises(ValueError, match="mlp_width of at least 1, got 0"):
        dataclasses.replace(TINY_FAMILY, mlp_width=0)
    encoded = FAMILIES["llamagen_t2i"]
    for field, value, message in (
        ("text_loss_weight", 0.1, "text_loss_weight to be 0.0 with a text_encoder, got 0.1"),
        ("pad_id", 2, "pad_id to be None with a text_encoder, got 2"),
        ("attention_kernel", "splash", "attention_kernel auto or dense with a text_encoder, got splash"),
        ("text_vocab", 1, r"text_encoder\.eos_id in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(encoded, **{field: value})
    with pytest.raises(ValueError, match="buckets to be a multiple of 4, got 6"):
        T5Config(num_relative_buckets=6)
    with pytest.raises(ValueError, match=r"T5Config\.dim divisible by heads 3, got 2048"):
        T5Config(heads=3)
    with pytest.raises(ValueError, match="decoder_start_id 16384 and at least image_vocab 16384, got 16000"):
        BartConfig(decoder_vocab=16_000)
    with pytest.raises(ValueError, match=r"eos_id in \[0, 50264\), got 60000"):
        BartConfig(eos_id=60_000)
    with pytest.raises(ValueError, match="text_len of at least 2, got 1"):
        BartConfig(text_len=1)


@pytest.mark.parametrize(
    ("want", "cfg"),
    [
        # minDALL-E 1.3B
        (1_291_081_728, DalleConfig(
            text_vocab=16_384, text_len=64, image_vocab=16_384, grid=16, dim=1536, layers=42, heads=24,
            activation="gelu", pos_embed="learned", pad_id=0)),
        # Malevich: published with a row of text positions that v3 does not use
        (1_310_410_880 - 2048, DalleConfig(
            text_vocab=16_384, text_len=128, image_vocab=8192, grid=32, dim=2048, layers=24, heads=16,
            sandwich_norm=True,
            second_final_norm=True, head_bias=True)),
        # LlamaGen B, L, XL, XXL, 3B
        *((count, DalleConfig(
            text_vocab=1000, text_len=1, image_vocab=16_384, grid=16, dim=dim, layers=layers, heads=heads,
            mlp_width=width, activation="swiglu", norm="rms", biases=False, pos_embed="rope2d", text_loss_weight=0.0))
          for count, layers, dim, heads, width in (
              (110_888_448, 12, 768, 12, 2048), (342_910_976, 24, 1024, 16, 2816), (774_699_520, 36, 1280, 20, 3584),
              (1_410_972_672, 48, 1536, 24, 4096), (3_096_659_200, 24, 3200, 32, 8704))),
        # LlamaGen XL on captions: what the file holds, and the encoder of flan-t5-xl
        (777_923_840 + 1_223_527_424, DalleConfig(
            text_vocab=32_128, text_len=120, image_vocab=16_384, grid=16, dim=1280, layers=36, heads=20,
            mlp_width=3584, activation="swiglu", norm="rms", biases=False, pos_embed="rope2d", text_loss_weight=0.0,
            text_encoder=T5Config())),
        # DALL-E Mini and Mega
        (437_833_712, BartConfig()),
        (2_587_521_024, BartConfig(
            text_vocab=50_272, decoder_vocab=16_416, dim=2048, encoder_layers=24, layers=24, heads=32, mlp_width=4096)),
    ],
)  # fmt: skip
def test_published_sizes(want, cfg):
    """Parameter counts equal those of the published checkpoints; each parameter has one sharding rule."""
    shapes = jax.eval_shape(functools.partial(autoregressive.init, cfg), jax.random.key(0))
    pairs = jax.tree_util.tree_flatten_with_path(shapes)[0]
    assert sum(leaf.size for _, leaf in pairs) == want
    for path, leaf in pairs:
        param_axes(path_name(path), leaf.shape)
