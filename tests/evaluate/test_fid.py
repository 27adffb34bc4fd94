"""FID: closed forms, exact merging, refused statistics; the Inception port against a reference's features.

The port itself is checked where DALLE_JAX_FID_WEIGHTS names a folder with inception_v3_fid_fp16.npz and
inception_v3_fid_check.npz (docs/evaluation.md).
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dalle_jax.evaluate import fid, inception

FOLDER = os.environ.get("DALLE_JAX_FID_WEIGHTS")
SETTINGS = fid.FIDSettings("ab12", inception.PREPROCESSING, 32)


def rng():
    return np.random.default_rng(0)


# --- the distance -------------------------------------------------------------------------------------------


def test_distance_of_diagonal_covariances():
    """By hand: 3^2 + 4^2 for the means, (1 - 2)^2 + (3 - 0)^2 for the standard deviations."""
    found = fid.frechet_distance(np.array([3.0, 0]), np.diag([1.0, 9]), np.array([0.0, 4]), np.diag([4.0, 0]))
    assert found == pytest.approx(25 + 10, abs=1e-12)


def test_distance_of_commuting_covariances():
    """With the same eigenvectors, the sum of (sqrt a - sqrt b)^2 over eigenvalues."""
    turn, _ = np.linalg.qr(rng().normal(size=(12, 12)))
    a, b = rng().uniform(0.1, 9, (2, 12))
    found = fid.frechet_distance(np.zeros(12), turn * a @ turn.T, np.zeros(12), turn * b @ turn.T)
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("rows", [200, 9])  # full rank, and fewer rows than features
def test_distance_equals_the_formula_with_a_general_matrix_root(rows):
    a, b = rng().normal(size=(rows, 16)), rng().normal(size=(300, 16)) @ rng().normal(size=(16, 16)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    off = a.mean(0) - b.mean(0)
    want = off @ off + np.trace(cov_a + cov_b - 2 * root)
    assert fid.fid(fid.feature_stats(a), fid.feature_stats(b)) == pytest.approx(want, rel=1e-6)
    assert fid.fid(fid.feature_stats(b), fid.feature_stats(a)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rows", [2, 10, 100])
def test_a_set_is_at_distance_zero_from_itself(rows):
    own = fid.feature_stats(100 * rng().normal(size=(rows, 32)))
    assert 0 <= fid.fid(own, own) < 1e-8 * np.trace(own.covariance)


def test_a_shifted_set_is_at_the_square_of_the_shift():
    rows = rng().normal(size=(5, 40))  # rank 4 of 40
    assert fid.fid(fid.feature_stats(rows), fid.feature_stats(rows + 0.5)) == pytest.approx(
        40 * 0.25, rel=1e-9
    )


# --- statistics in parts ------------------------------------------------------------------------------------


def test_parts_of_any_size_merge_to_the_whole():
    rows = (rng().normal(size=(101, 8)) + 1e4).astype(np.float32)  # a mean far above the deviations
    found = fid.feature_stats(rows[:1])
    for a, b in ((1, 2), (2, 40), (40, 101)):
        found = fid.merge_feature_stats(found, fid.feature_stats(rows[a:b]))
    whole = fid.feature_stats(rows)
    wide = rows.astype(np.float64)
    for got in (found, whole):
        assert got.count == 101 and got.mean_D.dtype == got.scatter_DD.dtype == np.float64
        np.testing.assert_allclose(got.mean_D, wide.mean(0), rtol=1e-14)
        np.testing.assert_allclose(got.covariance, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-9)


def test_bad_features_are_refused():
    rows = np.ones((3, 4))
    rows[1, 2] = np.nan
    with pytest.raises(ValueError, match="Expected finite features, got others in row 1"):
        fid.feature_stats(rows)
    with pytest.raises(ValueError, match="at least one row"):
        fid.feature_stats(np.ones((0, 4)))
    with pytest.raises(ValueError, match="Expected at least 2 images for a covariance, got 1"):
        _ = fid.feature_stats(np.ones((1, 4))).covariance
    for join in (fid.merge_feature_stats, fid.fid):
        with pytest.raises(ValueError, match=r"Expected features of as many columns .* got 4 and 5"):
            join(fid.feature_stats(np.ones((3, 4))), fid.feature_stats(np.ones((3, 5))))


# --- reference statistics -----------------------------------------------------------------------------------


@pytest.fixture
def stats(tmp_path):
    path = tmp_path / "made" / "stats.npz"
    fid.save_fid_reference(path, fid.feature_stats(rng().normal(size=(20, 6))), SETTINGS)
    return path


def test_reference_comes_back_as_it_was(stats):
    found, want = fid.load_fid_reference(stats, SETTINGS), fid.feature_stats(rng().normal(size=(20, 6)))
    assert found.count == 20
    np.testing.assert_array_equal(found.mean_D, want.mean_D)
    np.testing.assert_array_equal(found.scatter_DD, want.scatter_DD)
    assert [p.name for p in stats.parent.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": "cd34"}, "with weights 'cd34', got 'ab12'. Make it again"),
        ({"preprocessing": "x"}, "with preprocessing 'x', got '299 px, "),
        ({"image_size": 64}, "with image_size 64, got 32. Make it again"),
    ],
)
def test_reference_of_other_settings_is_refused(stats, change, told):
    with pytest.raises(ValueError, match=told):
        fid.load_fid_reference(stats, SETTINGS._replace(**change))


@pytest.mark.parametrize("part", ["mean", "scatter", "about"])
def test_changed_reference_is_refused(stats, part):
    with np.load(stats) as file:
        held = {name: file[name] for name in file.files}
    if part == "about":
        held[part] = np.array(str(held[part]).replace('"count": 20', '"count": 50000'))
    else:
        held[part].flat[3] += 1e-9
    np.savez(stats, **held)
    with pytest.raises(ValueError, match="got one whose hash differs"):
        fid.load_fid_reference(stats, SETTINGS)


def test_broken_or_absent_reference_is_refused(stats, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no file .*absent\.npz\. Make it again"):
        fid.load_fid_reference(tmp_path / "absent.npz", SETTINGS)
    stats.write_bytes(stats.read_bytes()[:100])
    with pytest.raises(ValueError, match="Expected a whole npz file, got"):
        fid.load_fid_reference(stats, SETTINGS)
    np.savez(stats, mean=np.zeros(3))
    with pytest.raises(ValueError, match="Expected a whole file of reference statistics, got"):
        fid.load_fid_reference(stats, SETTINGS)
    fid.save_fid_reference(stats, fid.feature_stats(np.ones((1, 6))), SETTINGS)
    with pytest.raises(ValueError, match=r"Expected at least 2 images in .*, got 1\."):
        fid.load_fid_reference(stats, SETTINGS)


# --- the network --------------------------------------------------------------------------------------------


def tensors():
    """Weights that are all zero, variances 1."""
    return {
        name: np.full(shape, name.endswith(".var"), np.float16)
        for name, shape in inception.inception_param_shapes().items()
    }


def test_the_network_has_the_published_size():
    """Keras prints 21,802,784 for InceptionV3(include_top=False), whose batch norms have no scale either."""
    assert sum(int(np.prod(shape)) for shape in inception.inception_param_shapes().values()) == 21_802_784
    params = {
        name.removeprefix("net.layers.").removesuffix(".weight"): {
            "kernel": jax.ShapeDtypeStruct((*shape[2:], shape[1], shape[0]), jnp.float32),
            "bias": jax.ShapeDtypeStruct((shape[0],), jnp.float32),
        }
        for name, shape in inception.inception_param_shapes().items()
        if name.endswith(".weight")
    }
    out = jax.eval_shape(inception.apply_inception, params, jax.ShapeDtypeStruct((3, 32, 48, 3), jnp.uint8))
    assert out.shape == (3, inception.NUM_FEATURES) and out.dtype == jnp.float32


def test_mean_pool_does_not_count_the_padding():
    x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
    got = inception.mean_pool(jnp.asarray(x))[0, :, :, 0]
    np.testing.assert_allclose(got, [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]], rtol=1e-6)


def test_resize_reads_between_pixel_centres():
    """A ramp shows the position that each output pixel reads, (i + 1/2) S / 299 - 1/2, held at the border."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[None, :, None, None], (1, 8, 5, 3))
    want = np.clip((np.arange(299) + 0.5) * 8 / 299 - 0.5, 0, 7)
    got = inception.resize_for_inception(jnp.asarray(ramp))
    assert got.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(got, np.broadcast_to(want[None, :, None, None], got.shape), atol=1e-5)


