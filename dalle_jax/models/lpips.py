"""LPIPS, a perceptual distance of images (Zhang et al. 2018, 1801.03924).

It compares normalized activations of a classification network (AlexNet or VGG16), weighted by linear heads that were
fitted to human judgment; its weights come from a file. B batch, H W image, C channels.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.files.archives import read_npz
from dalle_jax.typing import Params

# Convolutions: (kernel size, inputs, outputs, stride, padding, max-pool before, compare afterwards)
_ALEXNET = (
    (11, 3, 64, 4, 2, False, True),
    (5, 64, 192, 1, 2, True, True),
    (3, 192, 384, 1, 1, True, True),
    (3, 384, 256, 1, 1, False, True),
    (3, 256, 256, 1, 1, False, True),
)
_VGG16 = (
    (3, 3, 64, 1, 1, False, False),
    (3, 64, 64, 1, 1, False, True),
    (3, 64, 128, 1, 1, True, False),
    (3, 128, 128, 1, 1, False, True),
    (3, 128, 256, 1, 1, True, False),
    (3, 256, 256, 1, 1, False, False),
    (3, 256, 256, 1, 1, False, True),
    (3, 256, 512, 1, 1, True, False),
    (3, 512, 512, 1, 1, False, False),
    (3, 512, 512, 1, 1, False, True),
    (3, 512, 512, 1, 1, True, False),
    (3, 512, 512, 1, 1, False, False),
    (3, 512, 512, 1, 1, False, True),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1]


def load_lpips(path: str | Path) -> Params:
    """Load the weights of LPIPS from an npz file.

    Args:
      path: a file with `AlexNet_0.Conv_i.{kernel,bias}` or `VGG16_0.Conv_i...`, and `NetLinLayer_i.Conv_0.kernel`.

    Returns:
      `conv_0`, ... with kernel (HWIO) and bias, and `head_0`, ... with kernel (C,).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an array is missing, unknown, not finite or of another shape; it names the array.
    """
    arrays = read_npz(path, "Set model.lpips to the weights of LPIPS.")
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    net, layers = ("VGG16_0", _VGG16) if "VGG16_0.Conv_0.kernel" in arrays else ("AlexNet_0", _ALEXNET)
    expected: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    heads = [layer[2] for layer in layers if layer[6]]
    for i, (size, inputs, outputs, *_) in enumerate(layers):
        expected[f"{net}.Conv_{i}.kernel"] = (f"conv_{i}", "kernel", (size, size, inputs, outputs))
        expected[f"{net}.Conv_{i}.bias"] = (f"conv_{i}", "bias", (outputs,))
    for i, width in enumerate(heads):
        expected[f"NetLinLayer_{i}.Conv_0.kernel"] = (f"head_{i}", "kernel", (1, 1, width, 1))
    differing = sorted(set(expected) ^ set(arrays))
    if differing:
        name = differing[0]
        problem = "without" if name in expected else "with"
        raise ValueError(f"Expected the arrays of LPIPS, got {path} {problem} array {name}.")
    params: Params = {}
    for name, (part, leaf, shape) in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: Expected array {name} of shape {shape}, got {arrays[name].shape}.")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: Expected finite values in array {name}, got others.")
        value = arrays[name].reshape(-1) if part.startswith("head") else arrays[name]
        params.setdefault(part, {})[leaf] = value
    return params


def lpips(params: Params, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Compute the LPIPS distance of each pair of images in [-1, 1], float32 (B,). params: from `load_lpips`."""
    layers = _VGG16 if "conv_12" in params else _ALEXNET
    shift, scale = (jnp.asarray(v).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE))
    pair = (jnp.concatenate([x_BHWC, y_BHWC]) - shift) / scale
    total, head = jnp.zeros(len(x_BHWC)), 0
    for i, (_, _, _, stride, padding, pool, compared) in enumerate(layers):
        if pool:
            size = 2 if layers is _VGG16 else 3
            window = (1, size, size, 1)
            pair = jax.lax.reduce_window(pair, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        pair = jax.lax.conv_general_dilated(
            pair, params[f"conv_{i}"]["kernel"], (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        pair = jax.nn.relu(pair + params[f"conv_{i}"]["bias"][None, None, None])
        if compared:
            norm = jnp.sqrt(jnp.sum(jnp.square(pair), axis=-1, keepdims=True) + 1e-20)
            x, y = jnp.split(pair / (norm + 1e-10), 2)
            weighted = jnp.square(x - y) * params[f"head_{head}"]["kernel"][None, None, None]
            total += jnp.mean(jnp.sum(weighted, axis=-1), axis=(1, 2))
            head += 1
    return total
