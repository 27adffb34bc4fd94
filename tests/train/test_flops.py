"""Model FLOPs: by hand, by the formula of the Transformer, and against published values."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dalle_jax.config import ClipConfig, DalleConfig, DataConfig, T5Config, TrainConfig
from dalle_jax.config.files import load_config
from dalle_jax.models import clip, dalle
from dalle_jax.models.dalle.flops import dalle_flops, encoder_flops
from dalle_jax.models.diffusion import unet
from dalle_jax.train.flops import batch_shapes, count_flops, train_flops
from dalle_jax.train.tasks import make_task

ROOT = Path(__file__).parents[2]
MODEL = DalleConfig(
    text_vocab=20,
    text_len=4,
    image_vocab=16,
    grid=4,
    dim=16,
    layers=3,
    heads=2,
    conv_kernel=3,
    loss_vocab_chunk=0,
)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*shapes))


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_products_by_hand():
    x, w = floats(5, 3, 7), floats(5, 7, 2)
    assert count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), x, w) == 2 * 5 * 3 * 7 * 2
    assert count(conv, floats(2, 6, 6, 3), floats(3, 3, 3, 4)) == 2 * (2 * 6 * 6 * 4) * 9 * 3
    assert count(lambda x, w: jnp.exp(x).sum() + w.max(), x, w) == 0


def test_loops_count_by_iterations_and_conditionals_by_the_larger_branch():
    w, one = floats(4, 4), 2 * 4**3

    def loop(w):
        return jax.lax.scan(jax.checkpoint(lambda x, _: (x @ w, None)), w, length=5)[0]

    def branch(w):
        return jax.lax.cond(w[0, 0] > 0, lambda: w @ w, lambda: jax.jit(lambda w: w @ w @ w)(w))

    assert count(loop, w) == 5 * one and count(branch, w) == 2 * one


def test_zeros_in_the_gradient_of_a_strided_convolution_do_not_count():
    """Each of the two gradients has the FLOPs of the convolution."""
    x, kernel = floats(2, 8, 8, 3), floats(4, 4, 3, 5)

    def loss(x, kernel):
        return jnp.sum(conv(x, kernel, 2) ** 2)

    assert count(jax.grad(loss, (0, 1)), x, kernel) == 3 * count(loss, x, kernel) > 0


def test_a_pallas_kernel_is_refused():
    model = dataclasses.replace(MODEL, attention_kernel="splash")
    params = jax.eval_shape(lambda: dalle.init(model, jax.random.key(0)))
    ids = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (4, 16)]
    with pytest.raises(ValueError, match="Expected a program without Pallas kernels"):
        count(lambda *x: dalle.logits(model, *x), params, *ids)


def test_the_formula_of_the_transformer_agrees_with_the_traced_loss():
    """Except for the text head: the formula counts every text position, the loss all but the last."""
    config = TrainConfig(model=MODEL, data=DataConfig(batch_size=2))
    task = make_task(config)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    traced = count(lambda p, b: task.loss(p, {}, b, jax.random.key(0), 0), params, batch_shapes(task, 2))
    head = 2 * 2 * MODEL.dim * MODEL.num_text_ids
    assert dalle_flops(MODEL, 2) == traced + head
    assert train_flops(task) == 3 * dalle_flops(MODEL, 2)


def test_a_frozen_encoder_counts_once():
    encoder = T5Config(dim=8, layers=2, heads=2, mlp_width=6, num_relative_buckets=4)
    model = dataclasses.replace(MODEL, text_encoder=encoder, text_loss_weight=0.0)
    task = make_task(TrainConfig(model=model, data=DataConfig(batch_size=2)))
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    traced = count(lambda p, b: task.loss(p, {}, b, jax.random.key(0), 0), params, batch_shapes(task, 2))
    assert traced == dalle_flops(model, 2) + encoder_flops(model, 2)
    assert train_flops(task) == 3 * dalle_flops(model, 2) + encoder_flops(model, 2) < 3 * traced


def test_the_formula_by_hand():
    """A block has 12 D^2 weights; attention 2 S D products per position; each head counts its own tokens."""
    positions, width = 4 + 16, 16
    block = 12 * width**2 + 2 * positions * width
    want = 3 * positions * block + 4 * width * (20 + 4) + 16 * width * 16
    assert dalle_flops(MODEL, 16) == 2 * 16 * want
    assert dalle_flops(MODEL, 16) - dalle_flops(MODEL, 16, text_head=False) == 2 * 16 * 4 * width * 24


def test_flops_of_the_paper_follow_from_its_parameters():
    """6 N FLOPs per token for 12.2 B weights of matrices, and 5% for attention."""
    assert 1.0 < 3 * dalle_flops(DalleConfig(), 1024) / (6 * 12.2e9 * 1024 * 1280) < 1.08


def test_published_flops():
    """The U-Net of DDPM on CIFAR-10 has 6.1 G multiplications (Fang et al. 2023, 2305.10924, table 1). CLIP ViT-B/32
    has
    14.78 GFLOPs for an image and its caption (open_clip, docs/model_profile.csv)."""
    model = load_config(ROOT / "configs" / "ddpm_cifar10.py").model
    params = jax.eval_shape(lambda: unet.init(model, jax.random.key(0)))
    image, scalar = floats(1, 32, 32, 3), floats(1)
    given = unet.EncodedConditions(None, None, None, None)
    found = count(lambda p, x, t: unet.predict(model, p, x, t, t, t, given), params, image, scalar)
    assert found / 2 == pytest.approx(6.1e9, rel=0.03)

    params = jax.eval_shape(lambda: clip.init(ClipConfig(), jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    found = count(lambda p, x, t: clip.loss(ClipConfig(), p, x, t)[0], params, floats(2, 224, 224, 3), ids)
    assert found / 2 == pytest.approx(14.78e9, rel=0.03)
