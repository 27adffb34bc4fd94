"""Inception-v3 of FID: the network of December 2015 (Szegedy et al. 2015, 1512.00567), whose 2048 pooled features
Heusel et al. 2017 (1706.08500) compare.

It is not the Inception-v3 of current model zoos: its mean pools do not count the padding, its last mixed block
pools by maximum, and images are resized without antialiasing. FIDs compare only where all of these agree. The weights
come from a file; one with the classifier of 1,008 classes gives Inception scores too. B batch, H W pixels, C channels,
R rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.files.archives import read_npz
from dalle_jax.importers.inception import CLASSES, CLASSIFIER, PREFIX, read_inception
from dalle_jax.typing import Params

NUM_FEATURES = 2048
INCEPTION_SIDE = 299
PREPROCESSING = "299 px, bilinear between pixel centres, no antialias, (x - 128) / 128"
_EPSILON = 1e-3  # of the batch norms
_PARTS = ("weight", "beta", "mean", "var")
_HINT = "Use the npz or pth file of the FID Inception-v3 of 2015."


class Inception(NamedTuple):
    """params: convolution name -> {"kernel": float32 (h, w, in, out), "bias": float32 (out,)}, the batch norm
    folded in. fingerprint: hex digits that change with any tensor of the features. classifier: float32 (2048, 1008),
    or None where the file holds none."""

    params: Params
    fingerprint: str
    classifier: np.ndarray | None = None


# --- the network as data ------------------------------------------------------------------------------------


class ConvLayer(NamedTuple):
    """A convolution without bias, batch norm, ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """A pool over 3 x 3 that keeps the side."""

    kind: str  # "mean" of the pixels inside the image, or "max"


class Downsample(NamedTuple):
    """A max pool over 3 x 3 with stride 2, without padding."""


class Branches(NamedTuple):
    """Several chains of steps on the same input, their channels joined in this order."""

    chains: tuple[tuple, ...]


def _block_35(name: str, pooled: int) -> Branches:
    return Branches((
        (ConvLayer(f"{name}.conv", 64),),
        (ConvLayer(f"{name}.tower.conv", 48), ConvLayer(f"{name}.tower.conv_1", 64, (5, 5))),
        (ConvLayer(f"{name}.tower_1.conv", 64), ConvLayer(f"{name}.tower_1.conv_1", 96, (3, 3)),
         ConvLayer(f"{name}.tower_1.conv_2", 96, (3, 3))),
        (Pool("mean"), ConvLayer(f"{name}.tower_2.conv", pooled)),
    ))  # fmt: skip


def _block_17(name: str, inner: int) -> Branches:
    return Branches((
        (ConvLayer(f"{name}.conv", 192),),
        (ConvLayer(f"{name}.tower.conv", inner), ConvLayer(f"{name}.tower.conv_1", inner, (1, 7)),
         ConvLayer(f"{name}.tower.conv_2", 192, (7, 1))),
        (ConvLayer(f"{name}.tower_1.conv", inner), ConvLayer(f"{name}.tower_1.conv_1", inner, (7, 1)),
         ConvLayer(f"{name}.tower_1.conv_2", inner, (1, 7)), ConvLayer(f"{name}.tower_1.conv_3", inner, (7, 1)),
         ConvLayer(f"{name}.tower_1.conv_4", 192, (1, 7))),
        (Pool("mean"), ConvLayer(f"{name}.tower_2.conv", 192)),
    ))  # fmt: skip


def _block_8(name: str, pool: str) -> Branches:
    def spread(tower: str) -> Branches:
        return Branches((
            (ConvLayer(f"{name}.{tower}_mixed_conv", 384, (1, 3)),),
            (ConvLayer(f"{name}.{tower}_mixed_conv_1", 384, (3, 1)),),
        ))  # fmt: skip

    return Branches((
        (ConvLayer(f"{name}.conv", 320),),
        (ConvLayer(f"{name}.tower_conv", 384), spread("tower")),
        (ConvLayer(f"{name}.tower_1_conv", 448), ConvLayer(f"{name}.tower_1_conv_1", 384, (3, 3)), spread("tower_1")),
        (Pool(pool), ConvLayer(f"{name}.tower_2_conv", 192)),
    ))  # fmt: skip


