"""Laws of the stages: precomputed codes train as images do, and mismatched configurations are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.load import Run
from dalle_jax.config import (
    DalleConfig,
    DataConfig,
    DVAEConfig,
    ScenesSource,
    Schedule,
    T5Config,
    TextConfig,
    TrainConfig,
    to_json,
)
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.sources import open_source
from dalle_jax.models import dalle, dvae
from dalle_jax.pipelines import TokenizerPipeline, encode_dataset
from dalle_jax.text.tokenizers import train_text_tokenizer
from dalle_jax.train.tasks import make_task
from dalle_jax.train.tasks.dalle import DalleTask
from dalle_jax.train.tasks.dvae import DVAETask

ROWS, BATCH = 21, 4
SCENES = ScenesSource(count=ROWS, max_objects=2)
TOKENIZER = DVAEConfig(
    image_size=32, groups=3, blocks=1, width=8, decoder_width=4, vocab=13,
    tau=Schedule(start=1.0, end=0.5, steps=10), kl_weight=Schedule(start=0.0, end=2.0, steps=4),
    code_usage_weight=Schedule(start=1.0, end=0.0, steps=2),
)  # fmt: skip
MODEL = DalleConfig(
    text_vocab=400, text_len=6, image_vocab=13, grid=8, dim=16, layers=2, heads=2, mlp_ratio=2, conv_kernel=3,
    attention=("row",), dtype="float32", remat="none", cond_drop_prob=0.2,
)  # fmt: skip

encode = jax.jit(dvae.encode, static_argnums=0)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A text tokenizer, and an image tokenizer with random weights and a run directory without checkpoints."""
    room = tmp_path_factory.mktemp("tasks")
    captions = ["a red circle", "a large blue square on white", "红色的圆", "一个蓝色的方块"]
    train_text_tokenizer(captions, room / "bpe.model", vocab=400)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: dvae.init(TOKENIZER, key), jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)
    config = TrainConfig(model=TOKENIZER, run=str(room / "dvae"))
    (room / "dvae").mkdir()
    (room / "dvae" / "config.json").write_text(to_json(config))
    return room, Run(config, params, room / "dvae", 0)


def dalle_config(room, **changes):
    values = {
        "model": MODEL,
        "run": str(room / "run"),
        "data": DataConfig(source=SCENES, batch_size=BATCH, num_threads=1, prefetch=1),
        "text": TextConfig(tokenizer_path=str(room / "bpe.model"), bpe_dropout=0.1),
        "image_tokenizer": str(room / "dvae"),
        "eval_rows": 5,
    }
    return TrainConfig(**{**values, **changes})


def prepared_task(config, tokenizer: Run, run_dir: Path):
    """Return a task whose run directory has its frozen tokenizer, as after the first start."""
    run_dir.mkdir()
    write_run(run_dir / "image_tokenizer", tokenizer.config, tokenizer.params, tokenizer.step)
    task = DalleTask(config)
    task.prepare(run_dir)
    return task


def first_batches(task, steps):
    batches = task.batches(0)
    try:
        return [next(batches) for _ in range(steps)]
    finally:
        batches.close()


def write_codes(path, tokenizer, rows=ROWS, params=None):
    """Write the codes of the first `rows` training rows in shards of 8."""
    params = tokenizer.params if params is None else params
    model = TokenizerPipeline(Run(TrainConfig(model=TOKENIZER), params, Path(path), 0))
    encode_dataset(model, DataConfig(source=SCENES), path, rows=rows, shard_rows=8)


@pytest.fixture(scope="module")
def pixels(room):
    room, tokenizer = room
    return prepared_task(dalle_config(room), tokenizer, room / "pixels")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: dalle.init(MODEL, key), jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def precomputed(room):
    room, tokenizer = room
    write_codes(room / "codes", tokenizer)
    data = DataConfig(source=SCENES, batch_size=BATCH, num_threads=1, prefetch=1, codes=str(room / "codes"))
    return prepared_task(dalle_config(room, data=data), tokenizer, room / "precomputed")


def test_precomputed_codes_train_like_images(pixels, precomputed, params):
    """Equal rows, captions, codes and losses, into the second epoch."""
    steps = ROWS // BATCH + 2
    losses = []
    loss = {name: jax.jit(task.loss) for name, task in (("pixels", pixels), ("precomputed", precomputed))}
    for step, (a, b) in enumerate(
        zip(first_batches(pixels, steps), first_batches(precomputed, steps), strict=True)
    ):
        assert a.keys() == {"image", "text"} and b.keys() == {"codes", "text"}
        np.testing.assert_array_equal(a["text"], b["text"])
        key, number = jax.random.key(step), jnp.int32(step)
        want, want_metrics = loss["pixels"](params, pixels.frozen, a, key, number)
        got, metrics = loss["precomputed"](params, precomputed.frozen, b, key, number)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert metrics.keys() == want_metrics.keys()
        losses.append(float(got))
    assert len(set(np.round(losses, 5))) == steps  # the batches differ, so equal losses are meaningful
    assert len(np.unique(b["codes"])) > 2


