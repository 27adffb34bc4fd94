"""Peak arithmetic of the accelerators that jax can report, for model FLOPs utilization (MFU)."""

from __future__ import annotations

# Prefix of jax's `device_kind` -> peak dense bf16 FLOP/s, from the data sheets of Google Cloud and NVIDIA. The first
# matching prefix counts, so a longer name stands before a shorter one.
_PEAK_BF16_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device.

    Args:
      device_kind: `jax.Device.device_kind`.

    Returns:
      Floating-point operations per second, or None for an unknown device.
    """
    for name, flops in _PEAK_BF16_FLOPS:
        if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-")):
            return flops
    return None
