"""Sharding of parameters, batches and activations over the mesh (mesh.py), by two tables.

`PARAM_AXES` maps a parameter's path to its logical axes; `LOGICAL_AXIS_RULES` maps a logical axis to mesh axes. Model
code does not name mesh axes: it calls `constrain(x_BTD, "batch", None, "embed")`, which is the identity without a mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dalle_jax.parallel.mesh import MeshError
from dalle_jax.typing import Params

REPLICATE_BELOW_BYTES = 2**20  # a parameter up to this size is replicated if its rule does not divide it

# Logical axis -> mesh axes.
LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "embed": (),  # activations keep all channels on each device between layers
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "width": ("fsdp",),  # the embed axis of parameters, which are gathered when used
    # Input axes of the projections back to the residual stream. `fsdp` splits rows here too, because gathered columns
    # would have to be copied to contiguous memory.
    "heads_in": ("model", "fsdp"),
    "mlp_in": ("model", "fsdp"),
    "layers": (),
}

# Pattern of a parameter's path ("a/b/c") -> logical axis of each dimension. Exactly one pattern matches each parameter.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Transformer (models/dalle/); `blocks` are stacked over layers.
    (r"(text|image)_embed", ("vocab", "width")),
    (r"(text_pos|image_pos|image_row|image_col)", (None, "width")),
    (r"blocks/norm_(attn|mlp)(_out)?/(scale|bias)", ("layers", None)),
    (r"blocks/attn/(q_scale|k_scale)", ("layers", None)),
    (r"blocks/attn/(q|k|v)/kernel", ("layers", "width", "heads")),
    (r"blocks/attn/(q|k|v)/bias", ("layers", "heads")),
    (r"blocks/attn/out/kernel", ("layers", "heads_in", None)),
    (r"blocks/mlp/(up|gate)/kernel", ("layers", "width", "mlp")),
    (r"blocks/mlp/(up|gate)/bias", ("layers", "mlp")),
    (r"blocks/mlp/down/kernel", ("layers", "mlp_in", None)),
    (r"blocks/(attn/out|mlp/down)/bias", ("layers", None)),
    (r"norm_out/(scale|bias)", (None,)),
    (r"norm_head/(scale|bias)", (None,)),
    # Encoder-decoder Transformer (models/bart.py), in addition.
    (r"(text|image)_norm/(scale|bias)|norm_text_out/bias", (None,)),
    (
        r"text_blocks/norm_(attn|mlp)(_out)?/(scale|bias)|blocks/norm_cross(_out)?/(scale|bias)",
        ("layers", None),
    ),
    (r"(text_blocks/attn|blocks/cross)/(q|k|v)/kernel", ("layers", "width", "heads")),
    (r"(text_blocks/attn|blocks/cross)/out/kernel", ("layers", "heads", "width")),
    (r"text_blocks/mlp/(up|gate)/kernel", ("layers", "width", "mlp")),
    (r"text_blocks/mlp/down/kernel", ("layers", "mlp", "width")),
    (r"(text_)?blocks/mlp/norm/bias", ("layers", None)),
    # Transformer with a T5 text encoder (nn/t5.py), in addition.
    (r"text_null", (None, "width")),
    (r"text_proj/(up|down)/kernel", ("width", None)),
    (r"t5/relative", (None, None)),
    (r"(text|image)_head/kernel", ("width", "vocab")),
    (r"(text|image)_head/bias", ("vocab",)),
    # dVAE (models/dvae.py): convolutions are split over input channels.
    (r"(encoder|decoder)/.*(conv_\d|id_path|input|output)/kernel", (None, None, "width", None)),
    (r"(encoder|decoder)/.*(conv_\d|id_path|input|output)/bias", (None,)),
    # VQGAN (models/vqgan/autoencoder.py, quantize.py), alone and in a state with a discriminator.
    (
        r"(tokenizer/)?((encoder|decoder)/(.*/)?(conv_in|conv_out|conv\d|nin_shortcut|q|k|v|proj_out|"
        r"(down|up)_\d_(down|up)sample)|(post_)?quant_conv)/kernel",
        (None, None, "width", None),
    ),
    (
        r"(tokenizer/)?((encoder|decoder)/(.*/)?(conv_in|conv_out|conv\d|nin_shortcut|q|k|v|proj_out|"
        r"(down|up)_\d_(down|up)sample)|(post_)?quant_conv)/bias",
        (None,),
    ),
    (r"(tokenizer/)?(encoder|decoder)/(.*/)?(norm\d?|norm_out)/(scale|bias)", (None,)),
    (r"(tokenizer/)?quantize/embedding", ("vocab", None)),
    (r"(tokenizer/)?quantize/proj/kernel", ("width", "vocab")),
    (r"(tokenizer/)?quantize/proj/bias", ("vocab",)),
    (r"discriminator/(conv_\d|score)/kernel", (None, None, "width", None)),
    (r"discriminator/((conv_\d|score)/bias|norm_\d/(scale|bias))", (None,)),
    (r"lpips/conv_\d+/kernel", (None, None, None, None)),
    (r"lpips/(conv_\d+/bias|head_\d/kernel)", (None,)),
    # CLIP (models/clip.py).
    (r"vision/patch/kernel", (None, None, None, "width")),
    (r"vision/class_embed", (None,)),
    (r"(vision/norm_in|(vision|text)/norm_out)/(scale|bias)", (None,)),
    (r"(vision|text)/pos", (None, "width")),
    (r"text/embed", ("vocab", "width")),
    (r"(vision|text)/proj/kernel", ("width", None)),
    (r"logit_scale", ()),
    # Diffusion (models/diffusion/unet.py, text_encoder.py).
    (
        r"unet/(.*/)?(conv_in|conv_out|conv\d|(down|up)_\d_(down|up)sample)/kernel",
        (None, None, "width", None),
    ),
    (r"unet/(.*/)?(time(_\d)?|text_mean|shortcut)/kernel", ("width", None)),
    (r"unet/.*/(q|k|v|text_k|text_v)/kernel", ("width", "heads")),
    (r"unet/.*/(q|k|v|text_k|text_v)/bias", ("heads",)),
    (r"unet/.*/proj/kernel", ("heads", "width")),
    (
        r"unet/(.*/)?(conv_in|conv_out|conv\d|(down|up)_\d_(down|up)sample|time(_\d)?|text_mean|shortcut|proj)/bias",
        (None,),
    ),
    (r"unet/(.*/)?(norm\d?|norm_out)/(scale|bias)", (None,)),
    (r"unet/class_embed/embedding", (None, "width")),
    (r"unet/codes_embed/embedding", ("vocab", None)),
    (r"(text_encoder|t5)/embed", ("vocab", "width")),
    (r"text_encoder/pos", (None, "width")),
    (r"(text_encoder|t5)/norm_out/(scale|bias)", (None,)),
)
# The towers of CLIP, the text encoder of diffusion and T5 consist of the Transformer's blocks.
PARAM_AXES += tuple(
    (f"(vision|text|text_encoder|t5)/{pattern}", axes)
    for pattern, axes in PARAM_AXES
    if pattern.startswith("blocks/")
)


def _num_shards(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes of a logical axis and the product of their sizes."""
    mesh_axes = LOGICAL_AXIS_RULES[axis] if axis is not None else ()
    return mesh_axes, math.prod(mesh.shape[a] for a in mesh_axes)


