"""Tests of CLIP: published sizes, towers against NumPy, the loss by hand, re-ranking."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax.config import ClipConfig, MeshConfig, TowerConfig
from dalle_jax.models import clip
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, param_axes, param_shardings, path_name, replicated

CFG = ClipConfig(
    image_size=8, patch_size=4, vision=TowerConfig(dim=12, layers=2, heads=3, mlp_ratio=2),
    text=TowerConfig(dim=8, layers=2, heads=2, mlp_ratio=2), text_vocab=11, text_len=5, embed_dim=6, dtype="float32",
)  # fmt: skip
END = CFG.eos_id


def jitted(fn, static=0):
    """Jit without compiler optimizations, which take longer than they save here."""
    return jax.jit(fn, static_argnums=static, compiler_options={"xla_backend_optimization_level": 0})


encode_image, encode_text = jitted(clip.encode_image), jitted(clip.encode_text)


def shapes(cfg):
    return jax.eval_shape(lambda: clip.init(cfg, jax.random.key(0)))


def random_params(cfg, seed=0):
    """Return parameters large enough that each of them matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), jnp.float32), shapes(cfg))


def random_batch(count=8, seed=1):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 9, (count, 5)).astype(np.int32)
    text[:, 0], text[:, 3:] = CFG.bos_id, END
    return {"image": rng.random((count, 8, 8, 3), np.float32), "text": text}


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


# --- sizes -----------------------------------------------------------------------------------------------


