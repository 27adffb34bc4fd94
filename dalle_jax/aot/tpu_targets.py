"""TPU topologies that nobody has to hold: names to the devices that the real compiler compiles for.

A topology is `GENERATION:SHAPE` (`v5p:4x4x4`) or the name under which Cloud sells it (`v5p-128`, `v5litepod-256`);
v4 and v5p names count TensorCores, two to a chip, the others chips. Needs the package libtpu, and no TPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from dalle_jax.aot.gpu_targets import suggest


class Chip(NamedTuple):
    """Published figures of one chip (cloud.google.com/tpu/docs, pages of each version).

    flops: peak of dense bf16 products per second. hbm: GiB. ici: bytes per second of all its links to its
    neighbours. clock: cycles per second that follow from peak and the size of the matrix units.
    """

    flops: float
    hbm: float
    ici: float
    clock: float


CHIPS = {
    "v4": Chip(275e12, 32, 300e9, 1.05e9),
    "v5e": Chip(197e12, 16, 200e9, 1.50e9),
    "v5p": Chip(459e12, 95, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32, 448e9, 1.75e9),
}
DCN = 6.25e9  # bytes per second and chip between slices: 200 Gbit/s for a host of four

# First part of a Cloud name -> generation, and how many of what the name counts make a chip.
_CLOUD = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1)}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip

_MOST = {"v4": 4096, "v5p": 8960, "v5e": 256, "v6e": 256}  # chips of one pod, beyond which slices are joined

# Names under which Cloud sells a slice -> generation and shape. More shapes are sold; they go by their shape.
CLOUD_NAMES = {
    f"{name}-{chips * cores}": (generation, tuple(int(n) for n in shape.split("x")))
    for name, (generation, cores) in _CLOUD.items()
    for chips, shape in (_CUBES if cores == 2 else _FLAT).items()
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Generation and shape in chips of `v5p:4x4x4` or `v5p-128`. Raises ValueError for what is neither."""
    if name in CLOUD_NAMES:
        return CLOUD_NAMES[name]
    if found := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name):
        generation, shape = found[1], tuple(int(n) for n in found[2].split("x"))
        axes = 3 if generation in ("v4", "v5p") else 2
        if generation in CHIPS and len(shape) == axes and min(shape) >= 1:
            _check_shape(name, generation, shape)
            return generation, shape
    family = [known for known in CLOUD_NAMES if known.partition("-")[0] == name.partition("-")[0]]
    if family:
        raise ValueError(
            f"topology {name!r} is not one; known are {', '.join(family)}, and others by their shape, as in "
            f"{CLOUD_NAMES[family[0]][0]}:{'x'.join(map(str, CLOUD_NAMES[family[-1]][1]))}"
        )
    families = [f"{first}-N" for first in _CLOUD]
    raise ValueError(
        f"topology {name!r} is not one; want v4 or v5p with three sizes (v5p:4x4x4), v5e or v6e with two "
        f"(v5e:16x16), a Cloud name ({', '.join(families)}: v5p-128, v5litepod-256, v6e-256), a GPU, or local; "
        f"{suggest(name)}"
    )


def _check_shape(name: str, generation: str, shape: tuple[int, ...]) -> None:
    chips, most = math.prod(shape), _MOST[generation]
    if chips > most:
        raise ValueError(
            f"topology {name!r} has {chips} chips, a slice of {generation} at most {most}; take --slices for more"
        )
    if chips > 1 and (shape[0] % 2 or shape[1] % 2):
        raise ValueError(
            f"topology {name!r} does not divide into hosts of 2 x 2 chips; want even numbers first, or one chip"
        )


def tpu_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices of a topology. One device is one chip.

    Sets variables of libtpu for this process, which must not train after it. Raises ValueError for a topology
    that does not exist, ModuleNotFoundError without libtpu.
    """
    generation, shape = parse_topology(name)
    if slices < 1:
        raise ValueError(f"slices is {slices}; want at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"compiling for {name} needs the TPU compiler: pip install 'dalle-jax[compile]' (no TPU is needed)"
        )
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_LOG_DIR="disabled",
        TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    )  # fmt: skip
    from jax.experimental import topologies

    torus = generation in ("v4", "v5p")
    # Without the wrap-around links the compiler turns every all-gather into an all-reduce.
    wrap = (all(n % 4 == 0 for n in shape),) * 3 if torus else (shape[0] == 16, shape[1] == 16, False)
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{generation}:{'x'.join(map(str, shape))}",
        num_slices=slices,
        chip_config_name="megacore" if torus else "default",  # both cores of a chip as one device
        chips_per_host_bounds=(1, 1, 1) if math.prod(shape) == 1 else (2, 2, 1),
        wrap=wrap,
    )
    return list(described.devices)
