"""TPU topologies to compile for without having one: names, specifications and compile-only devices.

A topology is `GENERATION:SHAPE` (`v5p:4x4x4`) or a Cloud name (`v5p-128`, `v5litepod-256`). Cloud names of v4 and v5p
count TensorCores, two per chip; the others count chips. Compilation needs the package libtpu and no TPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from dalle_jax.aot.gpu_targets import suggest_gpus


class TpuChip(NamedTuple):
    """Published specifications of a TPU chip (cloud.google.com/tpu/docs, one page per version).

    Attributes:
      peak_flops: Dense bf16 FLOP/s.
      hbm_gib: High-bandwidth memory, GiB.
      ici_bandwidth: Bytes per second of all inter-chip links together.
      clock_hz: Clock that follows from the peak and the size of the matrix units.
    """

    peak_flops: float
    hbm_gib: float
    ici_bandwidth: float
    clock_hz: float


TPU_CHIPS = {
    "v4": TpuChip(275e12, 32, 300e9, 1.05e9),
    "v5e": TpuChip(197e12, 16, 200e9, 1.50e9),
    "v5p": TpuChip(459e12, 95, 600e9, 1.75e9),
    "v6e": TpuChip(918e12, 32, 448e9, 1.75e9),
}
DCN_BANDWIDTH = 6.25e9  # bytes per second and chip between slices: 200 Gbit/s for a host of four chips

# Prefix of a Cloud name -> generation, and how many units of the name make a chip.
_CLOUD_PREFIXES = {
    "v4": ("v4", 2),
    "v5p": ("v5p", 2),
    "v5litepod": ("v5e", 1),
    "v5e": ("v5e", 1),
    "v6e": ("v6e", 1),
}
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip

_MAX_CHIPS = {"v4": 4096, "v5p": 8960, "v5e": 256, "v6e": 256}  # of one slice

# Cloud name -> generation and shape. Cloud offers more shapes; the format GENERATION:SHAPE selects them.
CLOUD_NAMES: dict[str, tuple[str, tuple[int, ...]]] = {
    f"{name}-{chips * cores}": (generation, tuple(int(n) for n in shape.split("x")))
    for name, (generation, cores) in _CLOUD_PREFIXES.items()
    for chips, shape in (_SHAPES_3D if cores == 2 else _SHAPES_2D).items()
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Parse the name of a topology.

    Args:
      name: `v5p:4x4x4` or `v5p-128`.

    Returns:
      Generation and shape in chips.

    Raises:
      ValueError: If there is no such topology.
    """
    if name in CLOUD_NAMES:
        return CLOUD_NAMES[name]
    if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name):
        generation, shape = match[1], tuple(int(n) for n in match[2].split("x"))
        axes = 3 if generation in ("v4", "v5p") else 2
        if generation in TPU_CHIPS and len(shape) == axes and min(shape) >= 1:
            _check_shape(name, generation, shape)
            return generation, shape
    same_prefix = [cloud for cloud in CLOUD_NAMES if cloud.partition("-")[0] == name.partition("-")[0]]
    if same_prefix:
        generation, shape = CLOUD_NAMES[same_prefix[-1]]
        raise ValueError(
            f"Expected a TPU topology, got {name!r}. Use {', '.join(same_prefix)}, or a shape, as in "
            f"{generation}:{'x'.join(map(str, shape))}."
        )
    cloud_names = ", ".join(f"{prefix}-N" for prefix in _CLOUD_PREFIXES)
    raise ValueError(
        f"Expected a TPU topology, a GPU or local, got {name!r}. Use v4 or v5p with three sizes (v5p:4x4x4), v5e or "
        f"v6e with two (v5e:16x16), a Cloud name ({cloud_names}: v5p-128, v5litepod-256, v6e-256), a GPU, or local. "
        f"{suggest_gpus(name)}"
    )


def _check_shape(name: str, generation: str, shape: tuple[int, ...]) -> None:
    chips, limit = math.prod(shape), _MAX_CHIPS[generation]
    if chips > limit:
        raise ValueError(
            f"Expected at most {limit} chips in a slice of {generation}, got {chips} in {name!r}. Use --slices for "
            "more."
        )
    if chips > 1 and (shape[0] % 2 or shape[1] % 2):
        raise ValueError(
            f"Expected a topology that divides into hosts of 2 x 2 chips, got {name!r}. Use even first two sizes, or "
            "one chip."
        )


def tpu_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Return the compile-only devices of a topology, one per chip.

    The call sets environment variables of libtpu, so the process cannot use a TPU afterwards.

    Args:
      name: `v5p:4x4x4` or `v5p-128`.
      num_slices: Slices of this topology, connected by the data center network.

    Raises:
      ValueError: If there is no such topology.
      ModuleNotFoundError: If libtpu is not installed.
    """
    generation, shape = parse_topology(name)
    if num_slices < 1:
        raise ValueError(f"Expected at least 1 slice, got {num_slices}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"Expected the TPU compiler to compile for {name}, got none. Use pip install 'dalle-jax[compile]' (no TPU "
            "is needed)."
        )
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_LOG_DIR="disabled",
        TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    )  # fmt: skip
    from jax.experimental import topologies

    torus = generation in ("v4", "v5p")
    # Without wrap-around links the compiler replaces every all-gather by an all-reduce.
    wrap = (all(n % 4 == 0 for n in shape),) * 3 if torus else (shape[0] == 16, shape[1] == 16, False)
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{generation}:{'x'.join(map(str, shape))}",
        num_slices=num_slices,
        chip_config_name="megacore" if torus else "default",  # both cores of a chip as one device
        chips_per_host_bounds=(1, 1, 1) if math.prod(shape) == 1 else (2, 2, 1),
        wrap=wrap,
    )
    return list(topology.devices)
