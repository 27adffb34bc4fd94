"""Does a picture show the class that its caption names? Judged by a classifier of CIFAR-10 from a file.

The network is the residual network for CIFAR of He et al. 2015 (1512.03385, 4.2): 6 n + 2 layers in three stages of
16, 32 and 64 channels, identity shortcuts that halve the picture and fill up with zero channels (option A). n and
the number of classes follow from the weights. B batch, R rows, H W picture, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.config import DataConfig
from dalle_jax.data.images import decode_image, encode_png, to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.evaluate import metrics
from dalle_jax.files.archives import read_npz
from dalle_jax.pipelines import ImageTokenizer, ProgressFn, SamplingConfig, decode_codes, encode_images
from dalle_jax.pipelines.diffusion import DiffusionSamplingConfig
from dalle_jax.typing import Params

CIFAR_SIDE = 32
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels, of values in [0, 1]
_EPSILON = 1e-5  # of the batch norms
_STAGES = 3
_WANT = "want the npz file of a residual network for CIFAR-10 (docs/evaluation.md)"


class Classifier(NamedTuple):
    """params: convolution name -> {"kernel": float32 (3, 3, in, out), "bias": float32 (out,)}, the batch norm folded
    in, and "linear" -> {"kernel": (C, K), "bias": (K,)}. blocks: n, residual blocks in each stage."""

    params: Params
    blocks: int

    @property
    def classes(self) -> int:
        return self.params["linear"]["bias"].size


def apply_resnet(params: Params, blocks: int, images_BHWC: jax.Array) -> jax.Array:
    """Logits of pictures of 32 x 32, float32 in [0, 1], RGB: float32 (B, K)."""

    def convolve(name: str, x_BHWC: jax.Array, stride: int = 1) -> jax.Array:
        out = lax.conv_general_dilated(
            x_BHWC,
            params[name]["kernel"],
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return out + params[name]["bias"][None, None, None]

    x_BHWC = (images_BHWC - jnp.array([[[_MEAN]]])) / jnp.array([[[_DEVIATION]]])
    x_BHWC = jax.nn.relu(convolve("conv1", x_BHWC))
    for stage in range(1, _STAGES + 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}."
            inner_BHWC = jax.nn.relu(convolve(f"{name}conv1", x_BHWC, stride))
            inner_BHWC = convolve(f"{name}conv2", inner_BHWC)
            short_BHWC = x_BHWC[:, ::stride, ::stride]
            more = inner_BHWC.shape[-1] - short_BHWC.shape[-1]
            short_BHWC = jnp.pad(short_BHWC, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
            x_BHWC = jax.nn.relu(inner_BHWC + short_BHWC)
    return x_BHWC.mean(axis=(1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"][None]


_apply = jax.jit(apply_resnet, static_argnums=1)


def class_logits(classifier: Classifier, images: np.ndarray, *, batch: int = 256) -> np.ndarray:
    """Of pictures, uint8 (R, H, W, 3), `batch` at a time: float32 (R, K). Those of another side than 32 are resized.

    Raises ValueError for another shape or dtype, or no pictures.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"pictures are {images.dtype} {images.shape}; want uint8 (rows, height, width, 3)")
    if images.shape[1:3] != (CIFAR_SIDE, CIFAR_SIDE):
        images = np.stack([decode_image(encode_png(image), CIFAR_SIDE, crop="none") for image in images])
    found = []
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        fill = min(batch, len(images)) - len(rows)  # one shape, so that it compiles once
        padded = np.concatenate([rows, np.zeros((fill, CIFAR_SIDE, CIFAR_SIDE, 3), np.uint8)])
        out = _apply(classifier.params, classifier.blocks, jnp.asarray(to_float(padded)))
        found.append(np.asarray(out)[: len(rows)])
    return np.concatenate(found)


# --- weights ----------------------------------------------------------------------------------------------------


def resnet_shapes(blocks: int, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a weight file; kernels are (out, in, h, w). width: channels of stage 1."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, wide: int, out: int) -> None:
        found[f"{name}.weight"] = (out, wide, 3, 3)
        norm = _norm_of(name)
        found.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})

    convolution("conv1", 3, width)
    wide = width
    for stage in range(1, _STAGES + 1):
        out = width * 2 ** (stage - 1)
        for block in range(blocks):
            convolution(f"layer{stage}.{block}.conv1", wide, out)
            convolution(f"layer{stage}.{block}.conv2", out, out)
            wide = out
    return {**found, "linear.weight": (classes, wide), "linear.bias": (classes,)}


def load_classifier(path: str | Path) -> Classifier:
    """The network with the weights of an npz file; `shapes` says its names, any float dtype will do.

    Raises FileNotFoundError, or ValueError naming the tensor for one that is missing, unknown, of another shape or
    dtype, or holds what no trained network holds.
    """
    return fold_resnet_batch_norm(read_npz(path, _WANT), str(path))


