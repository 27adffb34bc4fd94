"""The judge of CIFAR-10 images: the network against plain NumPy, refused weights, shares by hand.

With DALLE_JAX_CIFAR10 naming a folder that holds cifar10.npz and resnet20_cifar10.npz the weights are checked, too.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from dalle_jax import config
from dalle_jax.evaluate import classifier

FOLDER = os.environ.get("DALLE_JAX_CIFAR10")


def weights(blocks=1, width=4, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in classifier.resnet_param_shapes(blocks, width, classes).items():
        if name.endswith("running_var"):
            found[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            found[name] = rng.normal(0, 0.5, shape).astype(np.float32)
    return found


def plain(tensors, images):
    """The paper's network in float64, one image at a time, batch norms where they stand."""

    def convolve(name, x_CHW, stride):
        kernel, norm = tensors[f"{name}.weight"].astype(np.float64), name.replace("conv", "bn")
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x_CHW, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2)
        )[:, ::stride, ::stride]
        out = np.einsum("chwyx,ocyx->ohw", windows, kernel)
        weight, bias, mean, var = (
            tensors[f"{norm}.{p}"].astype(np.float64)[:, None, None]
            for p in ("weight", "bias", "running_mean", "running_var")
        )
        return (out - mean) / np.sqrt(var + 1e-5) * weight + bias

    found = []
    for image in images:
        x = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = np.maximum(convolve("conv1", x.transpose(2, 0, 1), 1), 0)
        for stage in (1, 2, 3):
            block = 0
            while f"layer{stage}.{block}.conv1.weight" in tensors:
                stride = 2 if stage > 1 and block == 0 else 1
                inner = np.maximum(convolve(f"layer{stage}.{block}.conv1", x, stride), 0)
                inner = convolve(f"layer{stage}.{block}.conv2", inner, 1)
                short = x[:, ::stride, ::stride]
                spare = (len(inner) - len(short)) // 2
                x = np.maximum(inner + np.pad(short, ((spare, spare), (0, 0), (0, 0))), 0)
                block += 1
        found.append(tensors["linear.weight"] @ x.mean(axis=(1, 2)) + tensors["linear.bias"])
    return np.stack(found)


@pytest.fixture(scope="module")
def judge():
    return classifier.fold_resnet_batch_norm(weights(blocks=2))


def test_logits_are_those_of_the_network_in_numpy(judge):
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), np.uint8)
    want = plain(weights(blocks=2), images)
    assert judge.blocks == 2 and judge.classes == 10
    np.testing.assert_allclose(
        classifier.class_logits(judge, images), want, rtol=2e-5, atol=1e-4 * np.abs(want).max()
    )
    np.testing.assert_allclose(
        classifier.class_logits(judge, images, batch_size=2),
        classifier.class_logits(judge, images),
        rtol=1e-5,
        atol=1e-3,
    )


def test_images_of_another_side_are_resized(judge):
    images = np.full((2, 64, 64, 3), (10, 200, 90), np.uint8)
    np.testing.assert_allclose(
        classifier.class_logits(judge, images), classifier.class_logits(judge, images[:, :32, :32]), rtol=1e-6
    )
    for bad in (images[0], images.astype(np.float32), images[:0], images[..., :1]):
        with pytest.raises(ValueError, match=r"Expected images uint8 \(rows, height, width, 3\)"):
            classifier.class_logits(judge, bad)


