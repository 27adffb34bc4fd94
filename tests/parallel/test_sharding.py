"""Tests of the mesh: results do not depend on sharding, and every parameter has exactly one rule."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle_jax.config import DalleConfig, DVAEConfig, MeshConfig
from dalle_jax.models import dalle, dvae
from dalle_jax.models.registry import check_model_mesh
from dalle_jax.parallel.mesh import MESH_AXES, MeshError, make_mesh
from dalle_jax.parallel.sharding import (
    LOGICAL_AXIS_RULES,
    PARAM_AXES,
    batch_sharding,
    constrain,
    param_shardings,
    path_name,
    replicated,
)

DALLE = DalleConfig(
    text_vocab=5, text_len=3, image_vocab=8, grid=3, dim=16, layers=2, heads=2, mlp_ratio=2, conv_kernel=3,
    attention=("row", "conv"), last_attention=None, cond_drop_prob=0.3, dtype="float32", qk_norm=True,
)  # fmt: skip
DVAE = DVAEConfig(image_size=4, groups=2, blocks=1, width=8, decoder_width=8, vocab=8)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, model=2))


def shapes(cfg):
    init = dvae.init if isinstance(cfg, DVAEConfig) else dalle.init
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))


def random_params(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.asarray(0.3 * rng.normal(size=s.shape), np.float32), shapes(cfg))


# --- the mesh --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "model": 2}, (1, 2, 2, 2)),
        ({"data": 1, "fsdp": -1, "model": 2}, (1, 1, 4, 2)),
        ({"data": 1, "fsdp": 1, "model": -1}, (1, 1, 1, 8)),
        ({"slices": 2, "data": 1, "fsdp": -1}, (2, 1, 4, 1)),  # one slice divided in two, as for processes
    ],
)
def test_mesh_sizes(sizes, want):
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == MESH_AXES == ("slice", "data", "fsdp", "model")
    assert tuple(mesh.shape.values()) == want
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_mesh_over_some_devices():
    mesh = make_mesh(MeshConfig(data=-1, model=2), jax.devices()[4:8])
    assert tuple(mesh.shape.values()) == (1, 2, 1, 2)
    assert {d.id for d in mesh.devices.flat} == {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (
            {"data": 2, "fsdp": 2},
            "product is 8 devices, got data=2 fsdp=2 model=1, whose product is 4. Set one of them to -1",
        ),
        ({"data": 16}, "got data=16 .*, whose product is 16"),
        ({"slices": 3}, "to match 8 devices in 1 slices, got 3. Use -1"),
        ({"slices": 2, "fsdp": 3}, "divides 4 devices in each of 2 slices, got .*, whose product is 3"),
        ({"data": -1, "model": 3}, "divides 8 devices, got data=-1 fsdp=1 model=3, whose product is 3"),
    ],
)
def test_invalid_meshes_are_rejected(sizes, match):
    with pytest.raises(MeshError, match=match):
        make_mesh(MeshConfig(**sizes))


class Sliced:
    """A device with the attributes that a mesh reads."""

    platform, device_kind, process_index = "cpu", "fake", 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4


def test_slices_are_detected():
    """The first axis runs over slices, the others within one."""
    devices = [Sliced(i) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    assert tuple(mesh.shape.values()) == (2, 1, 4, 1)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(MeshError, match="to match 8 devices in 2 slices, got 4"):
        make_mesh(MeshConfig(slices=4, data=1, fsdp=-1), devices)


# --- sharding of parameters --------------------------------------------------------------------------------


def specs(mesh, tree):
    found = jax.tree_util.tree_flatten_with_path(param_shardings(mesh, tree))[0]
    return {path_name(path): sharding.spec for path, sharding in found}


def test_dalle_parameters_on_the_mesh(mesh):
    """Widths over `fsdp`; heads, MLP and vocabularies over `model`; sizes that do not divide are replicated."""
    got = specs(mesh, shapes(DALLE))
    f, m = ("fsdp",), ("model",)
    want = {
        "text_embed": P(m, f),  # 5 pieces + 3 pads
        "image_embed": P(m, f),
        "text_pos": P(None, f),
        "image_row": P(None, f),
        "image_col": P(None, f),
        "blocks/norm_attn/scale": P(None, None),
        "blocks/attn/q_scale": P(None, None),
        "blocks/attn/q/kernel": P(None, f, m),
        "blocks/attn/v/bias": P(None, m),
        "blocks/attn/out/kernel": P(None, m + f, None),
        "blocks/attn/out/bias": P(None, None),
        "blocks/mlp/up/kernel": P(None, f, m),
        "blocks/mlp/up/bias": P(None, m),
        "blocks/mlp/down/kernel": P(None, m + f, None),
        "norm_out/bias": P(None),
        "text_head/kernel": P(f, m),
        "image_head/kernel": P(f, m),
    }
    assert {name: got[name] for name in want} == want
    odd = specs(mesh, {"text_embed": jax.ShapeDtypeStruct((9, 16), jnp.float32)})
    assert odd == {"text_embed": P(None, f)}


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (
            {"heads": 31},
            r"^Expected model\.heads to be divisible by mesh\.model 2, got 31\. Use mesh sizes with product 1\.$",
        ),
        ({"dim": 3 * 181, "heads": 1}, r"model\.heads to be divisible by mesh\.model 2, got 1\."),
        (
            {"dim": 2 * 625, "heads": 2},
            r"model\.dim to be divisible by mesh\.model 2 x mesh\.fsdp 2, got 1250",
        ),
        (
            {"image_vocab": 8191},
            r"model\.image_vocab to be divisible by mesh\.model 2, got 8191",
        ),
        (
            {"text_len": 255},
            r"model\.text_vocab \+ model\.text_len to be divisible by mesh\.model 2, got 16639",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_names_the_field(mesh, sizes, match):
    with pytest.raises(MeshError, match=match):
        check_model_mesh(DalleConfig(**sizes), mesh)


def test_large_parameters_are_sharded_or_rejected(mesh):
    """The paper's model divides; a parameter above 1 MiB that does not is an error, a smaller one is replicated."""
    check_model_mesh(DalleConfig(), mesh)
    with pytest.raises(
        MeshError, match=r"text_head/kernel \(1025, 512\) to be divisible by mesh.fsdp 2, got 1025"
    ):
        specs(mesh, {"text_head": {"kernel": jax.ShapeDtypeStruct((1025, 512), jnp.float32)}})
    small = specs(mesh, {"text_head": {"kernel": jax.ShapeDtypeStruct((1023, 256), jnp.float32)}})
    assert small == {"text_head/kernel": P(None, ("model",))}


