"""Inception score by hand; the torch file of the FID Inception: every tensor in its place, and beside pytorch-fid.

pytest -m parity tests/evaluate/test_inception_score.py     # needs torch, torchvision and pytorch-fid
"""

import numpy as np
import pytest
from foreign_checkpoints import torch_zip

from dalle_jax.evaluate import inception, inception_score, metrics
from dalle_jax.importers.inception import CLASSIFIER, inception_convolutions, read_inception


def scored(logits, parts, cut=()):
    sums, first = inception_score.init_score_sums(logits.shape[1], parts), 0
    for rows in np.split(logits, cut):
        sums, first = inception_score.update_score_sums(sums, rows, first, len(logits)), first + len(rows)
    return inception_score.inception_score(sums)


def test_sure_and_even_is_the_number_of_classes():
    """p(y|x) all on one class, each class as often: KL is log C. All on the same class, or no idea: KL is 0."""
    sure = 500 * np.eye(4)[np.arange(12) % 4]
    assert scored(sure, 1) == pytest.approx((4, 0))
    assert scored(sure[:1].repeat(12, 0), 1) == pytest.approx((1, 0))
    assert scored(np.zeros((12, 4)), 3) == pytest.approx((1, 0))


def test_by_hand():
    """Two images, p = (3/4, 1/4) and (1/4, 3/4): p(y) is even, KL = 3/4 log 3/2 + 1/4 log 1/2 for both."""
    logits = np.log([[3.0, 1.0], [1.0, 3.0]]) + 7  # what is added to all scores of a row is nothing
    want = 1.5**0.75 * 0.5**0.25
    assert scored(logits, 1)[0] == pytest.approx(want)
    both = np.concatenate([logits, 500 * np.eye(2)])  # a second part, of score 2
    assert scored(both, 2) == pytest.approx(((want + 2) / 2, (2 - want) / 2))


def test_batches_do_not_matter():
    logits = np.random.default_rng(0).normal(size=(25, 7))
    assert scored(logits, 10, cut=(3, 4, 17)) == pytest.approx(scored(logits, 10), rel=1e-12)


def test_bad_scores_are_refused():
    rows = np.zeros((4, 3))
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match="Expected finite logits, got others in row 12"):
        inception_score.update_score_sums(inception_score.init_score_sums(3), rows, 10, 20)
    with pytest.raises(ValueError, match=r"Expected rows in \[0, 20\), .* got 18 to 21"):
        inception_score.update_score_sums(inception_score.init_score_sums(3), np.zeros((4, 3)), 18, 20)
    with pytest.raises(ValueError, match=r"Expected at least 10 images for an Inception score .*, got 4"):
        inception_score.inception_score(
            inception_score.update_score_sums(inception_score.init_score_sums(3), np.zeros((4, 3)), 0, 4)
        )


def test_measures_score_all_batches_as_one_set(monkeypatch):
    """Images of one color stand for their features; three batches of a set of 20, in ten parts."""
    rng = np.random.default_rng(0)
    table, classifier = (
        rng.normal(size=(20, 6)).astype(np.float32),
        rng.normal(size=(6, 5)).astype(np.float32),
    )
    monkeypatch.setattr(inception, "inception_features", lambda network, images: table[images[:, 0, 0, 0]])
    images = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 2, 2, 3))
    batches = [range(0, 8), range(8, 16), range(16, 20)]
    made = (images[rows.start : rows.stop] for rows in batches)
    found, sums = metrics._feature_stats(inception.Inception({}, "", classifier), made, batches, None)
    assert inception_score.inception_score(sums) == pytest.approx(scored(table @ classifier, 10), rel=1e-6)
    np.testing.assert_allclose(found.mean_D, table.mean(axis=0), rtol=1e-5)
    made = (images[rows.start : rows.stop] for rows in batches)
    assert metrics._feature_stats(inception.Inception({}, ""), made, batches, None)[1] is None


# --- the torch file -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arrays():
    """A file's tensors, float16, each full of a number of its own; the scale of every batch norm is 2."""
    found, wanted, number = {}, inception.inception_param_shapes(), 0
    parts = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    for theirs, ours in inception_convolutions():
        for name, end in parts.items():
            number += 1
            found[f"{theirs}.{name}"] = np.full(wanted[f"net.layers.{ours}.{end}"], number, np.float16)
        found[f"{theirs}.bn.weight"] = np.full(wanted[f"net.layers.{ours}.var"], 2, np.float16)
    found["fc.weight"] = np.ones((1008, 2048), np.float16)
    found["fc.bias"] = np.full((1008,), 9, np.float16)
    return found


