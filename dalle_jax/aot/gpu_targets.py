"""NVIDIA GPUs that nobody has to hold: names to the devices that XLA's own GPU compiler compiles for.

A target is the name of a GPU (`h200`), or that and how many of one host (`h200:8`). Needs the CUDA plugin of jax, and
no GPU: the compiler reads what it must know of one from a text (XLA's GpuTargetConfigProto). What it cannot do without
one is try kernels out: products get the tiles that it takes by default, where a run with a GPU measures several and
picks, library calls among them.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """What is published about one GPU.

    kind: how jax calls it. flops: peak of dense bf16 products per second. memory: GiB that CUDA says it has, less
    than what it is sold by. bandwidth: bytes per second of its memory. link: bytes per second that it sends to others
    of its host. capability, cores, fpus (float32 units of a core), threads, shared and block (KiB of shared memory of
    a core and of one block), cache (MiB of L2), clock (GHz at most): what the compiler plans with.
    """

    kind: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared: int
    block: int
    cache: int
    clock: float


# Peaks, bandwidth, links, cores and clocks: NVIDIA's data sheets of H100, H200, A100 and L4 (SXM where there are
# several forms) and the white papers of Ampere, Ada and Hopper; the link is one direction, half of what data sheets
# count, of L4 PCIe 4.0 x16. Threads and shared memory: CUDA C++ Programming Guide, technical specifications per
# compute capability. Memory: what `cudaMemGetInfo` gives as the whole. Those of H100, H200 and A100 were compared with
# XLA's own descriptions of them; the rates, all of the L4 and the memory of H200 and L4 were written from memory and
# want a look at the source, or at the GPU.
_HOPPER = {"capability": (9, 0), "cores": 132, "fpus": 128, "threads": 2048, "shared": 228, "block": 227}
_AMPERE = {"capability": (8, 0), "cores": 108, "fpus": 64, "threads": 2048, "shared": 164, "block": 163}
_ADA = {"capability": (8, 9), "cores": 58, "fpus": 128, "threads": 1536, "shared": 100, "block": 99}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989e12, 79.1, 3.35e12, 450e9, cache=50, clock=1.98, **_HOPPER),
    "h200": Gpu("NVIDIA H200", 989e12, 139.8, 4.8e12, 450e9, cache=50, clock=1.98, **_HOPPER),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 39.4, 1.555e12, 300e9, cache=40, clock=1.41, **_AMPERE),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 79.2, 2.039e12, 300e9, cache=40, clock=1.41, **_AMPERE),
    "l4": Gpu("NVIDIA L4", 121e12, 22.0, 300e9, 32e9, cache=48, clock=2.04, **_ADA),
}
_MOST = 8  # of one host
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def is_gpu(name: str) -> bool:
    """Whether the target is one of ours; what is nearer to a GPU's name than to a topology is told by `suggest`."""
    return name.partition(":")[0] in GPUS


def suggest(name: str) -> str:
    """The GPUs that there are, the ones nearest to `name` first: a part of an error message."""
    kind = name.partition(":")[0].lower()
    near = [gpu for gpu in GPUS if kind and gpu.startswith(kind)]
    near = near or difflib.get_close_matches(kind, GPUS, n=1, cutoff=0.4)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{guess}GPUs are {', '.join(GPUS)}, several of one host h200:{_MOST}"


def parse_gpus(name: str) -> tuple[Gpu, int]:
    """The GPU and how many of it `h200` or `h200:8` are. Raises ValueError for what is neither."""
    kind, colon, count = name.partition(":")
    if kind not in GPUS:
        raise ValueError(f"target {name!r} is not a GPU; {suggest(name)}")
    if not colon:
        return GPUS[kind], 1
    if not count.isdecimal() or not 1 <= int(count) <= _MOST:
        raise ValueError(
            f"target {name!r} has {count!r} GPUs; want 1 to {_MOST} of one host, as in {kind}:{_MOST}"
        )
    return GPUS[kind], int(count)


def memory_fraction() -> float:
    """The part of a GPU's memory that jax takes: `XLA_PYTHON_CLIENT_MEM_FRACTION`, or three quarters.

    Raises ValueError where the variable is not a share.
    """
    told = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        share = float(told)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"XLA_PYTHON_CLIENT_MEM_FRACTION is {told!r}; want a share in (0, 1], as 0.95")
    return share


def gpu_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a target.

    Keeps jax on the CPU in this process, which must not train on a GPU after it. Raises ValueError for a target that
    does not exist, for several slices, and where jax found its devices before this, without a GPU;
    ModuleNotFoundError without the plugin.
    """
    gpu, count = parse_gpus(name)
    if slices != 1:
        raise ValueError(f"--slices {slices} is for a TPU topology; {name} is one host of GPUs")
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        raise ModuleNotFoundError(
            f"compiling for {name} needs XLA's GPU compiler: pip install 'dalle-jax[cuda]' (no GPU is needed)"
        )
    # The plugin wants a driver before it registers, unless jax is told that it will not run there.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x1x{count}",  # partitions, hosts, GPUs of each
            target_config=_description(gpu),
        )
    except NotImplementedError:
        raise ValueError(
            f"jax found its devices before {name} was asked for, and left the GPU compiler out; ask before the first "
            "array of the process, or start it with JAX_PLATFORMS=cpu"
        ) from None
    # Programs for a GPU that is not here can be stored, and not be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    return list(described.devices)


def _description(gpu: Gpu) -> str:
    """The GPU as the compiler reads it: a GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fpus}
          threads_per_core_limit: {gpu.threads}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.shared * 1024}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.block * 1024}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          device_memory_size: {int(gpu.memory * 2**30)}
          memory_bandwidth: {int(gpu.bandwidth)}
          l2_cache_size: {gpu.cache * 2**20}
          clock_rate_ghz: {gpu.clock}
        }}
        platform_name: "CUDA"
        runtime_version {{ major: 13 }}
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{gpu.kind}"
    """
