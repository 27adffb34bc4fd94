"""The device mesh, with the axes `slice, data, fsdp, model`.

`slice` and `data` split the batch; `slice` runs across the network between slices of a TPU pod. `fsdp` splits the batch
and the parameters. `model` splits heads and channels (tensor parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dalle_jax.config import MeshConfig

MESH_AXES = ("slice", "data", "fsdp", "model")


class MeshError(ValueError):
    """A mesh that does not fit the devices or the sizes of the model."""


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of a configuration.

    TPU slices joined by the data center network are detected. The sizes of the other axes are within a slice, so
    parameters and heads are never split across that network and only gradients cross it. With `cfg.slices`, devices of
    one slice are taken as several slices, in order.

    Args:
      cfg: sizes of the axes; one of data, fsdp and model may be -1, for the devices that are left.
      devices: all devices by default.

    Raises:
      MeshError: the product of the sizes is not the number of devices, or `cfg.slices` is not the number of slices.
    """
    if cfg.cpu_devices:
        _set_num_cpu_devices(cfg.cpu_devices)
    devices = jax.devices() if devices is None else devices
    num_detected = len({getattr(d, "slice_index", 0) for d in devices})
    slices = num_detected if cfg.slices == -1 else cfg.slices
    if num_detected not in (1, slices) or len(devices) % slices:
        raise MeshError(
            f"Expected mesh.slices to match {len(devices)} devices in {num_detected} slices, got {cfg.slices}. "
            "Use -1 to detect the slices."
        )
    per_slice, sizes = len(devices) // slices, [cfg.data, cfg.fsdp, cfg.model]
    available = f"{per_slice} devices" + (f" in each of {slices} slices" if slices > 1 else "")
    requested = f"data={cfg.data} fsdp={cfg.fsdp} model={cfg.model}"
    product = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if per_slice % product:
            raise MeshError(
                f"Expected mesh sizes whose product divides {available}, got {requested}, whose product is {product}."
            )
        sizes[sizes.index(-1)] = per_slice // product
    if math.prod(sizes) != per_slice:
        raise MeshError(
            f"Expected mesh sizes whose product is {available}, got {requested}, whose product is {product}. "
            "Set one of them to -1 to use all devices."
        )
    if num_detected > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # jax.make_mesh refuses an axis that is part of a side of the torus, such as 128 of 16 x 16 chips.
        grid = mesh_utils.create_device_mesh((slices, *sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _set_num_cpu_devices(count: int) -> None:
    """Split the CPU into `count` devices unless devices are in use already."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if "initialized" not in str(error):
            raise
