"""What the compiler of the devices is told beyond its defaults when it compiles a training step.

The same for a step that runs and for one that `--compile-only` looks at: the table below, and over it
`compiler_options` of the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

# Without it the TPU compiler splits products over a loop of permutes ("windowed einsum") in some layouts, which
# its own cycles put at two to three times the time of gathering the weights.
_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# Fast memory that one fused operation may fill, in KiB, by kind of device. By default the compiler cuts products into
# pieces that its own cycles put at 76% of the peak of a v5p, with this at 94%; half of the memory is left to fetch
# ahead. On v6e and v5e other values gained little or lost (docs/scale.md): those keep the default.
_VMEM_KIB = {"TPU v5": "32768"}


def compiler_options(mesh: Mesh, wanted: Sequence[str] = ()) -> dict[str, str]:
    """Options by name for programs of the mesh's devices.

    wanted: NAME=VALUE each, in place of ours; NAME= leaves that option as the compiler has it.
    """
    device, options = mesh.devices.flat[0], {}
    if device.platform == "tpu":
        options |= _TPU
        if device.device_kind in _VMEM_KIB:
            options["xla_tpu_scoped_vmem_limit_kib"] = _VMEM_KIB[device.device_kind]
    for option in wanted:
        name, _, value = option.partition("=")
        # XLA wants the truth of an option written as Python does.
        options[name] = value.capitalize() if value in ("true", "false") else value
    return {name: value for name, value in options.items() if value}


def refused_option(error: jax.errors.JaxRuntimeError) -> str | None:
    """What is wrong with an option, where that is what the compiler says; None for every other error."""
    text = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    if not text.startswith(("No such compile option", "While setting option")):
        return None
    return f"compiler_options: {text}; names are those of XLA_FLAGS and LIBTPU_INIT_ARGS without the dashes"