def test_every_tensor_of_the_torch_file_has_its_place(arrays, tmp_path):
    """By shape, which `arrays` takes from ours: so no two names may be mistaken, and none be left."""
    ours = [name for _, name in inception_convolutions()]
    assert {f"net.layers.{name}.weight" for name in ours} == {
        n for n in inception.inception_param_shapes() if n.endswith("weight")
    }
    assert len({name for name, _ in inception_convolutions()}) == len(ours) == 94
    path = torch_zip(tmp_path / "weights.pth", arrays)
    found = read_inception(path)
    assert found.keys() == inception.inception_param_shapes().keys() | {CLASSIFIER}
    np.testing.assert_array_equal(found["net.layers.conv.weight"], np.full((32, 3, 3, 3), 2.0))  # 1, twice
    assert (found["net.layers.conv.beta"] == 2).all() and (found["net.layers.conv.mean"] == 6).all()
    network = inception.load_inception(path)
    # By hand, the first convolution: kernel 2 x 1, beta 2, mean 2 x 3, variance 4.
    kernel, bias = network.params["conv"]["kernel"], network.params["conv"]["bias"]
    assert float(kernel[0, 0, 0, 0]) == pytest.approx(2 / np.sqrt(4.001))
    assert float(bias[0]) == pytest.approx(2 - 6 / np.sqrt(4.001))
    scores = inception.inception_logits(network, np.ones((1, 2048), np.float32))
    np.testing.assert_array_equal(scores, np.full((1, 1008), 2048.0))  # without the bias


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"Mixed_7a.branch3x3_2.bn.running_var": None}, r"without Mixed_7a\.branch3x3_2\.bn\.running_var\. Use"),
        ({"AuxLogits.fc.weight": np.zeros(2, np.float32)}, r"with AuxLogits\.fc\.weight"),
        ({"fc.weight": np.zeros((1000, 2048), np.float32)},
        r"output\.weight of finite floats \(1008, 2048\), got float32 \(1000, 2048\)"),
        ({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 1, 1), np.float32)},
        r"net\.layers\.conv\.weight of floats .* got float32"),
    ],
)  # fmt: skip
def test_other_torch_files_are_refused(arrays, tmp_path, change, told):
    held = {name: array for name, array in (arrays | change).items() if array is not None}
    with pytest.raises(ValueError, match=told):
        inception.load_inception(torch_zip(tmp_path / "weights.pth", held))


@pytest.mark.parity
def test_features_and_scores_of_pytorch_fid(tmp_path, monkeypatch):
    """Its network with random weights, saved as its own file is, on images of odd sides: 1e-5 of the largest."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    held = {}

    def random(*_, **__):
        model = held["model"]
        state = {}
        for name, value in model.state_dict().items():
            if "running_var" in name or name.endswith("bn.weight"):
                state[name] = 0.5 + torch.rand(value.shape)
            elif value.ndim > 1:
                state[name] = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
            else:
                state[name] = 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        return state

    plain = theirs._inception_v3
    monkeypatch.setattr(theirs, "_inception_v3", lambda *a, **k: held.setdefault("model", plain(*a, **k)))
    monkeypatch.setattr(theirs, "load_state_dict_from_url", random)
    whole = theirs.InceptionV3([3], resize_input=True, normalize_input=True).eval()
    torch.save(held["model"].state_dict(), tmp_path / "weights.pth")
    images = np.random.default_rng(0).integers(0, 256, (3, 37, 53, 3), np.uint8)
    with torch.no_grad():
        # Its images are in [0, 1] and become 2 x - 1; those of the original network (x - 128) / 128.
        x = (torch.tensor(images.transpose(0, 3, 1, 2)).float() - 128) / 128
        want = whole((x + 1) / 2)[0][:, :, 0, 0]
        logits = want @ held["model"].fc.weight.T
    network = inception.load_inception(tmp_path / "weights.pth")
    got = inception.inception_features(network, images)
    scores = inception.inception_logits(network, got)
    for ours, reference in ((got, want.numpy()), (scores, logits.numpy())):
        assert np.abs(reference).max() > 0.1
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