def test_the_frozen_tokenizer_has_no_gradient(pixels, params):
    (batch,) = first_batches(pixels, 1)

    def value(frozen):
        return pixels.loss(params, frozen, batch, jax.random.key(0), jnp.int32(0))[0]

    for leaf in jax.tree.leaves(jax.jit(jax.grad(value))(pixels.frozen)):
        assert (leaf == 0).all()


def test_evaluation_keeps_every_caption(pixels, params):
    """Evaluation ignores `cond_drop_prob` and the key, and uses the first `eval_rows` rows of its split."""
    (batch,) = pixels.eval_batches()
    assert batch["image"].shape == (5, 32, 32, 3) and batch["text"].shape == (5, 6)
    codes = encode(TOKENIZER, pixels.frozen, to_float(jnp.asarray(batch["image"])))
    plain = dataclasses.replace(MODEL, cond_drop_prob=0.0)
    loss = jax.jit(dalle.loss, static_argnums=0)
    want, metrics = loss(plain, params, batch["text"], codes, jax.random.key(0))
    evaluate = jax.jit(pixels.evaluate)
    for seed in range(3):
        got = evaluate(params, pixels.frozen, batch, jax.random.key(seed))
        np.testing.assert_allclose(got["eval_loss"], want, rtol=1e-5)
        np.testing.assert_allclose(got["eval_image_loss"], metrics["image_loss"], rtol=1e-5)
    assert pixels.best == ("eval_loss", "min")


# --- mismatched configurations --------------------------------------------------------------------------


def test_codes_of_another_tokenizer_are_refused(room):
    room, tokenizer = room
    other = jax.tree.map(lambda x: x + 1, tokenizer.params)
    write_codes(room / "other_codes", tokenizer, params=other)
    data = DataConfig(source=SCENES, batch_size=BATCH, codes=str(room / "other_codes"))
    with pytest.raises(
        ValueError, match=r"of this run's tokenizer [0-9a-f]{16}, got .* of tokenizer [0-9a-f]{16}\. Encode"
    ):
        prepared_task(dalle_config(room, data=data), tokenizer, room / "stale")


def test_a_directory_with_the_first_rows(room, pixels):
    """Training uses only the rows of the directory."""
    room, tokenizer = room
    write_codes(room / "part_codes", tokenizer, rows=9)
    data = DataConfig(
        source=SCENES, batch_size=BATCH, num_threads=1, prefetch=1, codes=str(room / "part_codes")
    )
    task = prepared_task(dalle_config(room, data=data), tokenizer, room / "part")
    got = np.concatenate([batch["codes"] for batch in first_batches(task, 9)])
    source = open_source(SCENES, "train")
    images = np.stack([source.image(i, 32, "center") for i in range(9)])
    codes = np.asarray(encode(TOKENIZER, tokenizer.params, to_float(jnp.asarray(images))))
    want = np.sort(np.concatenate([codes] * 4), axis=0)
    np.testing.assert_array_equal(np.sort(got, axis=0), want)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"image_vocab": 14},
            r"Expected model\.image_vocab 13, that of the image tokenizer .*dvae, got 14\. Set them equal",
        ),
        ({"grid": 4}, r"Expected model\.grid 8, that of the image tokenizer .*dvae, got 4"),
    ],
)
def test_sizes_must_match_the_tokenizer(room, change, match):
    """The check needs the configurations alone."""
    room, _ = room
    with pytest.raises(ValueError, match=match):
        make_task(dalle_config(room, model=dataclasses.replace(MODEL, **change))).check_prerequisites()


def test_a_missing_tokenizer_is_refused(room):
    room, _ = room
    with pytest.raises(ValueError, match=r"Expected image_tokenizer, .* for a model of kind dalle, got none"):
        make_task(dalle_config(room, image_tokenizer=None, run=str(room / "nowhere"))).check_prerequisites()
    half = room / "half"  # the run was killed while it copied the tokenizer
    (half / "image_tokenizer" / "params").mkdir(parents=True)
    with pytest.raises(ValueError, match="Expected image_tokenizer"):
        make_task(dalle_config(room, image_tokenizer=None, run=str(half))).check_prerequisites()
    with pytest.raises(
        FileNotFoundError,
        match=r"image_tokenizer: Expected a run directory, got .*nowhere, which.*\. Train .*--image-tokenizer RUN",
    ):
        make_task(dalle_config(room, image_tokenizer=str(room / "nowhere"))).check_prerequisites()


def test_a_frozen_encoder_needs_a_pretrained_run(room):
    room, _ = room
    model = dataclasses.replace(MODEL, text_encoder=T5Config(), text_loss_weight=0.0)
    with pytest.raises(
        ValueError, match=r"Expected --init-from with model\.text_encoder, .* got none\. Use --init-from RUN"
    ):
        make_task(dalle_config(room, model=model)).check_prerequisites()


def test_a_run_of_another_stage_is_no_tokenizer(room, tmp_path):
    room, _ = room
    (tmp_path / "config.json").write_text(to_json(dalle_config(room)))
    with pytest.raises(ValueError, match=r"run of an image tokenizer \(dvae, vqgan\), got .* of stage dalle"):
        make_task(dalle_config(room, image_tokenizer=str(tmp_path))).check_prerequisites()


