"""Accuracy of generated images by class, judged by a CIFAR-10 classifier from a file.

The network is the residual network for CIFAR of He et al. 2015 (1512.03385, sec. 4.2): 6 n + 2 layers in three stages
of 16, 32 and 64 channels, with identity shortcuts that halve the image and pad with zero channels (option A). n and the
number of classes follow from the weights. B batch, R rows, H W pixels, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.config import DataConfig
from dalle_jax.data.images import decode_image, encode_png, to_float
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.evaluate import metrics
from dalle_jax.files.archives import read_npz
from dalle_jax.pipelines import Pipeline, ProgressFn, TokenizerPipeline
from dalle_jax.pipelines.batching import map_batches
from dalle_jax.typing import Params

CIFAR_SIDE = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels, for values in [0, 1]
_EPSILON = 1e-5  # of the batch norms
_STAGES = 3
_HINT = "Use the npz file of a residual network for CIFAR-10 (docs/evaluation.md)."


class Classifier(NamedTuple):
    """A residual network for CIFAR, the batch norms folded into its convolutions.

    Attributes:
        params: convolution name -> {"kernel": float32 (3, 3, in, out), "bias": float32 (out,)}, and "linear" ->
            {"kernel": (C, K), "bias": (K,)}.
        blocks: n, residual blocks in each stage.
    """

    params: Params
    blocks: int

    @property
    def classes(self) -> int:
        return self.params["linear"]["bias"].size


def _apply_resnet(params: Params, blocks: int, images_BHWC: jax.Array) -> jax.Array:
    """Compute the logits of RGB images of 32 x 32, float32 in [0, 1]: float32 (B, K)."""

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

    x_BHWC = (images_BHWC - jnp.array([[[_MEAN]]])) / jnp.array([[[_STD]]])
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


_apply = jax.jit(_apply_resnet, static_argnums=1)


def class_logits(classifier: Classifier, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Compute the logits of images, float32 (R, K).

    Args:
        classifier: the network.
        images: uint8 (R, H, W, 3), R at least 1; resized where they are not 32 x 32.
        batch_size: images per call of the network.

    Raises:
        ValueError: another shape or dtype, or no images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(
            f"Expected images uint8 (rows, height, width, 3), got {images.dtype} {images.shape}."
        )
    if images.shape[1:3] != (CIFAR_SIDE, CIFAR_SIDE):
        images = np.stack([decode_image(encode_png(image), CIFAR_SIDE, crop="none") for image in images])

    def apply(batch: jax.Array) -> jax.Array:
        return _apply(classifier.params, classifier.blocks, to_float(batch))

    return map_batches(apply, (images,), min(batch_size, len(images)))


# --- weights ----------------------------------------------------------------------------------------------------


def resnet_param_shapes(blocks: int, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a weight file by name.

    Args:
        blocks: residual blocks in each stage.
        width: channels of the first stage.
        classes: K.

    Returns:
        Name -> shape; kernels are (out, in, h, w).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def add_convolution(name: str, in_channels: int, out_channels: int) -> None:
        shapes[f"{name}.weight"] = (out_channels, in_channels, 3, 3)
        norm = _norm_of(name)
        shapes.update(
            {f"{norm}.{part}": (out_channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        )

    add_convolution("conv1", 3, width)
    in_channels = width
    for stage in range(1, _STAGES + 1):
        out_channels = width * 2 ** (stage - 1)
        for block in range(blocks):
            add_convolution(f"layer{stage}.{block}.conv1", in_channels, out_channels)
            add_convolution(f"layer{stage}.{block}.conv2", out_channels, out_channels)
            in_channels = out_channels
    return {**shapes, "linear.weight": (classes, in_channels), "linear.bias": (classes,)}


def load_classifier(path: str | Path) -> Classifier:
    """Load the network from an npz file with the names of `resnet_param_shapes`, of any float dtype.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a tensor, which the message names, is missing, unknown, of another shape or dtype, or has values
            that no trained network has.
    """
    return fold_resnet_batch_norm(read_npz(path, _HINT), str(path))


def fold_resnet_batch_norm(tensors: dict[str, np.ndarray], source: str = "these weights") -> Classifier:
    """Fold each batch norm of named tensors into its convolution.

    Args:
        tensors: name -> array, as `resnet_param_shapes` lists them.
        source: what error messages call the tensors.

    Raises:
        ValueError: as `load_classifier` does.
    """
    first, last = tensors.get("conv1.weight"), tensors.get("linear.bias")
    if first is None or last is None or first.ndim != 4 or last.ndim != 1 or not last.size:
        raise ValueError(
            f"Expected conv1.weight (out, 3, 3, 3) and linear.bias (classes,) in {source}, got others. {_HINT}"
        )
    blocks = 0
    while f"layer1.{blocks}.conv1.weight" in tensors:
        blocks += 1
    expected = resnet_param_shapes(blocks, first.shape[0], last.size)
    for names, problem in (
        (expected.keys() - tensors.keys(), "without"),
        (tensors.keys() - expected.keys(), "with"),
    ):
        if names or not blocks:
            listed = ", ".join(sorted(names)[:3]) or "layer1.0.conv1.weight"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"Expected the tensors of a residual network, got {source} {problem} {listed}{more}. {_HINT}"
            )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or not np.issubdtype(tensor.dtype, np.floating):
            raise ValueError(
                f"{source}: Expected {name} of floats {shape}, got {tensor.dtype} {tensor.shape}. {_HINT}"
            )
        if not np.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
            raise ValueError(
                f"{source}: Expected finite values in {name}, variances of at least 0, got others. {_HINT}"
            )
    params: Params = {
        "linear": {
            "kernel": jnp.asarray(tensors["linear.weight"].T, jnp.float32),
            "bias": jnp.asarray(tensors["linear.bias"], jnp.float32),
        }
    }
    for name in (n.removesuffix(".weight") for n, shape in expected.items() if len(shape) == 4):
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


# --- metrics ----------------------------------------------------------------------------------------------------


def check_classifier_classes(classifier: Classifier, data: DataConfig, path: str) -> None:
    """Check that a source has as many classes as the classifier.

    Raises:
        ValueError: the numbers of classes differ, or the source has none.
    """
    classes = open_source(data.source, "eval", languages=()).classes
    if len(classes) != classifier.classes:
        count = f"one with {len(classes) or 'no'} classes"
        raise ValueError(
            f"Expected a source with the {classifier.classes} classes of {path}, got {count}. Use a run on images of "
            "the classes that the classifier was trained on, in the same order."
        )


def measure_class_accuracy_bound(
    classifier: Classifier,
    tokenizer: TokenizerPipeline | None,
    data: DataConfig,
    image_size: int,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> metrics.Metrics:
    """Measure the upper bound of `measure_class_accuracy` on the first `count` evaluation rows that have a class.

    Returns:
        `accuracy_class_true`, the fraction of true images that the classifier puts into their class, and with a
        tokenizer `accuracy_class_reconstruction`, the same of their reconstructions.
    """

    def true_images(batch: dict[str, Any], rows: range) -> np.ndarray:
        return batch["image"]

    makers: dict[str, Callable[[dict[str, Any], range], np.ndarray]] = {"accuracy_class_true": true_images}
    if tokenizer is not None:
        makers["accuracy_class_reconstruction"] = lambda batch, rows: tokenizer.reconstruct(batch["image"])
    source = open_source(data.source, "eval", languages=())
    return {
        name: _accuracy(classifier, source, data, image_size, count, make, progress)
        for name, make in makers.items()
    }


def measure_class_accuracy(
    classifier: Classifier,
    model: Pipeline,
    count: int = 256,
    sampling: metrics.AnySamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> metrics.Metrics:
    """Measure the fraction of generated images that the classifier puts into the class of their row.

    An image is generated for each of the first `count` rows of the evaluation split, from its caption and label as far
    as the model reads them, row i with seed `seed + i`. Rows without a class are left out.

    Returns:
        `accuracy_class`.
    """
    data = model.run.config.data

    def sample(batch: dict[str, Any], rows: range) -> np.ndarray:
        seeds = [seed + i for i in rows]
        return metrics.sample_for_captions(model, batch["caption"], seeds, sampling, labels=batch["label"])

    source = open_source(data.source, "eval", languages=model.languages)
    return {"accuracy_class": _accuracy(classifier, source, data, model.image_size, count, sample, progress)}


def _accuracy(
    classifier: Classifier,
    source: Dataset,
    data: DataConfig,
    image_size: int,
    count: int,
    make: Callable[[dict[str, Any], range], np.ndarray],
    progress: ProgressFn | None,
) -> float:
    """Fraction of rows whose image the classifier puts into their class. make: a batch and its rows to uint8 images."""
    right: list[np.ndarray] = []
    total = min(count, len(source))
    for start in range(0, total, metrics.EVAL_ROWS):
        rows = range(start, min(start + metrics.EVAL_ROWS, total))
        batch = eval_batch(data, source, rows, image_size=image_size, with_labels=True)
        labeled = batch["label"] >= 0
        logits = class_logits(classifier, make(batch, rows), batch_size=metrics.EVAL_ROWS)
        right.append(logits.argmax(axis=1)[labeled] == batch["label"][labeled])
        if progress:
            progress(rows.stop, total)
    verdicts = np.concatenate(right)
    return float(verdicts.mean()) if verdicts.size else float("nan")