def test_resize_of_a_larger_image_does_not_smooth_it():
    lines = np.zeros((1, 598, 598, 1), np.float32)
    lines[:, 0::4] = 1  # smoothing over four rows would give a grey of 1/4 with little contrast
    got = np.asarray(inception.resize_for_inception(jnp.asarray(lines)))[0, 1:-1, 0, 0]
    np.testing.assert_allclose(got[:6], [0, 0.5, 0, 0.5, 0, 0.5], atol=1e-5)


def test_batch_norm_is_folded():
    """By hand: kernel / sqrt(var + 0.001), beta - mean / sqrt(var + 0.001)."""
    held = tensors()
    for name in ("weight", "beta", "mean", "var"):
        held[f"net.layers.conv.{name}"] = held[f"net.layers.conv.{name}"].astype(np.float64)
    held["net.layers.conv.weight"][5, 2, 0, 1] = 6.0
    held["net.layers.conv.beta"][5], held["net.layers.conv.mean"][5] = 1.0, 4.0
    held["net.layers.conv.var"][5] = 4.0 - 1e-3
    network = inception.fold_batch_norm(held)
    assert network.params["conv"]["kernel"].shape == (3, 3, 3, 32)
    assert float(network.params["conv"]["kernel"][0, 1, 2, 5]) == pytest.approx(3.0)
    assert float(network.params["conv"]["bias"][5]) == pytest.approx(-1.0)
    held["net.layers.mixed_10.tower_2_conv.beta"][7] = 0.5
    assert inception.fold_batch_norm(held).fingerprint != network.fingerprint