def test_a_run_with_its_own_copy_needs_no_tokenizer(room, pixels, tmp_path, capsys):
    """The path of the tokenizer is printed first: of the copy, and of the configuration's for a new run."""
    room, _ = room
    task = make_task(dalle_config(room, image_tokenizer=None, run=str(room / "pixels")))
    task.prepare(room / "pixels")
    assert f"image tokenizer: {room / 'pixels' / 'image_tokenizer'}\n" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint in .*dvae, got none"):
        make_task(dalle_config(room)).prepare(tmp_path)
    assert f"image tokenizer: {room / 'dvae'}\n" in capsys.readouterr().err
    np.testing.assert_array_equal(
        task.frozen["encoder"]["input"]["kernel"], pixels.frozen["encoder"]["input"]["kernel"]
    )


def test_a_public_vocabulary_is_copied(room):
    """The run directory stores it as one file, so the original directory may be deleted."""
    room, tokenizer = room
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pieces = [*map(chr, kept), *(chr(256 + i) for i in range(68)), "re", "red"]
    (room / "gpt2").mkdir()
    (room / "gpt2" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (room / "gpt2" / "merges.txt").write_text("#version: 0.2\nr e\nre d\n")
    config = dalle_config(room, text=TextConfig(tokenizer_path=str(room / "gpt2"), bpe_dropout=0.0))
    prepared_task(config, tokenizer, room / "public")
    shutil.rmtree(room / "gpt2")
    again = DalleTask(config)
    again.prepare(room / "public")
    ids = again.text_tokenizer.encode("red", text_vocab=400, text_len=6)
    assert ids.tolist() == [257, 401, 402, 403, 404, 405]
    assert first_batches(again, 1)[0]["text"].shape == (BATCH, 6)


def test_a_vocabulary_that_is_too_large_is_refused(room):
    room, tokenizer = room
    config = dalle_config(room, model=dataclasses.replace(MODEL, text_vocab=270))
    with pytest.raises(
        ValueError, match=r"Expected model\.text_vocab of at least \d+, the tokens of .*, got 270\. Raise it"
    ):
        prepared_task(config, tokenizer, room / "large")


# --- the stage of the image tokenizer ---------------------------------------------------------------------------


def test_make_task(room):
    room, _ = room
    assert isinstance(make_task(dalle_config(room)), DalleTask)
    task = make_task(TrainConfig(model=TOKENIZER))
    assert isinstance(task, DVAETask)
    assert task.tokens_per_row == 64 and make_task(dalle_config(room)).tokens_per_row == 6 + 64
    assert task.best == ("eval_psnr", "max")


def test_tokenizer_loss_follows_the_schedules(room, tmp_path):
    _, tokenizer = room
    data = DataConfig(source=SCENES, batch_size=BATCH, num_threads=1, prefetch=1)
    task = make_task(TrainConfig(model=TOKENIZER, data=data, eval_rows=3))
    task.prepare(tmp_path)
    (batch,) = first_batches(task, 1)
    assert batch.keys() == {"image"} and batch["image"].dtype == np.uint8
    key = jax.random.key(4)
    loss = jax.jit(task.loss)

    @jax.jit
    def expected_loss(tau, kl, usage):
        images = jnp.asarray(batch["image"]) / 255.0
        weights = {"tau": tau, "kl_weight": kl, "code_usage_weight": usage}
        return dvae.loss(TOKENIZER, tokenizer.params, images, key, **weights)[0]

    # Half cosines: tau 1 to 1/2 in 10 steps, KL weight 0 to 2 in 4, code usage weight 1 to 0 in 2.
    for step, weights in ((0, (1.0, 0.0, 1.0)), (1, None), (5, (0.75, 2.0, 0.0)), (99, (0.5, 2.0, 0.0))):
        value, metrics = loss(tokenizer.params, {}, batch, key, jnp.int32(step))
        if weights is None:
            np.testing.assert_allclose(metrics["code_usage_weight"], 0.5, rtol=1e-5)
            continue
        # Two programs sum the float32 terms in different orders; a wrong weight would differ by far more.
        np.testing.assert_allclose(value, expected_loss(*weights), rtol=1e-4)
        np.testing.assert_allclose(metrics["tau"], weights[0], rtol=1e-5)
    (batch,) = task.eval_batches()
    metrics = jax.jit(task.evaluate)(tokenizer.params, {}, batch, key)
    images = np.asarray(batch["image"]) / np.float32(255)
    codes = encode(TOKENIZER, tokenizer.params, jnp.asarray(images))
    error = np.asarray(jax.jit(dvae.decode, static_argnums=0)(TOKENIZER, tokenizer.params, codes)) - images
    psnr = -10 * np.log10((error**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics["eval_psnr"], psnr.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["eval_mse"], (error**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["eval_codebook_use"], len(np.unique(codes)) / 13, rtol=1e-5)


def test_pixel_conversions():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(jnp.asarray(levels))), levels)
    values = np.array([-0.1, 0.0, 0.001, 0.003, 0.7, 1.0, 1.3])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 1, 178, 255, 255])
