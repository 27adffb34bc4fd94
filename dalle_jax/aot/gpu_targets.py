"""NVIDIA GPUs to compile for without having one: names, specifications and compile-only devices.

A target is the name of a GPU (`h200`), or the name and the number of GPUs of one host (`h200:8`). Compilation needs the
CUDA plugin of jax and no GPU: XLA's compiler reads the specifications from a text (GpuTargetConfigProto). Without a GPU
it cannot autotune: matrix products get the default tiling, where a run on a GPU measures several kernels, library calls
among them, and selects the fastest.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """Specifications of a GPU.

    Attributes:
      device_kind: `jax.Device.device_kind`.
      peak_flops: Dense bf16 FLOP/s.
      memory_gib: Memory that CUDA reports, in GiB, less than the advertised size.
      memory_bandwidth: Bytes per second.
      link_bandwidth: Bytes per second that it sends to other GPUs of its host.
      compute_capability: Major and minor version.
      num_sms: Streaming multiprocessors (SMs).
      fp32_units_per_sm: Float32 units of an SM.
      max_threads_per_sm: Resident threads of an SM.
      shared_memory_per_sm: KiB.
      shared_memory_per_block: KiB, the largest size that a block can request.
      l2_cache: MiB.
      clock_ghz: Maximum clock.
    """

    device_kind: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    compute_capability: tuple[int, int]
    num_sms: int
    fp32_units_per_sm: int
    max_threads_per_sm: int
    shared_memory_per_sm: int
    shared_memory_per_block: int
    l2_cache: int
    clock_ghz: float


# Sources. Peaks, bandwidths, links, SMs and clocks: NVIDIA's data sheets of H100, H200, A100 and L4 (the SXM form where
# there are several) and the white papers of Ampere, Ada and Hopper. A link is one direction, half of what data sheets
# count; that of L4 is PCIe 4.0 x16. Threads and shared memory: CUDA C++ Programming Guide, technical specifications per
# compute capability. Memory: the total of `cudaMemGetInfo`. H100, H200 and A100 were compared with XLA's own
# descriptions. Not yet checked against a source: the rates, all values of the L4, and the memory of H200 and L4.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989e12, 79.1, 3.35e12, 450e9, (9, 0), 132, 128, 2048, 228, 227, 50, 1.98),
    "h200": Gpu("NVIDIA H200", 989e12, 139.8, 4.8e12, 450e9, (9, 0), 132, 128, 2048, 228, 227, 50, 1.98),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 39.4, 1.555e12, 300e9, (8, 0), 108, 64, 2048, 164, 163, 40, 1.41),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 79.2, 2.039e12, 300e9, (8, 0), 108, 64, 2048, 164, 163, 40, 1.41),
    "l4": Gpu("NVIDIA L4", 121e12, 22.0, 300e9, 32e9, (8, 9), 58, 128, 1536, 100, 99, 48, 2.04),
}  # fmt: skip
_MAX_GPUS = 8  # of one host
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def is_gpu(name: str) -> bool:
    """Return whether a target is a GPU of `GPUS`."""
    return name.partition(":")[0] in GPUS


def suggest_gpus(name: str) -> str:
    """Return the names of GPUs, those similar to `name` first, as a part of an error message."""
    prefix = name.partition(":")[0].lower()
    similar = [gpu for gpu in GPUS if prefix and gpu.startswith(prefix)]
    similar = similar or difflib.get_close_matches(prefix, GPUS, n=1, cutoff=0.4)
    guess = f"Did you mean {' or '.join(similar)}? " if similar else ""
    return f"{guess}GPUs are {', '.join(GPUS)}, several of one host h200:{_MAX_GPUS}."


def parse_gpus(name: str) -> tuple[Gpu, int]:
    """Parse a target such as `h200` or `h200:8`.

    Returns:
      The GPU and their number.

    Raises:
      ValueError: If there is no such GPU or no host with as many.
    """
    gpu, colon, count = name.partition(":")
    if gpu not in GPUS:
        raise ValueError(f"Expected a GPU, got {name!r}. {suggest_gpus(name)}")
    if not colon:
        return GPUS[gpu], 1
    if not count.isdecimal() or not 1 <= int(count) <= _MAX_GPUS:
        raise ValueError(
            f"Expected 1 to {_MAX_GPUS} GPUs of one host, got {name!r}. Use e.g. {gpu}:{_MAX_GPUS}."
        )
    return GPUS[gpu], int(count)


def gpu_memory_fraction() -> float:
    """Return the fraction of GPU memory that jax allocates: `XLA_PYTHON_CLIENT_MEM_FRACTION`, or 0.75.

    Raises:
      ValueError: If the environment variable is not in (0, 1].
    """
    value = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        fraction = float(value)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected XLA_PYTHON_CLIENT_MEM_FRACTION in (0, 1], got {value!r}. Use e.g. 0.95.")
    return fraction


def gpu_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Return the compile-only devices of a target.

    The call restricts jax to the CPU for the rest of the process, so the process cannot use a GPU afterwards.

    Args:
      name: `h200` or `h200:8`.
      num_slices: Must be 1.

    Raises:
      ValueError: If there is no such target, for several slices, or if jax has already initialized its backends without
        the GPU compiler.
      ModuleNotFoundError: If the CUDA plugin is not installed.
    """
    gpu, count = parse_gpus(name)
    if num_slices != 1:
        raise ValueError(
            f"Expected a TPU topology with --slices {num_slices}, got {name}, one host of GPUs. Remove --slices."
        )
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        raise ModuleNotFoundError(
            f"Expected XLA's GPU compiler to compile for {name}, got none. Use pip install 'dalle-jax[cuda]' (no GPU "
            "is needed)."
        )
    # By default the plugin registers only where it finds a driver.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x1x{count}",  # partitions, hosts, GPUs of each
            target_config=_target_config(gpu),
        )
    except NotImplementedError:
        raise ValueError(
            f"Expected the target {name} before jax initializes its backends, got it after. Request the target before "
            "the first array of the process, or start it with JAX_PLATFORMS=cpu."
        ) from None
    # A program for a GPU that is absent can be stored in the cache but not be loaded from it.
    jax.config.update("jax_enable_compilation_cache", False)
    return list(topology.devices)


def _target_config(gpu: Gpu) -> str:
    """Return the GPU as a GpuTargetConfigProto in text format."""
    major, minor = gpu.compute_capability
    accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
          core_count: {gpu.num_sms}
          fpus_per_core: {gpu.fp32_units_per_sm}
          threads_per_core_limit: {gpu.max_threads_per_sm}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.shared_memory_per_sm * 1024}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.shared_memory_per_block * 1024}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          device_memory_size: {int(gpu.memory_gib * 2**30)}
          memory_bandwidth: {int(gpu.memory_bandwidth)}
          l2_cache_size: {gpu.l2_cache * 2**20}
          clock_rate_ghz: {gpu.clock_ghz}
        }}
        platform_name: "CUDA"
        runtime_version {{ major: 13 }}
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{gpu.device_kind}"
    """