def fold_resnet_batch_norm(tensors: dict[str, np.ndarray], told: str = "these weights") -> Classifier:
    """The network of named tensors, each batch norm folded into its convolution. told: what the messages call them.
    Raises ValueError as `load` does."""
    first, last = tensors.get("conv1.weight"), tensors.get("linear.bias")
    if first is None or last is None or first.ndim != 4 or last.ndim != 1 or not last.size:
        raise ValueError(f"{told} hold no conv1.weight (out, 3, 3, 3) and linear.bias (classes,); {_WANT}")
    blocks = 0
    while f"layer1.{blocks}.conv1.weight" in tensors:
        blocks += 1
    wanted = resnet_shapes(blocks, first.shape[0], last.size)
    for names, what in (
        (wanted.keys() - tensors.keys(), "lack"),
        (tensors.keys() - wanted.keys(), "hold unknown"),
    ):
        if names or not blocks:
            listed = ", ".join(sorted(names)[:3]) or "layer1.0.conv1.weight"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{told} {what} {listed}{more}; {_WANT}")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.shape != shape or not np.issubdtype(tensor.dtype, np.floating):
            raise ValueError(f"{told}: {name} is {tensor.dtype} {tensor.shape}; want floats {shape}")
        if not np.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
            raise ValueError(f"{told}: {name} has values that are not finite, or a negative variance")
    params = {
        "linear": {
            "kernel": jnp.asarray(tensors["linear.weight"].T, jnp.float32),
            "bias": jnp.asarray(tensors["linear.bias"], jnp.float32),
        }
    }
    for name in (n.removesuffix(".weight") for n, shape in wanted.items() if len(shape) == 4):
        weight, bias, mean, var = (
            tensors[f"{_norm_of(name)}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(var + _EPSILON)
        kernel = tensors[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0)
        params[name] = {
            "kernel": jnp.asarray(kernel * scale, jnp.float32),
            "bias": jnp.asarray(bias - mean * scale, jnp.float32),
        }
    return Classifier(params, blocks)


def _norm_of(name: str) -> str:
    """The batch norm that follows a convolution: bn1 after conv1."""
    return name[: name.rindex("conv")] + "bn" + name[-1]


# --- measures ---------------------------------------------------------------------------------------------------


def check_classes(classifier: Classifier, data: DataConfig, path: str) -> None:
    """Raises ValueError for data without classes, or with another number of them than the classifier tells apart."""
    classes = open_source(data.source, "eval", languages=()).classes
    if len(classes) != classifier.classes:
        told = f"{len(classes)} classes" if classes else "no classes"
        raise ValueError(
            f"{path} tells {classifier.classes} classes apart, the run's source has {told}; want a run on pictures of "
            "the classes that it was trained on, in the same order"
        )


def measure_true(
    classifier: Classifier,
    tokenizer: ImageTokenizer | None,
    data: DataConfig,
    image_size: int,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> metrics.Metrics:
    """What drawn pictures can reach: `accuracy_class_true`, the share of the first `count` rows of the evaluation split
    whose true picture the classifier puts into the row's class, and with a tokenizer `accuracy_class_reconstruction`,
    of their reconstructions. Rows without a class are left out."""

    def again(images: np.ndarray) -> np.ndarray:
        return to_uint8(decode_codes(tokenizer, encode_images(tokenizer, images)))

    made: dict[str, Callable[[dict], np.ndarray]] = {"accuracy_class_true": lambda asked: asked["image"]}
    if tokenizer is not None:
        made["accuracy_class_reconstruction"] = lambda asked: again(asked["image"])
    source = open_source(data.source, "eval", languages=())
    return {
        name: _share(classifier, source, data, image_size, count, make, progress)
        for name, make in made.items()
    }


def measure_classes(
    classifier: Classifier,
    model: metrics.TextToImageModel,
    count: int = 256,
    sampling: SamplingConfig | DiffusionSamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> metrics.Metrics:
    """`accuracy_class`: share of drawn pictures that the classifier puts into the class asked for. One picture is drawn
    for each of the first `count` rows of the evaluation split, with its caption and label as far as the model reads
    them, row i with seed `seed + i`. Rows without a class are left out."""
    data, size = model.run.config.data, metrics.image_size(model)

    def draw(asked: dict) -> np.ndarray:
        labels = asked["label"] if metrics.is_class_conditional(model) else None
        seeds = [seed + i for i in asked["rows"]]
        return metrics.sample_for_captions(model, asked["caption"], seeds, sampling, labels=labels)

    source = open_source(data.source, "eval", languages=metrics.model_languages(model))
    return {"accuracy_class": _share(classifier, source, data, size, count, draw, progress)}


def _share(
    classifier: Classifier,
    source: Dataset,
    data: DataConfig,
    image_size: int,
    count: int,
    make: Callable[[dict], np.ndarray],
    progress: ProgressFn | None,
) -> float:
    """Share of rows whose made picture is put into their class. make: a batch with its `rows` to uint8 pictures."""
    right: list[Sequence[bool]] = []
    total = min(count, len(source))
    for start in range(0, total, metrics.EVAL_ROWS):
        rows = range(start, min(start + metrics.EVAL_ROWS, total))
        asked = {**eval_batch(data, source, rows, image_size=image_size, with_labels=True), "rows": rows}
        named = asked["label"] >= 0
        found = class_logits(classifier, make(asked), batch=metrics.EVAL_ROWS).argmax(axis=1)
        right.append(found[named] == asked["label"][named])
        if progress:
            progress(rows.stop, total)
    judged = np.concatenate(right)
    return float(judged.mean()) if judged.size else float("nan")
