"""How arrays lie over devices: one mesh, one table of parameters, one table of rules.

A parameter's name gives its logical axes (`PARAM_AXES`), a logical axis gives its mesh axes (`RULES`).
Model code never names a mesh axis: it calls `constrain(x_BTD, "batch", None, "embed")`, which does nothing
when no mesh is in force. Mesh axes: `slice` and `data` split the batch, the first across the network between
slices of a TPU pod; `fsdp` splits the batch and the parameters; `model` splits heads and channels.
"""

from __future__ import annotations

import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.config import MeshConfig
from dalle_jax.typing import Params

AXES = ("slice", "data", "fsdp", "model")
REPLICATE_BELOW_BYTES = (
    2**20
)  # bytes up to which a parameter may lie whole on every device although a rule would split it

# Logical axis -> mesh axes.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "embed": (),  # activations keep their channels whole between layers
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "width": ("fsdp",),  # the embed axis of parameters: gathered when used
    # Rows of the matrices that lead back to the stream. `fsdp` splits rows and not columns, as in the others:
    # gathered columns would have to be copied into place.
    "heads_in": ("model", "fsdp"),
    "mlp_in": ("model", "fsdp"),
    "layers": (),
}

# Parameter path (as "a/b/c") -> logical axis of each dimension. Exactly one pattern matches each parameter.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Transformer (dalle/); `blocks` are stacked over layers.
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
    # What an encoder-decoder Transformer (bart.py) has besides.
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
    # What one that reads captions with T5 (nn/t5.py) has besides.
    (r"text_null", (None, "width")),
    (r"text_proj/(up|down)/kernel", ("width", None)),
    (r"t5/relative", (None, None)),
    (r"(text|image)_head/kernel", ("width", "vocab")),
    (r"(text|image)_head/bias", ("vocab",)),
    # dVAE (models/dvae.py): convolutions split over input channels.
    (r"(encoder|decoder)/.*(conv_\d|id_path|input|output)/kernel", (None, None, "width", None)),
    (r"(encoder|decoder)/.*(conv_\d|id_path|input|output)/bias", (None,)),
    # VQGAN (models/vqgan/autoencoder.py, quantize.py), alone and as part of a state with a discriminator.
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
    # CLIP (clip.py).
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
# The towers of CLIP, the text encoder of diffusion and T5 are of the Transformer's blocks.
PARAM_AXES += tuple(
    (f"(vision|text|text_encoder|t5)/{pattern}", axes)
    for pattern, axes in PARAM_AXES
    if pattern.startswith("blocks/")
)


class MeshError(ValueError):
    """A mesh that the devices or the sizes of the model do not allow."""


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (all devices by default), axes `slice, data, fsdp, model`.

    Slices of TPU joined by the data centre's network are found by themselves; the other sizes are those within
    a slice, so parameters and heads are never split across that network and only gradients cross it. Devices
    that are one slice are taken as several, in their order, where `cfg.slices` says so. Raises MeshError when
    the sizes do not multiply to the number of devices, or `slices` is not what is there.
    """
    if cfg.cpu_devices:
        _split_cpu(cfg.cpu_devices)
    devices = jax.devices() if devices is None else devices
    found = len({getattr(d, "slice_index", 0) for d in devices})
    slices = found if cfg.slices == -1 else cfg.slices
    if found not in (1, slices) or len(devices) % slices:
        raise MeshError(
            f"mesh slices={cfg.slices}, and {len(devices)} devices in {found} slices are here; leave it at -1 to "
            "take what is there"
        )
    within, sizes = len(devices) // slices, [cfg.data, cfg.fsdp, cfg.model]
    here = f"{within} devices" + (f" in each of {slices} slices" if slices > 1 else "")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if within % known:
            raise MeshError(
                f"mesh data={cfg.data} fsdp={cfg.fsdp} model={cfg.model} does not divide {here}; "
                f"the named sizes multiply to {known}, want a divisor of {within}"
            )
        sizes[sizes.index(-1)] = within // known
    if math.prod(sizes) != within:
        raise MeshError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} model={cfg.model} wants {math.prod(sizes)} devices, "
            f"{here.replace(' devices', '')} are here; set one of them to -1 to take what is there"
        )
    if found > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # jax.make_mesh would refuse an axis that is part of a side of the torus: 128 of 16 x 16 chips.
        grid = mesh_utils.create_device_mesh((slices, *sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _split_cpu(count: int) -> None:
    """Makes the CPU `count` devices, if no device is in use yet; then the mesh takes what there is."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if "initialized" not in str(error):
            raise


def partition_spec(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """Partition of `shape`: each logical axis over its mesh axes where they divide it, else whole.

    Of an activation, whose sizes are checked in the configuration; `param_shardings` is stricter.
    """
    parts = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[name] if name is not None else ()
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        parts.append(mesh_axes if mesh_axes and size % ways == 0 else None)
    return PartitionSpec(*parts)


def check_divides(mesh: Mesh, axis: str | None, size: int, what: str) -> None:
    """Raises MeshError unless `size` of `what`, along a logical axis, divides over the devices of its rule."""
    mesh_axes = RULES[axis] if axis is not None else ()
    ways = math.prod(mesh.shape[a] for a in mesh_axes)
    if size % ways:
        devices = " x ".join(f"mesh.{a} {mesh.shape[a]}" for a in mesh_axes if mesh.shape[a] > 1)
        divisors = ", ".join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0)
        raise MeshError(f"{what}: {size} does not divide over {devices}; want one of {divisors}")


def param_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Logical axes of the parameter called `path`. Raises ValueError unless exactly one pattern matches."""
    found = [axes for pattern, axes in PARAM_AXES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"{path} {shape}: matched {len(found)} rules in PARAM_AXES, want exactly 1")
    if len(found[0]) != len(shape):
        raise ValueError(f"{path} {shape}: its rule has {len(found[0])} axes {found[0]}, want {len(shape)}")
    return found[0]


def path_name(path: tuple) -> str:
    """`a/b/c` for a key path of nested dictionaries."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def param_shardings(mesh: Mesh, params: Params) -> Params:
    """A NamedSharding for each parameter; `params` holds arrays or ShapeDtypeStructs in nested dicts.

    Raises MeshError for a parameter above SMALL that the mesh does not divide as its rule says.
    """

    def one(path, leaf):
        name = path_name(path)
        axes = param_axes(name, leaf.shape)
        if math.prod(leaf.shape) * leaf.dtype.itemsize > REPLICATE_BELOW_BYTES:
            for axis, size in zip(axes, leaf.shape, strict=True):
                check_divides(mesh, axis, size, f"{name} {leaf.shape}")
        return NamedSharding(mesh, partition_spec(mesh, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes under the mesh set by `jax.set_mesh`; `x` itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))
