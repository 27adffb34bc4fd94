"""XLA compiler options of a training step, by device.

`make_step` and ahead-of-time compilation (aot/) compile with the same options: the table below, overridden by
`compiler_options` of the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

# By default the TPU compiler runs matrix products as loops of collective-permutes ("windowed einsum") in some
# layouts. Its own cycle counts put these at two to three times the time of an all-gather of the weights.
_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# VMEM that one fusion may use, in KiB, by device kind. On a v5p the default tiling reaches 76% of peak by the
# compiler's cycle counts, and this limit 94%; half of VMEM is left for prefetching. On v6e and v5e other limits gained
# little or lost (docs/scale.md), so these devices keep the default.
_VMEM_KIB = {"TPU v5": "32768"}


def compiler_options(mesh: Mesh, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return the compiler options for programs on the devices of a mesh.

    Args:
      mesh: Devices that the program runs on.
      overrides: Options as NAME=VALUE, which replace the defaults of this module. NAME= removes an option.

    Returns:
      Option name -> value, as `jax.jit(compiler_options=)` expects it.
    """
    device, options = mesh.devices.flat[0], {}
    if device.platform == "tpu":
        options |= _TPU
        if device.device_kind in _VMEM_KIB:
            options["xla_tpu_scoped_vmem_limit_kib"] = _VMEM_KIB[device.device_kind]
    for option in overrides:
        name, _, value = option.partition("=")
        # XLA parses booleans in Python's spelling.
        options[name] = value.capitalize() if value in ("true", "false") else value
    return {name: value for name, value in options.items() if value}


def compiler_option_error(error: jax.errors.JaxRuntimeError) -> str | None:
    """Return a message for an unknown or invalid compiler option, or None for any other error."""
    message = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    if not message.startswith(("No such compile option", "While setting option")):
        return None
    return f"compiler_options: {message}. Use the names of XLA_FLAGS and LIBTPU_INIT_ARGS without the dashes."