def count_by_formula(patch, size, vision, vision_layers, text, embed):
    """Count the parameters of a published model: 77 positions, 49,408 tokens, 12 text layers, MLPs of four times the
    width."""

    def block(d):
        return (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d

    positions = (size // patch) ** 2 + 1
    image = 3 * patch**2 * vision + vision + positions * vision + 2 * vision + vision_layers * block(vision)
    words = 49_408 * text + 77 * text + 12 * block(text)
    ends = 2 * vision + vision * embed + 2 * text + text * embed
    return image + words + ends + 1


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (ClipConfig(), 151_277_313),  # ViT-B/32
        (ClipConfig(patch_size=16), 149_620_737),  # ViT-B/16
        (
            ClipConfig(
                patch_size=14, embed_dim=768, vision=TowerConfig(dim=1024, layers=24, heads=16),
                text=TowerConfig(dim=768, heads=12),
            ),
            427_616_513,  # ViT-L/14
        ),
    ],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14"],
)  # fmt: skip
def test_parameters_of_the_published_models(cfg, want):
    tree = shapes(cfg)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == want
    assert want == count_by_formula(
        cfg.patch_size, cfg.image_size, cfg.vision.dim, cfg.vision.layers, cfg.text.dim, cfg.embed_dim
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert len(param_axes(path_name(path), leaf.shape)) == leaf.ndim
        assert leaf.dtype == "float32"


def test_init():
    params = jitted(clip.init)(CFG, jax.random.key(3))
    np.testing.assert_allclose(clip.logit_scale(CFG, params), 1 / 0.07, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert float(params["vision"]["norm_in"]["scale"].min()) == 1.0


# --- the towers against NumPy ----------------------------------------------------------------------------


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(p, x, heads, mask):
    """Compute one block by a loop over heads; `p` holds flat kernels `q`, `k`, `v`, `out`, `up`, `down` with biases."""
    y, width = norm(p["norm_attn"], x), x.shape[-1] // heads
    q, k, v = (y @ p[name][0] + p[name][1] for name in "qkv")
    heads_out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = np.where(mask, q[:, part] @ k[:, part].T / math.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads_out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    x = x + np.concatenate(heads_out, -1) @ p["out"][0] + p["out"][1]
    y = norm(p["norm_mlp"], x) @ p["up"][0] + p["up"][1]
    y = y / (1 + np.exp(-1.702 * y))  # QuickGELU
    return x + y @ p["down"][0] + p["down"][1]


def flat_block(blocks, i):
    p = jax.tree.map(lambda a: np.asarray(a[i], np.float64), blocks)
    layers = {**p["attn"], **p["mlp"]}
    flat = {name: (layer["kernel"], layer["bias"]) for name, layer in layers.items()}
    return {**flat, "norm_attn": p["norm_attn"], "norm_mlp": p["norm_mlp"]}


def project(tower, x):
    x = norm(tower["norm_out"], x) @ tower["proj"]["kernel"]
    return x / np.linalg.norm(x)


def test_vision_tower_equals_the_reference(params):
    image = random_batch(2)["image"]
    tower = jax.tree.map(lambda a: np.asarray(a, np.float64), params["vision"])
    want = []
    for pixels in (image - np.array(CFG.pixel_mean)) / np.array(CFG.pixel_std):
        patches = [pixels[y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
        embedded = [np.einsum("ijc,ijcd->d", patch, tower["patch"]["kernel"]) for patch in patches]
        x = norm(tower["norm_in"], np.stack([tower["class_embed"], *embedded]) + tower["pos"])
        for i in range(2):
            x = block(flat_block(params["vision"]["blocks"], i), x, 3, np.ones((5, 5), bool))
        want.append(project(tower, x[0]))
    np.testing.assert_allclose(encode_image(CFG, params, image), want, rtol=1e-4, atol=1e-5)


def test_text_tower_equals_the_reference(params):
    text = np.array([[9, 4, 10, 0, 0], [9, 3, 4, 5, 10]], np.int32)
    tower = jax.tree.map(lambda a: np.asarray(a, np.float64), params["text"])
    want = []
    for ids, end in zip(text, (2, 4), strict=True):
        x = tower["embed"][ids] + tower["pos"]
        for i in range(2):
            x = block(flat_block(params["text"]["blocks"], i), x, 2, np.tri(5, dtype=bool))
        want.append(project(tower, x[end]))
    np.testing.assert_allclose(encode_text(CFG, params, text), want, rtol=1e-4, atol=1e-5)


def test_a_caption_ends_at_its_first_end_token(params):
    """Ids after it, zeros as OpenAI pads or end tokens as others do, have no effect; ids before it do."""
    base = encode_text(CFG, params, np.array([[9, 4, 10, 0, 0]], np.int32))
    for tail in ([10, 10], [7, 10], [0, 3]):
        np.testing.assert_array_equal(encode_text(CFG, params, np.array([[9, 4, 10, *tail]], np.int32)), base)
    for other in ([9, 5, 10, 0, 0], [8, 4, 10, 0, 0], [9, 4, 4, 10, 0]):
        assert np.abs(encode_text(CFG, params, np.array([other], np.int32)) - base).max() > 1e-3


def test_embeddings_have_length_one(params):
    batch = random_batch()
    for embedding in (encode_image(CFG, params, batch["image"]), encode_text(CFG, params, batch["text"])):
        assert embedding.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


# --- images of another size ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(23, 40), (40, 31), (7, 7), (16, 16)])
def test_preprocess_equals_pillow(shape):
    """Bicubic to a short side of 16, center crop, normalization; within 1 of 255, as Pillow rounds twice."""
    cfg = ClipConfig(image_size=16, patch_size=16)
    image = np.random.default_rng(0).integers(80, 176, (*shape, 3)).astype(np.uint8)
    short = min(shape)
    width, height = (side * 16 // short for side in shape[::-1])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    want = resized[top : top + 16, left : left + 16]
    got = clip.preprocess(cfg, jnp.asarray(image[None]) / 255.0)[0]
    got = (np.asarray(got) * cfg.pixel_std + cfg.pixel_mean) * 255
    assert got.shape == (16, 16, 3)
    np.testing.assert_allclose(got, want, atol=1.01)


# --- the loss --------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """For B orthogonal embeddings it is -log(exp(s) / (exp(s) + B - 1)), for equal rows log B."""
    axes, scale = jnp.eye(4), jnp.float32(2.0)
    value, metrics = clip.contrastive_loss(scale, axes, axes)
    np.testing.assert_allclose(value, math.log(1 + 3 * math.exp(-2)), rtol=1e-6)
    assert metrics["image_to_text"] == metrics["text_to_image"] == 1
    same = jnp.tile(axes[:1], (4, 1))
    np.testing.assert_allclose(clip.contrastive_loss(scale, same, same)[0], math.log(4), rtol=1e-6)
    # Two equal captions.
    text = axes[jnp.array([0, 0])]
    value, metrics = clip.contrastive_loss(scale, axes[:2], text)
    to_text = math.log(2)  # both captions have equal logits for each image
    # both captions are nearer to image 0
    to_image = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    np.testing.assert_allclose(value, (to_text + to_image) / 2, rtol=1e-6)
    np.testing.assert_allclose([metrics["image_to_text"], metrics["text_to_image"]], 0.5)


def test_logit_scale_has_a_maximum():
    def grad(value, sign):
        return float(jax.grad(lambda p: sign * clip.logit_scale(CFG, {"logit_scale": p}))(jnp.float32(value)))

    top = math.log(100)
    assert float(clip.logit_scale(CFG, {"logit_scale": jnp.float32(top + 1)})) == pytest.approx(100, rel=1e-5)
    np.testing.assert_allclose(grad(1.0, 1), math.e, rtol=1e-5)
    np.testing.assert_allclose(grad(1.0, -1), -math.e, rtol=1e-5)
    assert grad(top + 1, -1) == 0  # descent would increase it
    assert grad(top + 1, 1) > 1  # descent decreases it


step = jitted(jax.value_and_grad(clip.loss, argnums=1, has_aux=True))


def assert_same_step(got, want, bound=3e-5):
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
    for name, value in want[0][1].items():
        np.testing.assert_allclose(got[0][1][name], value, rtol=1e-5)
    for (path, grad), wanted in zip(
        jax.tree_util.tree_flatten_with_path(got[1])[0], jax.tree.leaves(want[1]), strict=True
    ):
        largest = np.abs(wanted).max()
        assert largest > 0, path_name(path)
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=bound * largest + 1e-8, err_msg=path_name(path))


def test_eight_devices_are_one_device(params):
    """The loss is over the rows of all devices: one per device would be about log 2, not log 8."""
    batch = random_batch()
    want = step(CFG, params, batch["image"], batch["text"])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    spread = jax.device_put(params, param_shardings(mesh, params))
    batch = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = step(CFG, spread, batch["image"], batch["text"])
        chunked = ClipConfig(**{**vars(CFG), "grad_cache_chunks": 2})
        parts = step(chunked, spread, batch["image"], batch["text"])
    assert len(got[0][0].sharding.device_set) == 8
    # Float32 sums in another order: another order of the rows on one device changes gradients by 2.8e-5.
    assert_same_step(got, want, bound=1e-4)
    assert_same_step(parts, want, bound=1e-4)
    assert got[0][0].sharding.is_equivalent_to(replicated(mesh), 0)


def test_chunks_and_remat_change_nothing(params):
    batch = random_batch()
    want = step(CFG, params, batch["image"], batch["text"])
    assert float(want[0][0]) > 0.5  # far from solved, so gradients are informative
    changed = ClipConfig(**{**vars(CFG), "grad_cache_chunks": 4, "remat": "full", "scan_unroll": 2})
    assert_same_step(step(changed, params, batch["image"], batch["text"]), want)


# --- re-ranking ------------------------------------------------------------------------------------------


def test_rerank_sorts_by_similarity(params):
    batch = random_batch(6)
    images, text = batch["image"].reshape(2, 3, 8, 8, 3), batch["text"][:2]
    each = jitted(clip.similarity)(CFG, params, batch["image"], np.repeat(text, 3, axis=0)).reshape(2, 3)
    cosine = np.einsum("ae,be->ab", encode_text(CFG, params, text), encode_image(CFG, params, batch["image"]))
    np.testing.assert_allclose(each, [cosine[0, :3], cosine[1, 3:]], atol=1e-6)
    rerank = jitted(clip.rerank, (0, 4))
    which, best = rerank(CFG, params, images, text, 2)
    want = np.argsort(-np.asarray(each), axis=1)[:, :2]
    np.testing.assert_array_equal(which, want)
    np.testing.assert_allclose(best, np.take_along_axis(np.asarray(each), want, axis=1), atol=1e-6)
    assert which.dtype == jnp.int32
    same = np.broadcast_to(images[:, :1], images.shape)
    np.testing.assert_array_equal(rerank(CFG, params, same, text, 2)[0], [[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, i, t: clip.encode_image(CFG, p, i[0]), r"images of shape .*, got \(8, 8, 3\)"),
        (lambda p, i, t: clip.encode_image(CFG, p, (255 * i).astype(np.uint8)), "float images in .* got uint8"),
        (lambda p, i, t: clip.encode_text(CFG, p, t[:, :4]), r"text of shape \(batch, 5\), got \(8, 4\)"),
        (lambda p, i, t: clip.encode_text(CFG, p, t * 1.0), "int32 text ids, got float"),
        (lambda p, i, t: clip.loss(CFG, p, i[:3], t), "one caption per image, got 3 images and 8 captions"),
        (lambda p, i, t: clip.similarity(CFG, p, i, t[:3]), "got 8 images and 3 captions"),
        (
            lambda p, i, t: clip.loss(ClipConfig(**{**vars(CFG), "grad_cache_chunks": 3}), p, i, t),
            "divisible by model.grad_cache_chunks 3, got 8",
        ),
        (lambda p, i, t: clip.rerank(CFG, p, i[None], t[:1], 9), r"top in \[1, 8\].* got 9"),
        (lambda p, i, t: clip.rerank(CFG, p, i[None], t[:2], 1), "got 1 sets and 2 captions"),
    ],
)  # fmt: skip
def test_invalid_input_raises(params, call, match):
    batch = random_batch()
    with pytest.raises(ValueError, match=match):
        call(params, batch["image"], batch["text"])
