"""`dalle-jax evaluate` on tiny runs: metrics and invalid input."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import SIZE, json_of, refused, run

from dalle_jax.checkpoint.load import load_run
from dalle_jax.config import (
    ArraysSource,
    to_json,
)
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import classifier, fid, inception, metrics
from dalle_jax.pipelines import SamplingConfig, TextToImagePipeline, TokenizerPipeline, load

pytestmark = pytest.mark.usefixtures("small_batches")

# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluate_a_tokenizer(made):
    result = json_of("evaluate", made.dvae, "--count", 4)
    assert {"psnr", "mse", "codebook_use", "codebook_perplexity", "accuracy_reconstruction"} <= set(result)
    assert (result["stage"], result["step"], result["count"]) == ("dvae", 2, 4)
    assert "psnr" in run("evaluate", made.dvae, "--count", 4).out


def test_evaluate_a_transformer_with_a_curve(made):
    result = json_of("evaluate", made.dalle, "--count", 4, "--guidance-scale", 1, 2.5)
    names = {"loss", "image_loss", "text_loss", "psnr", "codebook_use", "accuracy_reconstruction"}
    accuracies = {"accuracy_one_object", "accuracy_two_objects", "accuracy_held_out", "accuracy_held_out_zh"}
    assert names | accuracies <= set(result) and result["stage"] == "dalle"
    assert [row["guidance_scale"] for row in result["curve"]] == [1, 2.5] and accuracies <= set(
        result["curve"][1]
    )
    assert result["guidance_scale"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--count", 0), "Expected --count of at least 1, got 0"),
        (("--guidance-scale", 1, -1), "Expected guidance_scale of at least 0, got -1.0"),
        (("--guidance-scale",), "Expected one --guidance-scale or more, got none"),
    ],
)
def test_invalid_flags_are_rejected(made, flags, message):
    assert message in refused("evaluate", made.dalle, *flags)


@pytest.fixture
def mean_color_features(monkeypatch):
    """Replace Inception-v3, whose weights the tests do not have: the features are the mean color of an image."""
    network = inception.Inception({}, "colors")
    monkeypatch.setattr(inception, "load_inception", lambda path: network)
    monkeypatch.setattr(
        inception, "inception_features", lambda _, rows: rows.mean(axis=(1, 2)).astype(np.float32)
    )
    return network


def test_evaluate_a_tokenizer_by_fid(made, mean_color_features, tmp_path):
    stats = tmp_path / "stats.npz"
    first = json_of("evaluate", made.dvae, "--count", 16, "--fid-weights", "w.npz", "--fid-save", stats)
    assert (first["rfid_count"], first["rfid_reference_count"]) == (16, 16)
    tokenizer = load(made.dvae, TokenizerPipeline)
    data = load_run(made.dvae).config.data
    true = eval_batch(data, open_source(data.source, "eval"), 16, image_size=SIZE)["image"]
    again = tokenizer.reconstruct(true, batch_size=8)
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (rows.mean(axis=(1, 2)) for rows in (true, again))
    )
    want = fid.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert want > 1 and first["rfid"] == pytest.approx(want, rel=1e-3)
    flags = ("--fid-weights", "w.npz", "--fid-reference", stats)
    assert json_of("evaluate", made.dvae, "--count", 16, *flags)["rfid"] == pytest.approx(first["rfid"])


def test_evaluate_a_transformer_by_fid(made, mean_color_features, monkeypatch):
    flags = ("--count", 8, "--fid-weights", "w.npz")
    result = json_of("evaluate", made.dalle, *flags, "--guidance-scale", 1, 2.5)
    assert result["fid"] > 0 and (result["fid_count"], result["fid_reference_count"]) == (8, 8)
    assert [set(row) >= {"guidance_scale", "fid", "accuracy_one_object"} for row in result["curve"]] == [
        True,
        True,
    ]
    # A source whose captions cannot be verified has a FID too.
    monkeypatch.setattr(metrics, "scene_kinds", lambda *_: ())
    other = json_of("evaluate", made.dalle, *flags)
    assert other["fid"] == pytest.approx(result["fid"]) and "accuracy_one_object" not in other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fid-weights", "absent.npz"), "got no file absent.npz"),
        (("--fid-save", "x.npz"), "Expected --fid-weights with --fid-reference and --fid-save, got none"),
        (
            ("--fid-weights", "w", "--fid-save", "x", "--fid-reference", "y"),
            "Expected --fid-save or --fid-reference, got both",
        ),
        (
            ("--fid-weights", "w.npz", "--count", 1),
            "Expected --count of at least 2 with --fid-weights, got 1",
        ),
    ],
)
def test_invalid_fid_flags_are_rejected(made, flags, message):
    assert message in refused("evaluate", made.dvae, *flags)


def test_statistics_of_another_image_size_are_rejected(made, mean_color_features, tmp_path):
    made_of = fid.FIDSettings("colors", inception.PREPROCESSING, SIZE * 2)
    fid.save_fid_reference(tmp_path / "s.npz", fid.feature_stats(np.eye(3)), made_of)
    message = refused("evaluate", made.dvae, "--fid-weights", "w", "--fid-reference", tmp_path / "s.npz")
    assert "s.npz with image_size 32, got 64" in message


# --- accuracy by a classifier --------------------------------------------------------------------------


def test_evaluate_by_a_classifier(made, tmp_path, monkeypatch):
    """The classifier gets the images sampled for the captions of the rows; it classifies by brightness."""
    labels = np.arange(8) % 2
    images = np.broadcast_to((60 + 80 * labels)[:, None, None, None], (8, SIZE, SIZE, 3)).astype(np.uint8)
    arrays = {f"{s}_{a}": v for s in ("train", "test") for a, v in (("x", images), ("y", labels))}
    np.savez(tmp_path / "a.npz", **arrays, label_names=["dark", "bright"])
    path = shutil.copytree(made.dalle, tmp_path / "run")
    plain = json.loads((path / "config.json").read_text())
    plain["data"]["source"] = json.loads(to_json(ArraysSource(path=str(tmp_path / "a.npz"))))
    (path / "config.json").write_text(json.dumps(plain))
    judged = []

    def classify_brightness(judge, images, batch_size):
        judged.append(images)
        return np.eye(2)[(images.mean(axis=(1, 2, 3)) > 100).astype(int)]

    monkeypatch.setattr(classifier, "load_classifier", lambda path: SimpleNamespace(classes=2))
    monkeypatch.setattr(classifier, "class_logits", classify_brightness)
    result = json_of(
        "evaluate", path, "--classifier", "w.npz", "--count", 6, "--seed", 3, "--guidance-scale", 1, 2
    )
    assert result["accuracy_class_true"] == 1.0 and 0 <= result["accuracy_class_reconstruction"] <= 1
    model = load(path, TextToImagePipeline)
    captions = [f"a photo of a {('dark', 'bright')[k]}" for k in labels[:6]]
    for judged_images, row, guidance in zip(judged[2:], result["curve"], (1, 2), strict=True):
        config = SamplingConfig(guidance_scale=guidance)
        want = metrics.sample_for_captions(model, captions, range(3, 9), config)
        np.testing.assert_array_equal(judged_images, want)
        fraction = np.mean((want.mean(axis=(1, 2, 3)) > 100) == labels[:6])
        assert row["accuracy_class"] == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classifier", "absent.npz"), "got no file absent.npz"),
        (("--classifier", "{made}/dvae/config.json"), "Expected a whole npz file, got"),
    ],
)
def test_an_invalid_classifier_is_rejected(made, flags, message):
    assert message in refused("evaluate", made.dvae, *(f.format(made=made.out) for f in flags))