def test_weights_that_are_no_such_network_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    with pytest.raises(
        FileNotFoundError, match=r"got no file .*w\.npz\. Use the npz file of a residual network"
    ):
        classifier.load_classifier(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="Expected a whole npz file, got"):
        classifier.load_classifier(path)
    good = weights()
    for change, message in (
        ({"conv1.weight": None}, r"Expected conv1.weight \(out, 3, 3, 3\) and linear.bias"),
        ({"layer2.0.bn1.bias": None}, r"got .*w\.npz without layer2\.0\.bn1\.bias"),
        ({"layer9.x": np.zeros(1)}, r"got .*w\.npz with layer9\.x"),
        (
            {"linear.weight": np.zeros((10, 3), np.float32)},
            r"linear.weight of floats \(10, 16\), got float32 \(10, 3\)",
        ),
        ({"linear.weight": np.zeros((10, 16), np.int32)}, r"linear.weight of floats \(10, 16\), got int32"),
        (
            {"conv1.weight": np.full((4, 3, 3, 3), np.nan, np.float32)},
            "Expected finite values in conv1.weight",
        ),
        (
            {"bn1.running_var": -np.ones(4, np.float32)},
            "bn1.running_var, variances of at least 0, got others",
        ),
    ):
        bad = {name: t for name, t in {**good, **change}.items() if t is not None}
        np.savez(path, **bad)
        with pytest.raises(ValueError, match=message):
            classifier.load_classifier(path)
    with pytest.raises(ValueError, match=r"without layer1\.0\.conv1\.weight"):
        classifier.fold_resnet_batch_norm({n: t for n, t in good.items() if not n.startswith("layer")})
    np.savez(path, **good)
    assert classifier.load_classifier(path).blocks == 1


def colors(tmp_path, classes):
    """Class k is a plain image of grey 20 k; the evaluation split has 7 rows."""
    labels = np.arange(7) % classes
    images = np.broadcast_to((20 * labels)[:, None, None, None], (7, 32, 32, 3)).astype(np.uint8)
    arrays = {
        f"{split}_{a}": value for split in ("train", "test") for a, value in (("x", images), ("y", labels))
    }
    np.savez(tmp_path / "a.npz", **arrays, label_names=[f"grey {k}" for k in range(classes)])
    return config.DataConfig(source=config.ArraysSource(path=str(tmp_path / "a.npz")))


def test_share_of_true_images_by_hand(tmp_path, judge, monkeypatch):
    """A judge that reads the grey, but takes class 0 for class 1: of rows 0 1 2 0 1 2 0, four are right."""
    data = colors(tmp_path, 3)

    def reads_gray(_, images, batch_size):
        return np.eye(3)[np.maximum(images[:, 0, 0, 0] // 20, 1)]

    monkeypatch.setattr(classifier, "class_logits", reads_gray)
    found = classifier.measure_class_accuracy_bound(judge, None, data, 32, 100)
    assert found == {"accuracy_class_true": pytest.approx(4 / 7)}
    assert classifier.measure_class_accuracy_bound(judge, None, data, 32, 2) == {"accuracy_class_true": 0.5}


def test_classes_have_to_agree(tmp_path, judge):
    with pytest.raises(
        ValueError, match=r"Expected a source with the 10 classes of w\.npz, got one with 3 classes"
    ):
        classifier.check_classifier_classes(judge, colors(tmp_path, 3), "w.npz")
    scenes = config.DataConfig(source=config.ScenesSource(count=10))
    with pytest.raises(ValueError, match="got one with no classes"):
        classifier.check_classifier_classes(judge, scenes, "w.npz")
    classifier.check_classifier_classes(
        classifier.fold_resnet_batch_norm(weights(classes=3)), colors(tmp_path, 3), "w.npz"
    )


@pytest.mark.skipif(FOLDER is None, reason="DALLE_JAX_CIFAR10 names no folder with the data and weights")
def test_weights_reach_their_accuracy():
    """91.73% of the 10,000 test images, as published for these weights."""
    judge = classifier.load_classifier(Path(FOLDER) / "resnet20_cifar10.npz")
    source = config.ArraysSource(path=str(Path(FOLDER) / "cifar10.npz"))
    found = classifier.measure_class_accuracy_bound(judge, None, config.DataConfig(source=source), 32, 10_000)
    assert found["accuracy_class_true"] == pytest.approx(0.9173, abs=5e-4)
