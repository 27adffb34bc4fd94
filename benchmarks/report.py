"""Helpers of several benchmarks: jobs in processes of their own, the description of the machine, ratios of rates.

python -m benchmarks.report prints the machine, and the versions of packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
CPU_FLAGS = ("avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "diffusers")
ROOT = Path(__file__).resolve().parent.parent


def run_job(python: str, module: str, job: dict[str, Any]) -> dict[str, Any] | str:
    """Run a job in a process of its own and return its result, or the last line of its error message."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [python, "-m", module, "--job", json.dumps(job)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"no message, exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe_cpu(cpuinfo: str, cores: int) -> str:
    """Return the model of a CPU and which of CPU_FLAGS it has, from the text of /proc/cpuinfo."""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    has, lacks = ([flag for flag in CPU_FLAGS if (flag in flags) == known] for known in (True, False))
    text = f"{fields.get('model name', 'unknown CPU')} with {' '.join(has) or 'no AVX-512'}"
    text += f", without {' '.join(lacks)}" if has and lacks else ""
    return f"{text}; {cores} cores"


def describe_machine(device: str = "cpu", devices: int = 1) -> str:
    """Return this machine's accelerators, if it has any, and its CPU with the number of cores that may be used.

    Args:
      device: `jax.Device.device_kind` of the devices in use.
    """
    cpuinfo = Path("/proc/cpuinfo")
    cpu = describe_cpu(cpuinfo.read_text() if cpuinfo.exists() else "", len(os.sched_getaffinity(0)))
    return cpu if device == "cpu" else f"{devices} x {device}; {cpu}"


def speed_ratios(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """Return our rate over the peer's for each dtype that both have, and for the best dtype of each side as `best`.

    Args:
      ours: Dtype -> rate.
      peer: Dtype -> rate.
    """
    ratios = {dtype: rate / peer[dtype] for dtype, rate in ours.items() if dtype in peer}
    return {**ratios, "best": max(ours.values()) / max(peer.values())} if ratios else {}


def format_ratios(ours: dict[str, float], peer: dict[str, float]) -> str:
    """Return the ratios of two sides that have a dtype in common, as text with the best dtype of each."""
    ratios = speed_ratios(ours, peer)
    best = ratios.pop("best")
    of_dtypes = ", ".join(f"{ratio:.2f} in {dtype}" for dtype, ratio in ratios.items())
    return f"{of_dtypes}; {best:.2f} at best ({max(ours, key=ours.get)} over {max(peer, key=peer.get)})"


def version_of(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    import jax

    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    print(describe_machine(jax.devices()[0].device_kind, jax.device_count()))
    print(
        f"Python {platform.python_version()}, {', '.join(f'{name} {version_of(name)}' for name in PACKAGES)}"
    )


if __name__ == "__main__":
    main()
