"""Diffusion from end to end on tiny models: training, the commands on its runs, and invalid input."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run
from PIL import Image

from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.load import Run
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.config import (
    CodesConfig,
    DataConfig,
    DiffusionConfig,
    DVAEConfig,
    NoiseConfig,
    OptimConfig,
    ScenesSource,
    TextConfig,
    TextEncoderConfig,
    TrainConfig,
    to_json,
)
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import diffusion, metrics
from dalle_jax.models import dvae
from dalle_jax.models.diffusion import unet
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.pipelines import (
    DiffusionPipeline,
    DiffusionSamplingConfig,
    ImageRequest,
    TokenizerPipeline,
    load,
)
from dalle_jax.train import loop
from dalle_jax.train.tasks.diffusion import DiffusionTask

SIZE = 32
NET = {
    "image_size": SIZE,
    "patch_size": 4,
    "width": 8,
    "channel_multipliers": (1,),
    "blocks": 1,
    "attention_sizes": (),
}
MODEL = DiffusionConfig(
    **NET, dropout=0.0, text=TextEncoderConfig(text_vocab=400, text_len=6, dim=8, layers=1, heads=2), prediction="x0",
    noise=NoiseConfig(kind="ddpm", num_timesteps=40),
)  # fmt: skip
DATA = DataConfig(batch_size=8, source=ScenesSource(count=40, max_objects=1), num_threads=1, prefetch=1)


def json_of(*argv) -> tuple[dict, str]:
    done = run(*argv, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out), done.err


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    for root in (metrics, diffusion):
        monkeypatch.setattr(root, "EVAL_ROWS", 2)


def random_params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.asarray(0.3 * rng.normal(size=s.shape), np.float32), shapes)


def export_run(path, config, params):
    """Write a run directory as `dalle-jax export` does."""
    path.mkdir(parents=True)
    write_params(path / "model.safetensors", params, 7)
    (path / "config.json").write_text(to_json(config))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory and the result of a training of two steps."""
    out = tmp_path_factory.mktemp("diffusion") / "run"
    config = TrainConfig(
        model=MODEL, run=str(out), data=DATA, text=TextConfig(num_train_captions=40), steps=2, eval_every=2,
        save_every=2,
        sample_every=2, log_every=1, eval_rows=8, optim=OptimConfig(learning_rate=0.01, warmup_steps=0, ema_every=1),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))  # compiles faster
        outcome = loop.train(config)
    return SimpleNamespace(run=out, outcome=outcome)


def test_training_logs_bands_and_samples_images(trained):
    assert trained.outcome.finished and trained.outcome.state.ema
    rows = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    bands = [f"band_{i}" for i in (1, 2, 3, 4)]
    (row,) = (r for r in rows if r["step"] == 1 and "loss" in r)
    assert row["loss"] == pytest.approx(np.mean([row[b] for b in bands]), rel=1e-4)  # two rows in each band
    assert "eps_mse" in row
    (measured,) = (r for r in rows if "eval_loss" in r)
    assert {f"eval_{b}" for b in bands} < measured.keys()
    assert Image.open(trained.run / "samples" / "step_00000002.png").width > 4 * 128


def test_sample(trained, tmp_path):
    flags = ("--num-steps", 4, "--sampler", "ddim", "--eta", 0.5, "--guidance-scale", 2, "--batch-size", 2)
    result, err = json_of(
        "sample",
        trained.run,
        "a red circle",
        "",
        "--num-images",
        2,
        *flags,
        "--filmstrip",
        2,
        "--out",
        tmp_path / "a",
    )
    assert [p["seed"] for p in result["images"]] == [0, 1, 0, 1]
    assert [p["caption"] for p in result["images"]] == [
        "a red circle",
        "a red circle",
        "",
        "",
    ]
    assert "denoising steps 8/8" in err  # two batches of four steps
    sampled_images = [np.asarray(Image.open(p["file"])) for p in result["images"]]
    assert sampled_images[0].shape == (SIZE, SIZE, 3) and (sampled_images[0] != sampled_images[1]).any()
    film, grid = (Image.open(tmp_path / "a" / name) for name in ("filmstrip.png", "grid.png"))
    assert film.height > 1.5 * film.width and grid.width > 250  # four images at two steps
    assert result["denoising"]["sampler"] == "ddim" and result["step"] == 2
    alone, _ = json_of(
        "sample", trained.run, "a red circle", "--seed", 1, "--num-images", 1, *flags, "--out", tmp_path / "b"
    )
    np.testing.assert_array_equal(np.asarray(Image.open(alone["images"][0]["file"])), sampled_images[1])


