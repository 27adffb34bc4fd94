"""Compilation targets: devices to compile for, absent or attached."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from dalle_jax.aot.gpu_targets import GPUS, Gpu, gpu_devices, gpu_memory_fraction, is_gpu, parse_gpus
from dalle_jax.aot.tpu_targets import TPU_CHIPS, TpuChip, parse_topology, tpu_devices

GIB = 2**30


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: For example "v5p:4x4x4", "h200:8" or "local".
      num_slices: TPU slices.
      devices: One entry per device.
      hbm_gib: Memory of a device that a program may use, GiB; None if unknown.
      hbm_fraction: The fraction of the memory that `hbm_gib` is; None if jax allocates all of it.
      tpu: Specifications of a TPU chip that is absent, else None.
      gpu: Specifications of a GPU, absent or attached, else None.
    """

    name: str
    num_slices: int
    devices: list[jax.Device]
    hbm_gib: float | None = None
    hbm_fraction: float | None = None
    tpu: TpuChip | None = None
    gpu: Gpu | None = None


def make_target(name: str, num_slices: int = 1) -> Target:
    """Return a target by its name.

    Args:
      name: A TPU topology, GPUs of one host, or "local" for the attached devices.
      num_slices: TPU slices of this topology.

    Returns:
      The target. Its memory is that of the data sheet, of a GPU the fraction that jax allocates, of attached devices
      what the device reports, and None for a CPU.

    Raises:
      ValueError: If there is no such target.
      ModuleNotFoundError: If its compiler is not installed.
    """
    if is_gpu(name):
        gpu, fraction = parse_gpus(name)[0], gpu_memory_fraction()
        devices = gpu_devices(name, num_slices)
        return Target(name, num_slices, devices, gpu.memory_gib * fraction, fraction, gpu=gpu)
    if name != "local":
        devices, tpu = tpu_devices(name, num_slices), TPU_CHIPS[parse_topology(name)[0]]
        return Target(name, num_slices, devices, tpu.hbm_gib, tpu=tpu)
    if num_slices != 1:
        raise ValueError(
            f"Expected a TPU topology with --slices {num_slices}, got the local devices. Remove --slices."
        )
    devices = jax.devices()
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    hbm_gib = stats["bytes_limit"] / GIB if stats and "bytes_limit" in stats else None
    gpu = next((gpu for gpu in GPUS.values() if gpu.device_kind == devices[0].device_kind), None)
    return Target(name, num_slices, devices, hbm_gib, gpu=gpu)


def single_device_target(name: str, flag: str, num_slices: int = 1) -> Target:
    """Return a target of one device; of the local devices the first.

    Args:
      name: A target, as in `make_target`.
      flag: Command line flag that needs a single device, for messages.
      num_slices: TPU slices of this topology.

    Raises:
      ValueError: If there is no such target, or it has more than one device.
      ModuleNotFoundError: If its compiler is not installed.
    """
    if is_gpu(name):
        count, singles = parse_gpus(name)[1], name.partition(":")[0]
    else:
        count = 1 if name == "local" else num_slices * math.prod(parse_topology(name)[1])
        singles = "v5e:1x1, v6e:1x1, v4:1x1x1 or v5p:1x1x1"
    if count != 1:
        raise ValueError(
            f"Expected a target of one device with {flag}, got {count} of {name}. Use {singles}."
        )
    target = make_target(name, num_slices)
    return target._replace(devices=target.devices[:1])