NETWORK: tuple = (  # 1512.00567, table 1 and figures 5 to 7, 10
    ConvLayer("conv", 32, (3, 3), 2, "VALID"),
    ConvLayer("conv_1", 32, (3, 3), 1, "VALID"),
    ConvLayer("conv_2", 64, (3, 3)),
    Downsample(),
    ConvLayer("conv_3", 80),
    ConvLayer("conv_4", 192, (3, 3), 1, "VALID"),
    Downsample(),
    _block_35("mixed", 32),
    _block_35("mixed_1", 64),
    _block_35("mixed_2", 64),
    Branches((
        (ConvLayer("mixed_3.conv", 384, (3, 3), 2, "VALID"),),
        (ConvLayer("mixed_3.tower.conv", 64), ConvLayer("mixed_3.tower.conv_1", 96, (3, 3)),
         ConvLayer("mixed_3.tower.conv_2", 96, (3, 3), 2, "VALID")),
        (Downsample(),),
    )),
    _block_17("mixed_4", 128),
    _block_17("mixed_5", 160),
    _block_17("mixed_6", 160),
    _block_17("mixed_7", 192),
    Branches((
        (ConvLayer("mixed_8.tower.conv", 192), ConvLayer("mixed_8.tower.conv_1", 320, (3, 3), 2, "VALID")),
        (ConvLayer("mixed_8.tower_1.conv", 192), ConvLayer("mixed_8.tower_1.conv_1", 192, (1, 7)),
         ConvLayer("mixed_8.tower_1.conv_2", 192, (7, 1)),
         ConvLayer("mixed_8.tower_1.conv_3", 192, (3, 3), 2, "VALID")),
        (Downsample(),),
    )),
    _block_8("mixed_9", "mean"),
    _block_8("mixed_10", "max"),
)  # fmt: skip


def _walk(
    steps: tuple, x_BHWC: jax.Array, convolve: Callable[[ConvLayer, jax.Array], jax.Array]
) -> jax.Array:
    for step in steps:
        match step:
            case ConvLayer():
                x_BHWC = convolve(step, x_BHWC)
            case Pool(kind="mean"):
                x_BHWC = mean_pool(x_BHWC)
            case Pool(kind="max"):
                x_BHWC = _max_pool(x_BHWC, 1, "SAME")
            case Downsample():
                x_BHWC = _max_pool(x_BHWC, 2, "VALID")
            case Branches(chains=chains):
                x_BHWC = jnp.concatenate([_walk(chain, x_BHWC, convolve) for chain in chains], axis=-1)
            case _:
                raise AssertionError(step)
    return x_BHWC


# --- from images to features --------------------------------------------------------------------------------