def test_inpainting_and_image_to_image(trained, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    mask = np.zeros((SIZE, SIZE, 3), np.uint8)
    mask[:, 16:] = 255
    for name, pixels in (("image", image), ("mask", mask)):
        images.save_png(tmp_path / f"{name}.png", pixels)
    flags = ("--num-images", 1, "--num-steps", 4, "--image", tmp_path / "image.png", "--out")
    result, _ = json_of(
        "sample", trained.run, "a red circle", *flags, tmp_path / "a", "--mask", tmp_path / "mask.png"
    )
    sampled = np.asarray(Image.open(result["images"][0]["file"])).astype(int)
    np.testing.assert_array_equal(sampled[:, :16], image[:, :16])
    assert np.abs(sampled[:, 16:] - image[:, 16:]).mean() > 20
    for strength in ("0.5", "1.0"):
        json_of("sample", trained.run, "a red circle", *flags, tmp_path / strength, "--strength", strength)
    (tmp_path / "black.png").write_bytes(b"")
    images.save_png(tmp_path / "black.png", 0 * mask)
    done = run(
        "sample", trained.run, "x", *flags, tmp_path / "c", "--mask", tmp_path / "black.png"
    )  # fmt: skip
    assert done.code == 1 and "Expected --mask with white" in done.err and "black.png, all black." in done.err


@pytest.mark.parametrize(
    ("argv", "code", "match"),
    [
        (["x", "--sampler", "euler2"], 2, "euler2"),
        (["x", "--num-steps", "0"], 1, "Expected num_steps of at least 1, got 0"),
        (["x", "--num-steps", "41"], 1, "num_steps in [1, 40] (noise.num_timesteps), got 41"),
        (["x", "--eta", "0.5"], 1, "Expected eta 0 for sampler dpm++2m, got 0.5. Use sampler ddim"),
        (["x", "--guidance-scale", "-1"], 1, "Expected guidance_scale of at least 0, got -1.0"),
        (["x", "--guidance-interval", "0.9", "0.1"], 1, "0 <= first < last <= 1, got 0.9 and 0.1"),
        (["x", "--threshold", "1.5"], 1, "Expected threshold in [0, 1), got 1.5"),
        (["x", "--filmstrip", "51"], 1, "Expected --filmstrip in [1, 50], the number of steps, got 51"),
        (
            ["x", "--mask", "small.png", "--image", "image.png"],
            1,
            f"Expected --mask of {SIZE} x {SIZE} pixels, as this model's images, got small.png of 16 x 16",
        ),
        (["x", "--image", "small.png", "--strength", "0.5"], 1, "got small.png of 16 x 16"),
        (["x", "--image", "image.png"], 1, "Expected a strength or a mask with an image, got neither"),
        (
            ["x", "--strength", "0.5"],
            1,
            "Expected an image to start from with a mask or a strength, got none",
        ),
        (["x", "--image", "image.png", "--strength", "2"], 1, "1], got 2.0."),
        (["x", "--temperature", "0.5"], 2, "--temperature"),
        (["x", "--prefix", "image.png"], 2, "--prefix"),
        (["x", "--decoder", "runs/x"], 2, "--decoder"),
        (["x", "--draft-len", "4"], 2, "--draft-len"),
        (["x", "--quantization", "int8"], 2, "--quantization"),
        (["--captions-file", "c.txt", "--filmstrip", "2"], 1, "Expected --filmstrip without --captions-file"),
        (["--label", "1", "--unconditional"], 1, "Expected --label or --unconditional, got both"),
        (["x", "--label", "1"], 1, "Expected no --label for a model without classes"),
        (
            ["x", "--low-res", "small.png"],
            1,
            "Expected no --low-res for a model that enlarges no small image",
        ),
        ([], 1, "Expected one caption or more, got none"),
    ],
)
def test_invalid_sampling_flags_are_rejected(trained, tmp_path, monkeypatch, argv, code, match):
    monkeypatch.chdir(tmp_path)
    images.save_png(tmp_path / "image.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    images.save_png(tmp_path / "small.png", np.zeros((16, 16, 3), np.uint8))
    done = run("sample", trained.run, *argv, "--out", "out")
    assert done.code == code and match in done.err and "Traceback" not in done.err, done.err
    assert done.out == ""


def test_a_non_finite_image_is_an_error_that_names_the_step(trained, tmp_path):
    model = load(trained.run, DiffusionPipeline)
    bad = jax.tree.map(lambda x: x * jnp.nan, model.run.params)
    config = dataclasses.replace(model.run.config, run="x")
    path = export_run(tmp_path / "bad", config, model.run.params)
    (path / "text_tokenizer.model").write_bytes((trained.run / "text_tokenizer.model").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalle_jax.pipelines.loading.load_run", lambda *_, **__: Run(config, bad, path, 7))
        done = run("sample", path, "x", "--num-images", 1, "--num-steps", 4, "--out", tmp_path / "out")
    assert done.code == 3 and "in sampling step 1 (rows 0)" in done.err


def test_evaluate(trained):
    result, _ = json_of("evaluate", trained.run, "--count", 2, "--num-steps", 4)
    assert result["stage"] == "diffusion" and result["sampler"] == "dpm++2m" and result["steps"] == 4
    assert {"loss", "eps_mse", "band_1", "accuracy_one_object", "accuracy_held_out"} <= result.keys()
    done = run("evaluate", trained.run, "--top-k", 3)
    assert done.code == 2 and "--top-k" in done.err


@pytest.mark.slow
def test_bits_per_dim(trained):
    """A model of two training steps gives no useful likelihood, but a finite one, and the same one again."""
    command = ("evaluate", trained.run, "--count", 2, "--num-steps", 4, "--bits-per-dim", 2)
    result, _ = json_of(*command)
    assert result["bits_per_dim_rows"] == 2 and 0 < result["bits_per_dim"] < math.inf
    assert json_of(*command)[0]["bits_per_dim"] == result["bits_per_dim"]


# --- labels, and codes of a tokenizer ------------------------------------------------------------------------


def test_an_unconditional_image_has_an_empty_caption(trained, tmp_path):
    flags = ("--unconditional", "--num-images", 1, "--num-steps", 1, "--out", tmp_path)
    result, _ = json_of("sample", trained.run, *flags)
    assert [image["caption"] for image in result["images"]] == [""]


def test_codes_that_are_no_rows_are_rejected_by_decode(decoder, tmp_path):
    np.savez(tmp_path / "codes.npz", codes=np.int32(3))
    messages = [
        run("decode", path, tmp_path / "codes.npz", "--out", tmp_path / "x.npz").err
        for path in (decoder, decoder / "image_tokenizer")
    ]
    assert "codes of integers (images, 64), at least one row, got int32 ()" in messages[0]
    assert messages[0] == messages[1]


def test_images_are_sampled_by_class(tmp_path):
    model = DiffusionConfig(**NET, num_classes=3, prediction="x0")
    params = random_params(jax.eval_shape(lambda: unet.init(model, jax.random.key(0))))
    path = export_run(tmp_path / "classes", TrainConfig(model=model, data=DATA), params)
    result, _ = json_of(
        "sample", path, "--label", 0, 2, "--num-images", 1, "--num-steps", 2, "--out", tmp_path / "out"
    )
    assert [p["caption"] for p in result["images"]] == ["class 0", "class 2"]
    sampled_images = [np.asarray(Image.open(p["file"])) for p in result["images"]]
    assert (sampled_images[0] != sampled_images[1]).any()  # the same seed, another class
    for argv, match in (
        ((), "Expected --label in [0, 3), got none"),
        (("--label", 3), "Expected labels in [0, 3), got labels from 3 to 3"),
        (("a cat", "--label", 1), "a model without text, got some. Use --label instead"),
    ):
        done = run("sample", path, *argv, "--out", tmp_path / "x")
        assert done.code == 1 and match in done.err


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A diffusion model on the codes of a tokenizer, both with random weights."""
    root = tmp_path_factory.mktemp("decoder")
    cfg = DVAEConfig(image_size=SIZE, groups=3, blocks=1, width=8, decoder_width=8, vocab=9)
    params = random_params(jax.eval_shape(lambda: dvae.init(cfg, jax.random.key(0))))
    tokenizer = Run(TrainConfig(model=cfg, data=DATA), params, root / "dvae", 0)
    model = DiffusionConfig(**NET, codes=CodesConfig(vocab=9, grid=8, width=4), prediction="x0")
    config = TrainConfig(model=model, data=DATA, image_tokenizer=str(root / "dvae"))
    params = random_params(jax.eval_shape(lambda: unet.init(model, jax.random.key(0))))
    path = export_run(root / "run", config, params)
    write_run(path / "image_tokenizer", tokenizer.config, tokenizer.params, tokenizer.step)
    return path


def test_decode_equals_the_function(decoder, tmp_path):
    codes = np.random.default_rng(0).integers(0, 9, (3, 64)).astype(np.int32)
    np.savez(tmp_path / "codes.npz", codes=codes)
    out = tmp_path / "images.npz"
    result, err = json_of(
        "decode", decoder, tmp_path / "codes.npz", "--num-steps", 2, "--seed", 5, "--out", out
    )
    assert result["num_images"] == 3 and "denoising steps 2/2" in err
    got = np.load(out)["images"]
    model, sampling = load(decoder, DiffusionPipeline), DiffusionSamplingConfig(num_steps=2)
    want = diffusion.decode_evaluation_codes(model, codes, [5, 6, 7], sampling)
    np.testing.assert_allclose(got, want / np.float32(255), atol=1e-6)
    done = run("sample", decoder, "--out", tmp_path / "x")
    assert done.code == 1 and "generates the pixels of codes. Use `dalle-jax decode" in done.err
    with pytest.raises(ValueError, match=r"Expected codes in \[0, 9\), got codes from 0 to 9"):
        model.sample([ImageRequest(codes=9 * (np.arange(64) > 0))])


def test_evaluate_compares_with_the_decoder_of_the_tokenizer(decoder):
    result, _ = json_of("evaluate", decoder, "--count", 2, "--num-steps", 2)
    assert {
        "psnr",
        "tokenizer_psnr",
        "accuracy_reconstruction",
        "tokenizer_accuracy_reconstruction",
    } <= result.keys()
    model = load(decoder, DiffusionPipeline)
    model.check_tokenizer(model.tokenizer)
    run = model.tokenizer.run
    other = TokenizerPipeline(run._replace(params=jax.tree.map(lambda x: x + 1, run.params)))
    with pytest.raises(ValueError, match=r"trained on the codes of tokenizer [0-9a-f]{16}, got"):
        model.check_tokenizer(other)


def test_rfid_decodes_the_codes_of_the_evaluation_images(decoder, monkeypatch):
    """Row i has its own codes and seed. A second FID is of the tokenizer's decoder on the same codes."""
    model, feature_inputs = load(decoder, DiffusionPipeline), []

    def feature_stats(network, made, rows, progress):
        feature_inputs.append(np.concatenate(list(made)))
        return SimpleNamespace(count=len(feature_inputs[-1])), None

    monkeypatch.setattr(metrics, "_feature_stats", feature_stats)
    monkeypatch.setattr(metrics.fid, "fid", lambda a, b: float(len(feature_inputs)))
    sampling, true = DiffusionSamplingConfig(num_steps=2), SimpleNamespace(count=9)
    result = diffusion.measure_decoder_rfid(None, model, true, 3, sampling, seed=4)
    assert result == {"rfid": 1.0, "rfid_count": 3, "rfid_reference_count": 9, "tokenizer_rfid": 2.0}
    source = open_source(DATA.source, "eval", languages=())
    codes = model.tokenizer.encode(eval_batch(DATA, source, 3, image_size=SIZE)["image"])
    np.testing.assert_array_equal(
        feature_inputs[0], diffusion.decode_evaluation_codes(model, codes, [4, 5, 6], sampling)
    )
    np.testing.assert_array_equal(feature_inputs[1], images.to_uint8(model.tokenizer.decode(codes)))


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (
            CodesConfig(vocab=10, grid=8),
            r"Expected model\.codes\.vocab 9, that of the image tokenizer .*, got 10\. Set them equal",
        ),
        (
            CodesConfig(vocab=9, grid=4),
            r"Expected model\.codes\.grid 8, that of the image tokenizer .*, got 4",
        ),
    ],
)
def test_codes_that_do_not_fit_the_tokenizer_are_rejected(decoder, codes, match):
    model = dataclasses.replace(MODEL, text=None, codes=codes)
    with pytest.raises(ValueError, match=match):
        config = TrainConfig(model=model, image_tokenizer=str(decoder / "image_tokenizer"), run="nowhere")
        DiffusionTask(config).check_prerequisites()
    with pytest.raises(
        ValueError, match=r"Expected image_tokenizer, .* for a model of kind diffusion, got none"
    ):
        DiffusionTask(TrainConfig(model=model, run="nowhere")).check_prerequisites()


def test_a_number_of_classes_that_differs_from_the_data_is_rejected(tmp_path):
    task = DiffusionTask(TrainConfig(model=dataclasses.replace(MODEL, text=None, num_classes=4), data=DATA))
    with pytest.raises(
        ValueError, match=r"Expected model\.num_classes 0, the classes of the data, got 4. Set them equal"
    ):
        task.prepare(tmp_path)