def without(name):
    return {k: v for k, v in tensors().items() if k != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda: without("net.layers.mixed_7.conv.var"),
            r"the FID Inception-v3, got w\.npz without net\.layers\.mixed_7\.conv\.var\. Use",
        ),
        (lambda: {"fc.weight": np.zeros(3)}, r"without net\.layers\.conv\.beta, .* and 373 more"),
        (lambda: tensors() | {"net.output.bias": np.zeros(3)}, r"got w\.npz with net\.output\.bias"),
        (
            lambda: tensors() | {"net.layers.conv.weight": np.zeros((3, 3, 3, 32))},
            r"net\.layers\.conv\.weight of floats \(32, 3, 3, 3\), got float64 \(3, 3, 3, 32\)",
        ),
        (
            lambda: tensors() | {"net.layers.conv.mean": np.zeros(32, np.int8)},
            r"net\.layers\.conv\.mean of floats \(32,\), got int8",
        ),
        (
            lambda: tensors() | {"net.layers.conv.beta": np.full(32, np.nan)},
            r"Expected finite values in net\.layers\.conv\.beta",
        ),
        (
            lambda: tensors() | {"net.layers.conv.var": np.full(32, -1.0)},
            r"conv\.var, variances of at least 0, got others",
        ),
    ],
)
def test_wrong_weights_name_the_tensor(change, told):
    with pytest.raises(ValueError, match=told):
        inception.fold_batch_norm(change(), "w.npz")


def test_wrong_weight_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no file .*absent\.npz\. Use the npz or pth file"):
        inception.load_inception(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="Expected a whole npz file, got"):
        inception.load_inception(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz without net\.layers"):
        inception.load_inception(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"Expected images uint8 .*, got float32 \(1, 4, 4, 3\)"):
        inception.inception_features(inception.Inception({}, ""), np.zeros((1, 4, 4, 3), np.float32))


@pytest.mark.skipif(not FOLDER, reason="DALLE_JAX_FID_WEIGHTS names no folder with the weights")
def test_the_port_gives_the_reference_s_features():
    network = inception.load_inception(Path(FOLDER) / "inception_v3_fid_fp16.npz")
    with np.load(Path(FOLDER) / "inception_v3_fid_check.npz") as file:
        images, want = file["images"], file["features"]
    got = inception.inception_features(network, images)
    off = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    halves = [fid.fid(fid.feature_stats(rows[:64]), fid.feature_stats(rows[64:])) for rows in (got, want)]
    print(
        f"\nrelative error of a row: at most {off.max():.2g}; FID of the halves {halves[0]:.5f}, {halves[1]:.5f}"
    )
    assert off.max() < 1e-3
    assert abs(halves[0] - halves[1]) < 0.05
