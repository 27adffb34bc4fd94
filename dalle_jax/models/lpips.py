"""How different two pictures look: LPIPS (Zhang et al. 2018, 1801.03924), or without its weights a Laplacian pyramid.

LPIPS compares normalised activations of a network that was trained to classify (AlexNet or VGG16), weighed by linear
heads that were fitted to human judgement; its weights come from a file. The pyramid needs none: the mean absolute
difference of band-passed pictures, each band weighed alike, so that edges and texture count beside flat colour
(Bojanowski et al. 2017, 1707.05776, use it for the same purpose). B batch, H W image, C channels.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.files.archives import read_npz
from dalle_jax.typing import Params

# Convolutions: (kernel side, inputs, outputs, stride, padding, pool before, compared afterwards)
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
    """Weights of LPIPS from an npz file: `conv_0`, ... with kernel (HWIO) and bias, `head_0`, ... with kernel (C,).

    The file holds `AlexNet_0.Conv_i.{kernel,bias}` or `VGG16_0.Conv_i...`, and `NetLinLayer_i.Conv_0.kernel`.
    Raises FileNotFoundError, or ValueError that names the array that is missing, unknown, of another shape or not
    finite.
    """
    found = read_npz(path, "want the weights of LPIPS")
    arrays = {name: np.asarray(array, np.float32) for name, array in found.items()}
    net, layers = ("VGG16_0", _VGG16) if "VGG16_0.Conv_0.kernel" in arrays else ("AlexNet_0", _ALEXNET)
    want: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    heads = [layer[2] for layer in layers if layer[6]]
    for i, (size, inputs, outputs, *_) in enumerate(layers):
        want[f"{net}.Conv_{i}.kernel"] = (f"conv_{i}", "kernel", (size, size, inputs, outputs))
        want[f"{net}.Conv_{i}.bias"] = (f"conv_{i}", "bias", (outputs,))
    for i, width in enumerate(heads):
        want[f"NetLinLayer_{i}.Conv_0.kernel"] = (f"head_{i}", "kernel", (1, 1, width, 1))
    differing = sorted(set(want) ^ set(arrays))
    if differing:
        name = differing[0]
        raise ValueError(f"{path}: array {name} is {'missing' if name in want else 'not one of LPIPS'}")
    params: Params = {}
    for name, (part, leaf, shape) in want.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: array {name} has shape {arrays[name].shape}, want {shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: array {name} has values that are not finite")
        value = arrays[name].reshape(-1) if part.startswith("head") else arrays[name]
        params.setdefault(part, {})[leaf] = value
    return params


def lpips(params: Params, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """LPIPS distance of each pair of pictures in [-1, 1], float32 (B,). params: of `load_lpips`."""
    layers = _VGG16 if "conv_12" in params else _ALEXNET
    shift, scale = (jnp.asarray(v).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE))
    both = (jnp.concatenate([x_BHWC, y_BHWC]) - shift) / scale
    total, head = jnp.zeros(len(x_BHWC)), 0
    for i, (_, _, _, stride, padding, pool, compared) in enumerate(layers):
        if pool:
            side = 2 if layers is _VGG16 else 3
            window = (1, side, side, 1)
            both = jax.lax.reduce_window(both, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        both = jax.lax.conv_general_dilated(
            both, params[f"conv_{i}"]["kernel"], (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        both = jax.nn.relu(both + params[f"conv_{i}"]["bias"][None, None, None])
        if compared:
            length = jnp.sqrt(jnp.sum(jnp.square(both), axis=-1, keepdims=True) + 1e-20)
            x, y = jnp.split(both / (length + 1e-10), 2)
            weighed = jnp.square(x - y) * params[f"head_{head}"]["kernel"][None, None, None]
            total += jnp.mean(jnp.sum(weighed, axis=-1), axis=(1, 2))
            head += 1
    return total


def laplacian_pyramid_loss(x_BHWC: jax.Array, y_BHWC: jax.Array, bands: int = 3) -> jax.Array:
    """Mean absolute difference of each pair, averaged over the bands of a Laplacian pyramid, float32 (B,).

    A band is what 2x2 averaging takes away; the last one is what is left after it. Fewer bands where a side is odd.
    """
    rest, found = x_BHWC - y_BHWC, []
    for _ in range(bands):
        b, h, w, c = rest.shape
        if h % 2 or w % 2:
            break
        low = rest.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        found.append(rest - jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2))
        rest = low
    found.append(rest)
    return jnp.mean(jnp.stack([jnp.mean(jnp.abs(band), axis=(1, 2, 3)) for band in found]), axis=0)