def test_dvae_parameters_on_the_mesh(mesh):
    """Convolutions are sharded over their inputs; three colors are replicated."""
    got = specs(mesh, shapes(DVAE))
    assert got["encoder/input/kernel"] == P(None, None, None, None)
    assert got["encoder/groups/group_2_block_1/id_path/kernel"] == P(None, None, ("fsdp",), None)
    assert got["decoder/input/kernel"] == P(None, None, ("fsdp",), None)
    assert all(spec == P(None) for name, spec in got.items() if name.endswith("bias"))


def test_unknown_parameters_are_rejected(mesh):
    leaf = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    with pytest.raises(
        ValueError, match=r"Expected 1 rule of PARAM_AXES for blocks/mystery/kernel \(3, 4\), got 0"
    ):
        param_shardings(mesh, {"blocks": {"mystery": {"kernel": leaf}}})
    with pytest.raises(ValueError, match=r"Expected 1 axes in the rule of text_head/kernel \(3,\), got 2"):
        param_shardings(mesh, {"text_head": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}})


def test_table_and_rules_agree():
    named = {axis for _, axes in PARAM_AXES for axis in axes if axis is not None}
    assert named <= LOGICAL_AXIS_RULES.keys()
    assert {axis for axes in LOGICAL_AXIS_RULES.values() for axis in axes} <= set(MESH_AXES)
    for pattern, axes in PARAM_AXES:  # an array cannot use a mesh axis twice
        used = [m for axis in axes if axis is not None for m in LOGICAL_AXIS_RULES[axis]]
        assert len(used) == len(set(used)), pattern


# --- constrain -------------------------------------------------------------------------------------------


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", "embed") is x
    assert constrain(x, "no such axis", None) is x


def test_constrain_shards_under_a_mesh(mesh):
    @jax.jit
    def run(x, y):
        return constrain(2 * x, "batch", None, "heads"), constrain(2 * y, "batch", "mlp")

    with jax.set_mesh(mesh):
        x, y = run(np.ones((4, 3, 2), np.float32), np.ones((3, 2), np.float32))
    assert x.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P(("slice", "data", "fsdp"), None, "model")), 3
    )
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, "model")), 2)  # 3 rows do not divide


def test_batch_and_replicated(mesh):
    x = jax.device_put(np.arange(8.0), batch_sharding(mesh))
    assert {len(s.data) for s in x.addressable_shards} == {2}
    assert all(len(s.data) == 8 for s in jax.device_put(np.arange(8.0), replicated(mesh)).addressable_shards)


# --- eight devices equal one ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, params, batch, key):
    """Loss, metrics and gradients of either model."""

    def value(params):
        if isinstance(cfg, DVAEConfig):
            return dvae.loss(cfg, params, batch["image"], key, tau=0.7, kl_weight=2.0, code_usage_weight=0.1)
        return dalle.loss(cfg, params, batch["text"], batch["codes"], key)

    return jax.value_and_grad(value, has_aux=True)(params)


def batch_of(cfg, rows=8):
    rng = np.random.default_rng(1)
    if isinstance(cfg, DVAEConfig):
        return {"image": rng.random((rows, 4, 4, 3), np.float32)}
    return {
        "text": rng.integers(0, 8, (rows, 3)).astype(np.int32),
        "codes": rng.integers(0, 8, (rows, 9)).astype(np.int32),
    }


@pytest.mark.parametrize("cfg", [DALLE, DVAE], ids=lambda cfg: cfg.kind)
def test_eight_devices_equal_one_device(mesh, cfg):
    """Loss to a relative 1e-6, gradients to 1e-5 of the largest of their array, since sums run in another order."""
    params, batch, key = random_params(cfg), batch_of(cfg), jax.random.key(2)
    (want, want_metrics), want_grads = step(cfg, params, batch, key)
    sharded = jax.device_put(params, param_shardings(mesh, params))
    rows = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        (got, metrics), grads = step(cfg, sharded, rows, jax.device_put(key, replicated(mesh)))
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name in want_metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-6)
    wanted = dict(jax.tree_util.tree_flatten_with_path(want_grads)[0])
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        big = np.abs(wanted[path]).max()
        assert big > 0, path_name(path)
        near = 1e-5 * big + 1e-8
        np.testing.assert_allclose(grad, wanted[path], rtol=0, atol=near, err_msg=path_name(path))


def test_a_device_holds_a_quarter_of_the_kernels(mesh):
    """fsdp x model; kernels are nearly all parameters at full size."""
    tree = param_shardings(mesh, shapes(DalleConfig()))
    leaves = zip(jax.tree.leaves(shapes(DalleConfig())), jax.tree.leaves(tree), strict=True)
    total = local = 0
    for leaf, sharding in leaves:
        total += leaf.size
        local += math.prod(sharding.shard_shape(leaf.shape))
    assert 0.25 <= local / total < 0.2502
