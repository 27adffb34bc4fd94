"""Compile the drawing of pictures for one chip that is not here: does it fit, and what would a picture take?

`train.py CONFIG --compile-only v5e:1x1 --sample 8` compiles prefill and decode loop of `sampling.generate` for as
many captions, one picture each, with parameters in the form that sampling prepares (matrices in the compute
dtype). Seconds are the compiler's cycles at the chip's clock, which overstate loops that wait for memory.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax import autoregressive
from dalle_jax.config import MeshConfig, TrainConfig, TransformerConfig
from dalle_jax.nn.sharding import make_mesh, replicated
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train import hlo
from dalle_jax.train.compile_only import GIB, devices_of, gib, hbm_gib, needed_gib, out_of_memory
from dalle_jax.train.topology import CHIPS, parse_topology


def compile_sample(config: TrainConfig, target: str, rows: int, slices: int = 1) -> dict[str, Any]:
    """Compiles drawing `rows` pictures of as many captions on one device of `target` and describes it.

    Returns `fits`, `peak_gib_per_device`, `hbm_gib_per_device`, `memory_gib` by class (`cache`, the KV cache,
    is a part of `temporaries`), `seconds` for all rows, an estimate or None, `compile_seconds`. Raises ValueError
    for a stage that draws no codes, no rows, or a topology of more than one chip.
    """
    model = config.model
    if not isinstance(model, TransformerConfig):
        raise ValueError(f"--sample draws codes with the stage dalle, not {model.kind}")
    if rows < 1:
        raise ValueError(f"--sample is {rows}; want at least 1 row")
    devices = devices_of(target, slices)
    if target != "local" and len(devices) != 1:
        raise ValueError(
            f"--sample compiles for one chip and {target} has {len(devices)}; want v5e:1x1, v6e:1x1, v4:1x1x1 or "
            "v5p:1x1x1"
        )
    chip = None if target == "local" else CHIPS[parse_topology(target)[0]]
    mesh = make_mesh(MeshConfig(data=1), devices[:1])

    def shapes(make):
        whole = replicated(mesh)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), jax.eval_shape(make)
        )

    params = shapes(lambda: autoregressive.unstack(model, autoregressive.init(model, jax.random.key(0))))
    text = shapes(lambda: jnp.zeros((rows, model.text_len), jnp.int32))
    keys = shapes(lambda: row_keys(jnp.arange(rows)))
    cache = jax.eval_shape(lambda: autoregressive.init_cache(model, rows))
    memory = {
        "parameters": gib(params),
        "cache": sum(c.size * c.dtype.itemsize for c in jax.tree.leaves(cache)) / GIB,
    }
    limit = hbm_gib(chip, devices[0])
    report: dict[str, Any] = {
        "target": target,
        "device_kind": devices[0].device_kind,
        "rows": rows,
        "hbm_gib_per_device": limit,
        "memory_gib": memory,
    }
    begin = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = generate.lower(model, params, text, keys).compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(str(error)):
            raise
        found = {"fits": False, "peak_gib_per_device": needed_gib(str(error)), "seconds": None}
        return report | found | {"compile_seconds": round(time.monotonic() - begin, 1)}
    seconds = time.monotonic() - begin
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = (arguments + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes) / GIB
    memory |= {
        "temporaries": stats.temp_size_in_bytes / GIB,
        "program": stats.generated_code_size_in_bytes / GIB,
    }
    costs = hlo.costs(compiled.as_text())
    estimate = costs.cycles / chip.clock if chip and costs.cycles and not costs.kernels else None
    return report | {
        "fits": None if limit is None else peak <= limit,
        "peak_gib_per_device": peak,
        "seconds": estimate,
        "compile_seconds": round(seconds, 1),
    }


def text_of(report: dict[str, Any]) -> str:
    """The report as people read it."""
    peak, limit = report["peak_gib_per_device"], report["hbm_gib_per_device"]
    room = ("more" if peak is None else f"{peak:.2f} GiB") + (f" of {limit:g} GiB" if limit else "")
    verdict = {True: "fits", False: "DOES NOT FIT", None: "memory of the device is not known"}[report["fits"]]
    lines = [
        f"target       {report['target']}: 1 x {report['device_kind']}, {report['rows']} pictures at once",
        f"memory       {room}: {verdict}",
        *(f"  {name:<26}{size:8.2f} GiB" for name, size in report["memory_gib"].items()),
    ]
    if report["seconds"] is not None:
        lines.append(
            f"time         {report['seconds']:.2f} s for all rows, an estimate: cycles of the compiler"
        )
    return "\n".join([*lines, f"compiled in  {report['compile_seconds']:.1f} s"])