def partition_spec(
    mesh: Mesh | AbstractMesh, axes: Iterable[str | None], shape: tuple[int, ...]
) -> PartitionSpec:
    """Return the partition of an array: each axis over the mesh axes of its rule if they divide it, else replicated.

    This suits activations, whose sizes the configuration checks; `param_shardings` is stricter.

    Args:
      mesh: the mesh.
      axes: logical axis of each dimension; None is replicated.
      shape: of the array.
    """
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes, num_shards = _num_shards(mesh, axis)
        parts.append(mesh_axes if mesh_axes and size % num_shards == 0 else None)
    return PartitionSpec(*parts)


def check_divides(mesh: Mesh, axis: str | None, size: int, name: str) -> None:
    """Check that a size divides over the devices of a logical axis.

    Args:
      mesh: the mesh.
      axis: logical axis; None is replicated.
      size: along the axis.
      name: of the size, for the error.

    Raises:
      MeshError: it does not.
    """
    mesh_axes, num_shards = _num_shards(mesh, axis)
    if size % num_shards:
        devices = " x ".join(f"mesh.{a} {mesh.shape[a]}" for a in mesh_axes if mesh.shape[a] > 1)
        divisors = ", ".join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0)
        raise MeshError(
            f"Expected {name} to be divisible by {devices}, got {size}. Use mesh sizes with product {divisors}."
        )


def param_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the logical axes of a parameter.

    Args:
      path: of the parameter, `a/b/c`.
      shape: of the parameter.

    Raises:
      ValueError: not exactly one pattern of `PARAM_AXES` matches, or it has another number of axes.
    """
    matches = [axes for pattern, axes in PARAM_AXES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"Expected 1 rule of PARAM_AXES for {path} {shape}, got {len(matches)}.")
    (axes,) = matches
    if len(axes) != len(shape):
        raise ValueError(
            f"Expected {len(shape)} axes in the rule of {path} {shape}, got {len(axes)}: {axes}."
        )
    return axes


def path_name(path: Iterable[Any]) -> str:
    """Return `a/b/c` for a key path of nested dicts."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def param_shardings(mesh: Mesh, params: Params) -> Params:
    """Return the sharding of each parameter.

    Args:
      mesh: the mesh.
      params: nested dicts of arrays or ShapeDtypeStructs.

    Returns:
      Nested dicts of NamedSharding.

    Raises:
      MeshError: the mesh does not divide a parameter above REPLICATE_BELOW_BYTES as its rule requires.
      ValueError: a parameter has no rule.
    """

    def leaf_sharding(path, leaf):
        name = path_name(path)
        axes = param_axes(name, leaf.shape)
        if math.prod(leaf.shape) * leaf.dtype.itemsize > REPLICATE_BELOW_BYTES:
            for axis, size in zip(axes, leaf.shape, strict=True):
                check_divides(mesh, axis, size, f"{name} {leaf.shape}")
        return NamedSharding(mesh, partition_spec(mesh, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(leaf_sharding, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading axis over `slice`, `data` and `fsdp`, the others replicated."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXIS_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that has the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_platform() -> str:
    """Return the platform of the current mesh, whose devices may be of another machine, or else JAX's default.

    Returns:
      `cpu`, `gpu` or `tpu`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation under the mesh set by `jax.set_mesh`; the identity without a mesh.

    Args:
      x: the activation.
      *axes: logical axis of each dimension; None is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))
