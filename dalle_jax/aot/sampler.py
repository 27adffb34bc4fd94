"""Ahead-of-time compilation of image sampling for one device, attached or absent.

The program of a Transformer is prefill and decode loop of `sampling.generate`, one caption per image, with parameters
as sampling prepares them; that of a diffusion model is all steps of its sampler. TPU times are the compiler's cycles,
which overestimate loops that wait for memory. For a GPU the report has the memory traffic of the decode loop
(roofline.py). B batch, T text positions, N codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle_jax.aot import roofline
from dalle_jax.aot.report import CompileReport, Program, compile_and_report, tree_gib
from dalle_jax.aot.targets import GIB, single_device_target
from dalle_jax.config import (
    DalleConfig,
    DiffusionConfig,
    MeshConfig,
    Quantization,
    SamplerName,
    TrainConfig,
    TransformerConfig,
)
from dalle_jax.models import autoregressive, dalle
from dalle_jax.models.diffusion import denoise, sampler, unet
from dalle_jax.models.registry import model_spec
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import replicated
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.flops import count_flops
from dalle_jax.typing import Params

_NUM_STEPS = 50  # of a diffusion model, the default of `dalle-jax sample`
_SAMPLER: SamplerName = "dpm++2m"
_GUIDANCE_SCALE = 1.5  # traced: any scale gives the same program


def compile_sampler(
    config: TrainConfig,
    target: str,
    batch_size: int,
    num_slices: int = 1,
    hlo_path: str | None = None,
    *,
    quantization: Quantization | None = None,
) -> CompileReport:
    """Compile the sampling of a batch of images and report on it.

    Args:
      config: Configuration of a Transformer or a diffusion model.
      target: A target of one device, as in `targets.make_target`.
      batch_size: Number of images.
      num_slices: TPU slices of this topology.
      hlo_path: File for the optimized HLO; None writes none.
      quantization: 8-bit format of a Transformer's kernels, as in `prepare_for_decode`.

    Returns:
      The report, with times for the whole batch. In `memory_gib` of a Transformer, `cache` is the KV cache, a part of
      `temporaries`, and on a CPU `checkpoint_parameters` are those of the run, which `dalle-jax sample` keeps in
      memory.

    Raises:
      ValueError: If the model does not sample images, there are no images, or the target has several devices.
      ModuleNotFoundError: If the compiler of the target is not installed.
    """
    model = config.model
    if not isinstance(model, TransformerConfig | DiffusionConfig):
        raise ValueError(f"Expected a stage that samples images (dalle, bart, diffusion), got {model.kind}.")
    if batch_size < 1:
        raise ValueError(f"Expected at least 1 image, got --sample {batch_size}.")
    if isinstance(model, DiffusionConfig) and quantization is not None:
        raise ValueError(f"Expected no --quantization for a diffusion model, got {quantization}. Remove it.")
    device = single_device_target(target, "--sample", num_slices)
    mesh = make_mesh(MeshConfig(data=1), device.devices)
    if isinstance(model, DiffusionConfig):
        report, _ = compile_and_report(_diffusion_program(model, batch_size, mesh), device, hlo_path)
        return report
    lowered = lower_sampler(model, batch_size, mesh, quantization=quantization)
    cache = jax.eval_shape(lambda: autoregressive.init_cache(model, batch_size))
    report, text = compile_and_report(
        _transformer_program(model, batch_size, mesh, lowered), device, hlo_path
    )
    report["memory_gib"]["cache"] = _tree_bytes(cache) / GIB
    if text and device.devices[0].platform == "gpu":
        params = lowered.arguments[0]
        minimum = minimum_decode_bytes(model, params, cache, batch_size)
        report["decode_loop"] = roofline.decode_loop_report(text, device.gpu, batch_size, minimum)
    return report


class LoweredSampler(NamedTuple):
    """Sampling of codes, and the bytes on the device before it runs.

    Attributes:
      lower: Lowers `generate`; returns a `jax.stages.Lowered`.
      arguments: Parameters, captions and keys as ShapeDtypeStructs.
      checkpoint_bytes: Parameters of the run on a CPU; 0 on other devices, since they stay in host memory.
      params_bytes: Parameters as sampling prepares them.
      input_bytes: Captions and keys.
    """

    lower: Callable[[], Any]
    arguments: tuple[Params, jax.Array, jax.Array]
    checkpoint_bytes: int
    params_bytes: int
    input_bytes: int


def lower_sampler(
    model: TransformerConfig,
    batch_size: int,
    mesh: Mesh,
    *,
    quantization: Quantization | None = None,
    use_cfg: bool = False,
) -> LoweredSampler:
    """Return the program that samples one image for each of `batch_size` captions on the device of `mesh`.

    Args:
      model: A Transformer.
      batch_size: Number of images.
      mesh: One device.
      quantization: 8-bit format of the kernels; None keeps the compute dtype.
      use_cfg: Whether to use classifier-free guidance, which doubles the batch.
    """
    platform = mesh.devices.flat[0].platform

    def init() -> Params:
        return autoregressive.init(model, jax.random.key(0))

    def prepare() -> Params:
        return autoregressive.prepare_for_decode(model, init(), quantization, platform=platform)

    params = _abstract(prepare, mesh)
    text_BT = _abstract(lambda: jnp.zeros((batch_size, model.text_len), jnp.int32), mesh)
    keys_B = _abstract(lambda: row_keys(jnp.arange(batch_size)), mesh)
    scale = _GUIDANCE_SCALE if use_cfg else None
    return LoweredSampler(
        lower=partial(generate.lower, model, params, text_BT, keys_B, guidance_scale=scale),
        arguments=(params, text_BT, keys_B),
        checkpoint_bytes=_tree_bytes(jax.eval_shape(init)) if platform == "cpu" else 0,
        params_bytes=_tree_bytes(params),
        input_bytes=_tree_bytes((text_BT, keys_B)),
    )


def _transformer_program(
    model: TransformerConfig, batch_size: int, mesh: Mesh, lowered: LoweredSampler
) -> Program:
    params, text_BT, _ = lowered.arguments
    formula = model_spec(model).sample_flops
    if formula is not None:
        flops = formula(model, batch_size)
    else:
        codes_BN = _abstract(lambda: jnp.zeros((batch_size, model.num_codes), jnp.int32), mesh)
        init_params = _abstract(lambda: autoregressive.init(model, jax.random.key(0)), mesh)
        logits_fn = partial(autoregressive.logits, model)
        flops = count_flops(jax.make_jaxpr(logits_fn)(init_params, text_BT, codes_BN))
    memory_gib = {"parameters": lowered.params_bytes / GIB}
    if lowered.checkpoint_bytes:
        memory_gib = {"checkpoint_parameters": lowered.checkpoint_bytes / GIB} | memory_gib
    return Program(
        lower=lowered.lower,
        description=f"sampling of the codes of {batch_size} images",
        mesh=mesh,
        batch_size=batch_size,
        parameters=_count(params),
        model_flops=flops,
        memory_gib=memory_gib,
        resident_gib=(lowered.checkpoint_bytes + lowered.params_bytes + lowered.input_bytes) / GIB,
    )


def minimum_decode_bytes(model: TransformerConfig, params: Params, cache: Any, batch_size: int) -> float:
    """Return the bytes that one pass of the decode loop must read, averaged over the image positions.

    These are the layers and the output head once, and for each image the visible keys and values; text keys count
    whole. The embedding row of a code is neglected.

    Args:
      model: A Transformer.
      params: Parameters as `prepare_for_decode` returns them, or their shapes.
      cache: KV cache of `batch_size` captions, or its shapes.
      batch_size: Number of images.
    """
    weights = _tree_bytes(
        [params[name] for name in ("blocks", "image_head", "norm_out", "norm_head") if name in params]
    )
    # Key and value of one position in one layer.
    position_bytes = 2 * batch_size * model.dim * jnp.dtype(model.dtype).itemsize
    if isinstance(model, DalleConfig):
        masks, mask_of_layer = dalle.layer_masks(model)
        first = model.text_len - model.shift_masks
        visible_by_mask = masks[:, first:, first:].sum(axis=2).mean(axis=1)
        visible = float(visible_by_mask[mask_of_layer].sum())
        text = _tree_bytes([layer.text for layer in cache])
    else:
        # Only the prefill computes keys and values of the captions.
        weights -= _tree_bytes([(layer["cross"]["k"], layer["cross"]["v"]) for layer in params["blocks"]])
        visible = model.layers * (model.num_codes + 1) / 2
        text = _tree_bytes(cache.cross_kv)
    return weights + visible * position_bytes + text


def _diffusion_program(model: DiffusionConfig, batch_size: int, mesh: Mesh) -> Program:
    def abstract_ints(*shape: int) -> jax.Array:
        return _abstract(lambda: jnp.zeros((batch_size, *shape), jnp.int32), mesh)

    def low_res() -> jax.Array:
        return jnp.zeros((batch_size, model.low_res_size, model.low_res_size, 3))

    conditions = unet.Conditions(
        text=None if model.text is None else abstract_ints(model.text.text_len),
        label=abstract_ints() if model.num_classes else None,
        codes=None if model.codes is None else abstract_ints(model.codes.grid**2),
        low_res=_abstract(low_res, mesh) if model.low_res_size else None,
    )
    params = _abstract(lambda: unet.init(model, jax.random.key(0)), mesh)
    keys_B = _abstract(lambda: row_keys(jnp.arange(batch_size)), mesh)

    def sample_fn(params: Params, conditions: unet.Conditions, keys_B: jax.Array) -> jax.Array:
        encoded = denoise.encode_conditions_cfg(model, params, conditions, use_cfg=False)
        context = denoise.DenoiserContext(params, encoded)
        shape = (model.image_size, model.image_size, 3)
        denoiser = denoise.make_denoiser(model)
        return sampler.sample(
            model.noise, denoiser, context, keys_B, shape, sampler=_SAMPLER, num_steps=_NUM_STEPS
        ).x

    return Program(
        lower=partial(jax.jit(sample_fn).lower, params, conditions, keys_B),
        description=f"sampling of {batch_size} images in {_NUM_STEPS} steps of {_SAMPLER}",
        mesh=mesh,
        batch_size=batch_size,
        parameters=_count(params),
        model_flops=count_flops(jax.make_jaxpr(sample_fn)(params, conditions, keys_B)),
        memory_gib={"parameters": tree_gib(params)},
    )


def _abstract(fn: Callable[[], Any], mesh: Mesh) -> Any:
    """Return the result of `fn` as ShapeDtypeStructs replicated over the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), jax.eval_shape(fn)
    )


def _tree_bytes(tree: Any) -> int:
    """Return the bytes of all arrays; a key has two 32-bit words."""
    return sum(
        leaf.size * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def _count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