def _max_pool(x_BHWC: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.reduce_window(x_BHWC, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def mean_pool(x_BHWC: jax.Array) -> jax.Array:
    """Mean over 3 x 3 around each pixel, of the pixels inside the image. Keeps shape and dtype."""

    def total(values):
        return lax.reduce_window(values, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x_BHWC) / total(jnp.ones((1, *x_BHWC.shape[1:3], 1), x_BHWC.dtype))


def resize_for_inception(x_BHWC: jax.Array) -> jax.Array:
    """Bilinear between pixel centres to 299 x 299; a larger image is not smoothed first. Keeps the dtype."""
    shape = (x_BHWC.shape[0], INCEPTION_SIDE, INCEPTION_SIDE, x_BHWC.shape[3])
    return jax.image.resize(x_BHWC, shape, "bilinear", antialias=False, precision=lax.Precision.HIGHEST)


def apply_inception(params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Compute the pooled features of images, float32 (B, 2048), in float32.

    images_BHWC: RGB in [0, 255], of any side and any real dtype.
    """

    def convolve(step: ConvLayer, x_BHWC: jax.Array) -> jax.Array:
        layer = params[step.name]
        out = lax.conv_general_dilated(
            x_BHWC,
            layer["kernel"],
            (step.stride, step.stride),
            step.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,  # else a GPU or TPU rounds the factors to a dozen bits
        )
        return jax.nn.relu(out + layer["bias"][None, None, None])

    x_BHWC = (resize_for_inception(images_BHWC.astype(jnp.float32)) - 128.0) / 128.0
    return _walk(NETWORK, x_BHWC, convolve).mean(axis=(1, 2))


_apply = jax.jit(apply_inception)


def inception_features(inception: Inception, images: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """Compute the features of images, `batch` at a time: uint8 (R, H, W, 3) to float32 (R, 2048).

    Raises:
        ValueError: another shape or dtype, or no images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(
            f"Expected images uint8 (rows, height, width, 3), got {images.dtype} {images.shape}."
        )
    found = []
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        fill = min(batch, len(images)) - len(rows)  # one shape, so that it compiles once
        padded = np.concatenate([rows, np.zeros((fill, *rows.shape[1:]), np.uint8)])
        found.append(np.asarray(_apply(inception.params, jnp.asarray(padded)))[: len(rows)])
    return np.concatenate(found)


def inception_logits(inception: Inception, features: np.ndarray) -> np.ndarray:
    """Compute the logits of the classes, without bias: float32 (R, 2048) to float32 (R, 1008).

    Raises:
        ValueError: the weights have no classifier.
    """
    if inception.classifier is None:
        raise ValueError(
            f"Expected Inception weights with the classifier of {CLASSES:,} classes, got none. {_HINT}"
        )
    return features @ inception.classifier


# --- weights ----------------------------------------------------------------------------------------------------


@functools.cache
def inception_param_shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a weight file; kernels are (out, in, h, w)."""
    found: dict[str, tuple[int, ...]] = {}

    def convolve(step: ConvLayer, x_BHWC: jax.Array) -> jax.Array:
        kernel = (*step.kernel, x_BHWC.shape[-1], step.width)
        found[f"{PREFIX}{step.name}.weight"] = (step.width, x_BHWC.shape[-1], *step.kernel)
        found.update({f"{PREFIX}{step.name}.{part}": (step.width,) for part in _PARTS[1:]})
        return lax.conv_general_dilated(
            x_BHWC, jnp.zeros(kernel), (step.stride, step.stride), step.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    jax.eval_shape(
        lambda x: _walk(NETWORK, x, convolve),
        jax.ShapeDtypeStruct((1, INCEPTION_SIDE, INCEPTION_SIDE, 3), jnp.float32),
    )
    return found


def load_inception(path: str | Path) -> Inception:
    """Load the network from an npz file with the names of `inception_param_shapes`, of any float dtype, or from the
    torch file that pytorch-fid and torch-fidelity download, read without torch.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a tensor, which the message names, is missing, unknown, of another shape or dtype, or has values
            that no trained network has.
    """
    path = Path(path)
    torch = path.suffix in (".pth", ".pt") and path.is_file()
    return fold_batch_norm(read_inception(path) if torch else read_npz(path, _HINT), str(path))


def fold_batch_norm(tensors: dict[str, np.ndarray], source: str = "these weights") -> Inception:
    """Fold the batch norm of each convolution of named tensors into kernel and bias.

    source: what error messages call the tensors. Raises ValueError as `load_inception` does.
    """
    expected = inception_param_shapes()
    classifier = tensors.get(CLASSIFIER)
    tensors = {name: tensor for name, tensor in tensors.items() if name != CLASSIFIER}
    for names, what in (
        (expected.keys() - tensors.keys(), "without"),
        (tensors.keys() - expected.keys(), "with"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"Expected the tensors of the FID Inception-v3, got {source} {what} {listed}{more}. {_HINT}"
            )
    digest = hashlib.sha256()
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or not np.issubdtype(tensor.dtype, np.floating):
            raise ValueError(
                f"{source}: Expected {name} of floats {shape}, got {tensor.dtype} {tensor.shape}. {_HINT}"
            )
        if not np.isfinite(tensor).all() or (name.endswith(".var") and tensor.min() < 0):
            raise ValueError(
                f"{source}: Expected finite values in {name}, variances of at least 0, got others. {_HINT}"
            )
        digest.update(f"{name} {tensor.dtype} {shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    params = {}
    for name in (n.removesuffix(".weight") for n in expected if n.endswith(".weight")):
        kernel = tensors[f"{name}.weight"].astype(np.float32)
        beta, mean, var = (tensors[f"{name}.{part}"].astype(np.float64) for part in _PARTS[1:])
        scale = 1 / np.sqrt(var + _EPSILON)
        params[name.removeprefix(PREFIX)] = {
            "kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0) * scale.astype(np.float32)),
            "bias": jnp.asarray(beta - mean * scale, jnp.float32),
        }
    if classifier is not None:
        if classifier.shape != (CLASSES, NUM_FEATURES) or not np.isfinite(classifier).all():
            raise ValueError(
                f"{source}: Expected {CLASSIFIER} of finite floats {CLASSES, NUM_FEATURES}, got {classifier.dtype} "
                f"{classifier.shape}. {_HINT}"
            )
        classifier = np.ascontiguousarray(classifier.T, np.float32)
    return Inception(params, digest.hexdigest(), classifier)
