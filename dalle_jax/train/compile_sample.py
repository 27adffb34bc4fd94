"""Compile the drawing of pictures for one chip that is not here: does it fit, and what would a picture take?

`train.py CONFIG --compile-only v5e:1x1 --sample 8` compiles what draws that many pictures: of a Transformer, prefill
and decode loop of `sampling.generate` for as many captions, with parameters in the form that sampling prepares
(matrices in the compute dtype); of a diffusion model, all steps of the sampler. Seconds are the compiler's cycles
at the chip's clock, which overstate loops that wait for memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax import autoregressive
from dalle_jax.config import DalleConfig, DiffusionConfig, MeshConfig, TrainConfig, TransformerConfig
from dalle_jax.diffusion import denoise, sampler, unet
from dalle_jax.nn.sharding import make_mesh, replicated
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.compile_report import GIB, Report, estimate, find_target, gib, measure
from dalle_jax.train.flops import dalle_flops, products
from dalle_jax.train.topology import parse_topology

STEPS, SAMPLER = 50, "dpm++2m"  # of a diffusion model: what the command `sample` takes by itself


class _Drawing(NamedTuple):
    """What draws: a jitted function lowered on demand, shapes of its parameters, GiB of its cache or None, model
    FLOPs, and its description."""

    lower: Callable[[], Any]
    params: Any
    cache: float | None
    flops: float
    what: str


def compile_sample(
    config: TrainConfig, target: str, rows: int, slices: int = 1, keep: str | None = None
) -> Report:
    """Compiles drawing `rows` pictures on one device of `target` and describes it.

    keep: file for the text of the compiled program. Returns the fields of `compile_only.compile_step`, times for all
    rows; in `memory_gib` the KV cache, `cache`, is a part of `temporaries`. Raises ValueError for a stage that draws
    nothing, no rows, or a topology of more than one chip.
    """
    model = config.model
    if not isinstance(model, TransformerConfig | DiffusionConfig):
        raise ValueError(f"--sample draws with the stages dalle, bart and diffusion, not {model.kind}")
    if rows < 1:
        raise ValueError(f"--sample is {rows}; want at least 1 row")
    chips = 1 if target == "local" else slices * math.prod(parse_topology(target)[1])
    if chips != 1:
        raise ValueError(
            f"--sample compiles for one chip and {target} has {chips}; want v5e:1x1, v6e:1x1, v4:1x1x1 or v5p:1x1x1"
        )
    where = find_target(target, slices)
    where = where._replace(devices=where.devices[:1])
    mesh = make_mesh(MeshConfig(data=1), where.devices)

    def shapes(make):
        whole = replicated(mesh)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), jax.eval_shape(make)
        )

    draw = _of_diffusion if isinstance(model, DiffusionConfig) else _of_codes
    drawing = draw(model, rows, shapes)
    report = where.about() | {
        "program": drawing.what,
        "mesh": dict(mesh.shape),
        "batch": rows,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(drawing.params)),
        "compiler_options": {},
        "model_flops": drawing.flops,
    }
    found, costs = measure(drawing.lower, mesh, where, {"parameters": gib(drawing.params)}, keep)
    if drawing.cache is not None:  # it stands among the temporaries too
        found["memory_gib"]["cache"] = drawing.cache
    kernels = None if costs is None or costs.kernels else 0.0
    return report | found | estimate(costs, where, drawing.flops, kernels)


def _of_codes(model: TransformerConfig, rows: int, shapes) -> _Drawing:
    params = shapes(lambda: autoregressive.unstack(model, autoregressive.init(model, jax.random.key(0))))
    text = shapes(lambda: jnp.zeros((rows, model.text_len), jnp.int32))
    keys = shapes(lambda: row_keys(jnp.arange(rows)))
    cache = jax.eval_shape(lambda: autoregressive.init_cache(model, rows))
    cache_gib = sum(c.size * c.dtype.itemsize for c in jax.tree.leaves(cache)) / GIB
    if isinstance(model, DalleConfig):
        flops = dalle_flops(model, rows, text_head=False)
    else:
        codes = shapes(lambda: jnp.zeros((rows, model.num_codes), jnp.int32))
        whole = shapes(lambda: autoregressive.init(model, jax.random.key(0)))
        flops = products(jax.make_jaxpr(partial(autoregressive.logits, model))(whole, text, codes))
    lower = partial(generate.lower, model, params, text, keys)
    return _Drawing(lower, params, cache_gib, flops, f"drawing the codes of {rows} pictures at once")


def _of_diffusion(model: DiffusionConfig, rows: int, shapes) -> _Drawing:
    size = model.image_size
    params = shapes(lambda: unet.init(model, jax.random.key(0)))

    def ints(*shape: int):
        return shapes(lambda: jnp.zeros((rows, *shape), jnp.int32))

    given = unet.Conditions(
        text=None if model.text is None else ints(model.text.length),
        label=ints() if model.classes else None,
        codes=None if model.codes is None else ints(model.codes.grid**2),
        low=shapes(lambda: jnp.zeros((rows, model.low_size, model.low_size, 3))) if model.low_size else None,
    )
    keys = shapes(lambda: row_keys(jnp.arange(rows)))

    def draw(params, given, keys):
        context = denoise.Context(params, denoise.read_guided(model, params, given, guided=False))
        see, shape = denoise.denoiser(model), (size, size, 3)
        return sampler.sample(model.noise, see, context, keys, shape, sampler=SAMPLER, steps=STEPS).x

    flops = products(jax.make_jaxpr(draw)(params, given, keys))
    what = f"drawing {rows} pictures at once, {STEPS} steps of {SAMPLER}"
    lower = partial(jax.jit(draw).lower, params, given, keys)
    return _Drawing(lower, params, None, flops, what)
