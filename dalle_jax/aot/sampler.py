"""Compile the drawing of pictures for one chip, here or not: does it fit, and what would a picture take?

`train.py CONFIG --compile-only v5e:1x1 --sample 8` compiles what draws that many pictures: of a Transformer, prefill
and decode loop of `sampling.generate` for as many captions, with parameters in the form that sampling prepares
(matrices in the compute dtype); of a diffusion model, all steps of the sampler. Seconds are the compiler's cycles
at the chip's clock, which overstate loops that wait for memory. For a GPU (`--compile-only h200 --sample 8`) it counts
instead what the kernels of the decode loop read and write (kernels.py, roofline.py).
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
from dalle_jax.aot.report import GIB, CompileReport, estimate, measure, one_device, tree_gib
from dalle_jax.config import (
    DalleConfig,
    DiffusionConfig,
    MeshConfig,
    Quantization,
    TrainConfig,
    TransformerConfig,
)
from dalle_jax.models import autoregressive, dalle
from dalle_jax.models.diffusion import denoise, sampler, unet
from dalle_jax.models.registry import model_spec
from dalle_jax.parallel.sharding import make_mesh, replicated
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.flops import count_flops

STEPS, SAMPLER = 50, "dpm++2m"  # of a diffusion model: what the command `sample` takes by itself


class _Drawing(NamedTuple):
    """What draws: a jitted function lowered on demand, shapes of its parameters, GiB of its cache or None, model
    FLOPs, its description, and of codes the bytes that a pass of the decode loop must read and what lies on the device
    before the program runs, GiB by class and in all."""

    lower: Callable[[], Any]
    params: Any
    cache: float | None
    flops: float
    what: str
    least: float | None = None
    known: dict[str, float] | None = None
    held: float | None = None


def compile_sample(
    config: TrainConfig,
    target: str,
    rows: int,
    slices: int = 1,
    keep: str | None = None,
    *,
    weights: Quantization | None = None,
) -> CompileReport:
    """Compiles drawing `rows` pictures on one device of `target` and describes it.

    weights: of a Transformer, as `prepare_for_decode` has them. keep: file for the text of the compiled
    program. Returns the fields of `compile_only.compile_step`, times for all rows; in `memory_gib` the KV cache,
    `cache`, is a part of `temporaries`, and `stored`, for a CPU, the parameters of a run, which the command `sample`
    keeps in the memory of the host; `decoding`, of a Transformer on a GPU, is what `roofline.decoding` says. Raises
    ValueError for a stage that draws nothing or not so, no rows, or a target of more than one chip.
    """
    model = config.model
    if not isinstance(model, TransformerConfig | DiffusionConfig):
        raise ValueError(f"--sample draws with the stages dalle, bart and diffusion, not {model.kind}")
    if rows < 1:
        raise ValueError(f"--sample is {rows}; want at least 1 row")
    if isinstance(model, DiffusionConfig) and weights is not None:
        raise ValueError("--quantization is for Transformers; this is a diffusion model")
    where = one_device(target, "--sample", slices)
    mesh = make_mesh(MeshConfig(data=1), where.devices)
    if isinstance(model, DiffusionConfig):
        drawing = _of_diffusion(model, rows, mesh)
    else:
        drawing = _of_codes(model, rows, mesh, weights)
    report = where.about() | {
        "program": drawing.what,
        "mesh": dict(mesh.shape),
        "batch": rows,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(drawing.params)),
        "compiler_options": {},
        "model_flops": drawing.flops,
    }
    known = drawing.known or {"parameters": tree_gib(drawing.params)}
    found, costs, hlo_text = measure(drawing.lower, mesh, where, known, keep, drawing.held)
    if drawing.cache is not None:  # it stands among the temporaries too
        found["memory_gib"]["cache"] = drawing.cache
    inside = None if costs is None or costs.kernels else 0.0  # operations of kernels that are not XLA's
    times, decoding = estimate(costs, hlo_text, where, drawing.flops, inside), None
    if drawing.least is not None and where.devices[0].platform == "gpu":
        decoding = roofline.decode_loop_report(hlo_text, where.gpu, rows, drawing.least)
    return report | found | times | {"decoding": decoding}


def _shapes(make: Callable[[], Any], mesh: Mesh) -> Any:
    """What `make` makes, as shapes of arrays that lie whole on the mesh."""
    whole = replicated(mesh)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), jax.eval_shape(make)
    )


class CompiledSampler(NamedTuple):
    """The drawing of codes: `generate` lowered on demand, its arguments as shapes, and what lies on the device before
    it runs, in bytes: `stored`, the parameters of a run, which stay in the memory of the host: 0 where that is another;
    `prepared`, those of sampling; `given`, captions and keys."""

    lower: Callable[[], Any]
    arguments: tuple[Any, Any, Any]
    stored: int
    prepared: int
    given: int


def lower_sampler(
    model: TransformerConfig,
    rows: int,
    mesh: Mesh,
    *,
    weights: Quantization | None = None,
    guided: bool = False,
) -> CompiledSampler:
    """Drawing `rows` pictures of as many captions on the one device of `mesh`, as the command `sample` does it."""
    platform = mesh.devices.flat[0].platform
    stored = _shapes(lambda: autoregressive.init(model, jax.random.key(0)), mesh)
    params = _shapes(
        lambda: autoregressive.prepare_for_decode(
            model, autoregressive.init(model, jax.random.key(0)), quantization=weights, platform=platform
        ),
        mesh,
    )
    text = _shapes(lambda: jnp.zeros((rows, model.text_len), jnp.int32), mesh)
    keys = _shapes(lambda: row_keys(jnp.arange(rows)), mesh)
    lower = partial(generate.lower, model, params, text, keys, guidance_scale=1.5 if guided else None)
    in_run = _size(stored) if platform == "cpu" else 0
    return CompiledSampler(lower, (params, text, keys), in_run, _size(params), _size((text, keys)))


def _of_codes(model: TransformerConfig, rows: int, mesh: Mesh, weights: Quantization | None) -> _Drawing:
    codes = lower_sampler(model, rows, mesh, weights=weights)
    params, text, _ = codes.arguments
    cache = jax.eval_shape(lambda: autoregressive.init_cache(model, rows))
    formula = model_spec(model).sample_flops
    if formula is not None:
        flops = formula(model, rows)
    else:
        drawn = _shapes(lambda: jnp.zeros((rows, model.num_codes), jnp.int32), mesh)
        whole = _shapes(lambda: autoregressive.init(model, jax.random.key(0)), mesh)
        flops = count_flops(jax.make_jaxpr(partial(autoregressive.logits, model))(whole, text, drawn))
    return _Drawing(
        codes.lower,
        params,
        _size(cache) / GIB,
        flops,
        f"drawing the codes of {rows} pictures at once",
        minimum_bytes(model, params, cache, rows),
        ({"stored": codes.stored / GIB} if codes.stored else {}) | {"parameters": codes.prepared / GIB},
        (codes.stored + codes.prepared + codes.given) / GIB,
    )


def _size(tree: Any) -> int:
    """Bytes of all arrays; a key is two numbers of 32 bits."""
    return sum(
        leaf.size * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def minimum_bytes(model: TransformerConfig, params: Any, cache: Any, rows: int) -> float:
    """What one pass of the decode loop must read at least, the mean over the places: the layers and the head once, of
    the embeddings a row each, and once the keys and values that its code sees.

    cache: of as many captions. Text keys are read whole.
    """
    weights = _size(
        [params[name] for name in ("blocks", "image_head", "norm_out", "norm_head") if name in params]
    )
    position = (
        2 * rows * model.dim * jnp.dtype(model.dtype).itemsize
    )  # key and value of one position of a layer
    if isinstance(model, DalleConfig):
        masks, which = dalle.layer_masks(model)
        first = model.text_len - model.shift_masks
        by_mask = masks[:, first:, first:].sum(axis=2).mean(axis=1)
        seen, text = float(by_mask[which].sum()), _size([layer.text for layer in cache])
    else:
        weights -= _size(
            [(layer["cross"]["k"], layer["cross"]["v"]) for layer in params["blocks"]]
        )  # of prefill
        seen, text = model.layers * (model.num_codes + 1) / 2, _size(cache.cross_kv)
    return weights + seen * position + text


def _of_diffusion(model: DiffusionConfig, rows: int, mesh: Mesh) -> _Drawing:
    size = model.image_size

    def shapes(make):
        return _shapes(make, mesh)

    params = shapes(lambda: unet.init(model, jax.random.key(0)))

    def ints(*shape: int):
        return shapes(lambda: jnp.zeros((rows, *shape), jnp.int32))

    given = unet.Conditions(
        text=None if model.text is None else ints(model.text.text_len),
        label=ints() if model.num_classes else None,
        codes=None if model.codes is None else ints(model.codes.grid**2),
        low_res=shapes(lambda: jnp.zeros((rows, model.low_res_size, model.low_res_size, 3)))
        if model.low_res_size
        else None,
    )
    keys = shapes(lambda: row_keys(jnp.arange(rows)))

    def draw(params, given, keys):
        context = denoise.DenoiserContext(
            params, denoise.encode_conditions_cfg(model, params, given, use_cfg=False)
        )
        see, shape = denoise.make_denoiser(model), (size, size, 3)
        return sampler.sample(model.noise, see, context, keys, shape, sampler=SAMPLER, num_steps=STEPS).x

    flops = count_flops(jax.make_jaxpr(draw)(params, given, keys))
    what = f"drawing {rows} pictures at once, {STEPS} steps of {SAMPLER}"
    lower = partial(jax.jit(draw).lower, params, given, keys)
    return _Drawing(lower, params, None, flops, what)
