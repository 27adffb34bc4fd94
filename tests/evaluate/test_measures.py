"""Measures: what direct computation gives, perfect on perfect images, low on wrong ones."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.checkpoint.load import Run
from dalle_jax.config import DalleConfig, DataConfig, DVAEConfig, ScenesSource, TarSource, TrainConfig
from dalle_jax.data.images import to_uint8
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes import generator
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import metrics
from dalle_jax.models import dalle, dvae
from dalle_jax.pipelines import (
    GeneratedImage,
    ImageRequest,
    SamplingConfig,
    TextToImagePipeline,
    TokenizerPipeline,
    text_to_image,
)
from dalle_jax.sampling.generate import generate
from dalle_jax.text import tokenizers
from dalle_jax.text.tokenizers import TextTokenizer

SIZE = 32
DATA = DataConfig(source=ScenesSource(max_objects=2))


def jitted(fn):
    """Without the compiler's optimizations, which take longer than they save here."""
    return jax.jit(fn, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def tokenizer():
    cfg = DVAEConfig(image_size=SIZE, groups=3, blocks=1, width=8, decoder_width=8, vocab=16)
    params = jitted(dvae.init)(cfg, jax.random.key(0))
    return TokenizerPipeline(Run(TrainConfig(model=cfg), params, Path("tokenizer"), 0))


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("measures") / "text_tokenizer.model"
    captions = [c.text for c, _ in generator.generate_evaluation_set("two_objects", 200)]
    tokenizers.train_text_tokenizer(captions, path, vocab=512)
    cfg = DalleConfig(
        text_vocab=512,
        text_len=24,
        image_vocab=16,
        grid=8,
        dim=16,
        layers=1,
        heads=2,
        dtype="float32",
        remat="none",
    )
    params = jitted(dalle.init)(cfg, jax.random.key(1))
    run = Run(TrainConfig(model=cfg, data=DATA), params, Path("run"), 0)
    return TextToImagePipeline(run, TextTokenizer.load(path), tokenizer)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(metrics, "EVAL_ROWS", 4)


def show(monkeypatch, images_of_rows):
    """Let every model generate `images_of_rows(count)`, floats, in place of what its codes decode to."""

    def sample(self, requests, config=None, **_):
        images = to_uint8(images_of_rows(len(requests)))
        return (GeneratedImage(image, request) for image, request in zip(images, requests, strict=True))

    monkeypatch.setattr(TextToImagePipeline, "sample", sample)


def true_pictures(kind, count):
    pairs = metrics.unseen_captions(DATA, kind, count)
    return np.stack([generator.render_scene(scene, SIZE) for _, scene in pairs]) / np.float32(255)


def test_tokenizer_figures_are_means_over_all_rows(tokenizer):
    """6 rows: a full batch and a part of one."""
    found = metrics.measure_tokenizer(tokenizer, DATA, 6)
    rows = eval_batch(DATA, open_source(DATA.source, "eval"), 6, image_size=SIZE)["image"] / np.float32(255)
    codes = np.asarray(jitted(dvae.encode)(tokenizer.config, tokenizer.run.params, jnp.asarray(rows)))
    back = np.asarray(jitted(dvae.decode)(tokenizer.config, tokenizer.run.params, jnp.asarray(codes)))
    mse = np.square(rows - back).mean(axis=(1, 2, 3))
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    used = share[share > 0]
    assert found["mse"] == pytest.approx(mse.mean(), rel=1e-4)
    assert found["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-4)
    assert found["codebook_use"] == pytest.approx(len(used) / 16)
    assert found["codebook_perplexity"] == pytest.approx(np.exp(-(used * np.log(used)).sum()), rel=1e-4)


def test_likelihood_is_the_mean_over_rows_and_an_untrained_model_guesses(model):
    found = metrics.measure_nll(model, 6)
    assert found["image_loss"] == pytest.approx(np.log(16), abs=0.05)
    assert found["text_loss"] == pytest.approx(np.log(512 + 24), abs=0.05)
    assert found["loss"] == pytest.approx(found["text_loss"] / 8 + found["image_loss"] * 7 / 8, rel=1e-5)
    tokenizer, cfg = model.tokenizer, dataclasses.replace(model.config, cond_drop_prob=0.0)
    batch = eval_batch(
        DATA, open_source(DATA.source, "eval"), 6, image_size=SIZE,
        text=model.text, text_vocab=cfg.text_vocab, text_len=cfg.text_len,
    )  # fmt: skip
    rows = jnp.asarray(batch["image"] / np.float32(255))
    codes = jitted(dvae.encode)(tokenizer.config, tokenizer.run.params, rows)
    want, _ = jitted(dalle.loss)(cfg, model.run.params, jnp.asarray(batch["text"]), codes, jax.random.key(7))
    assert found["loss"] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("kind", ["one_object", "two_objects", "held_out"])
def test_true_images_are_right_and_others_are_not(monkeypatch, model, kind):
    count = 40
    true = true_pictures(kind, count)
    show(monkeypatch, lambda n: true)
    generated = metrics.sample_and_verify(model, kind, count)
    right = metrics.accuracy_metrics(kind, generated)
    assert right[f"accuracy_{kind}"] >= 0.97
    assert np.mean([right[f"accuracy_{kind}_en"], right[f"accuracy_{kind}_zh"]]) == pytest.approx(
        right[f"accuracy_{kind}"]
    )
    show(monkeypatch, lambda n: np.roll(true, 2, axis=0))  # of other captions in the same language
    assert (
        metrics.accuracy_metrics(kind, metrics.sample_and_verify(model, kind, count))[f"accuracy_{kind}"]
        <= 0.1
    )


def test_faithfulness_has_a_figure_for_each_kind_and_language(monkeypatch, model):
    show(monkeypatch, lambda n: np.ones((n, SIZE, SIZE, 3), np.float32))
    found = metrics.caption_accuracy(model, 4)
    kinds = ("one_object", "two_objects", "held_out")
    assert set(found) == {f"accuracy_{kind}{end}" for kind in kinds for end in ("", "_en", "_zh")}
    assert set(found.values()) == {0.0}


def test_the_ceiling_of_a_perfect_tokenizer(monkeypatch, tokenizer):
    monkeypatch.setattr(TokenizerPipeline, "reconstruct", lambda self, images, **_: images)
    found = metrics.reconstruction_accuracy(tokenizer, DATA, 20)
    assert found["accuracy_reconstruction"] >= 0.98
    parts = [v for name, v in found.items() if name != "accuracy_reconstruction"]
    assert len(parts) == 3 and found["accuracy_reconstruction"] == pytest.approx(np.mean(parts))


@pytest.mark.parametrize(
    ("source", "size", "kinds"),
    [
        (ScenesSource(max_objects=2), 32, ("one_object", "two_objects", "held_out")),
        (ScenesSource(max_objects=4), 256, ("one_object", "two_objects", "held_out")),
        (ScenesSource(max_objects=1), 32, ("one_object", "held_out")),
        (ScenesSource(min_objects=2, max_objects=3), 64, ("two_objects",)),
        (ScenesSource(min_objects=3), 64, ()),
        (ScenesSource(), 16, ()),
        (TarSource(path="x.tar"), 32, ()),
    ],
)
def test_kinds_follow_what_the_source_shows(source, size, kinds):
    assert metrics.scene_kinds(DataConfig(source=source), size) == kinds


def test_captions_stay_within_what_the_source_shows():
    data = DataConfig(source=ScenesSource(max_objects=1), languages=("zh",))
    for caption, scene in metrics.unseen_captions(data, "held_out", 20):
        assert caption.language == "zh" and len(scene.objects) == 1
    assert max(len(s.objects) for _, s in metrics.unseen_captions(DATA, "held_out", 20)) == 2


def test_more_captions_extend_the_same_rows(model):
    few, more = (metrics.sample_and_verify(model, "two_objects", n, seed=3) for n in (3, 5))
    for a, b in zip(few, more, strict=False):
        assert a.caption == b.caption and a.verdict == b.verdict
        np.testing.assert_array_equal(a.image, b.image)


def codes_of(model, requests, sampling=None, **options):
    return np.stack([image.codes for image in model.sample(requests, sampling, **options)])


def test_a_caption_is_run_once_for_its_images(model, monkeypatch):
    """Several seeds of a caption give what each gives alone; a batch runs each caption once."""
    texts, calls = ["a red circle", "", "一个红色的圆"], []
    requests = [ImageRequest(texts[i // 3], s) for i, s in enumerate([4, 5, 6, 7, 4, 5, 8, 9, 10])]
    params = jax.tree.map(lambda p: 10 * p, model.run.params)
    model = dataclasses.replace(model, run=model.run._replace(params=params))  # captions make a difference
    alone = np.concatenate([codes_of(model, [request], batch_size=1) for request in requests])

    def counted(cfg, params, text_CT, keys_B, **options):
        calls.append((len(text_CT), len(keys_B)))
        return generate(cfg, params, text_CT, keys_B, **options)

    monkeypatch.setattr(text_to_image, "generate", counted)
    for batch_size, shapes in {7: [(2, 6)] * 2, 3: [(1, 3)] * 3, 2: [(1, 2)] * 6}.items():
        np.testing.assert_array_equal(codes_of(model, requests, batch_size=batch_size), alone)
        assert calls == shapes
        calls.clear()
    assert len(np.unique(alone, axis=0)) == 9


def test_an_image_depends_on_its_request_alone(model):
    """Among requests with other settings, prefixes, and copies of its caption, in either engine, it is the same."""
    params = jax.tree.map(lambda p: 10 * p, model.run.params)
    model = dataclasses.replace(model, run=model.run._replace(params=params))
    prefix = np.arange(16, dtype=np.int32)
    requests = [
        ImageRequest("a red circle", 4, guidance_scale=1.5),
        ImageRequest("a red circle", 5, guidance_scale=1.5),
        ImageRequest("", 4),
        ImageRequest("一个红色的圆", 9, temperature=0.5, top_p=0.9),
        ImageRequest("a red circle", 4, prefix_codes=prefix),
        ImageRequest("a red circle", 4, guidance_scale=1.5),
    ]
    alone = np.concatenate([codes_of(model, [request], batch_size=1) for request in requests])
    np.testing.assert_array_equal(alone[0], alone[5])
    np.testing.assert_array_equal(alone[4, :16], prefix)
    assert len(np.unique(alone, axis=0)) == 5
    for batch_size in (2, 4):
        np.testing.assert_array_equal(codes_of(model, requests, batch_size=batch_size), alone)
        by_rows = codes_of(model, requests, batch_size=batch_size, on_preview=lambda images: None)
        np.testing.assert_array_equal(by_rows, alone)
    faster = codes_of(model, requests, SamplingConfig(draft_len=4), batch_size=2)
    np.testing.assert_array_equal(faster, alone)


def test_a_prompt_is_tokenized_once(model, monkeypatch):
    """For its check, its images and the count of its dropped tokens."""
    calls = []
    encode = type(model.text).encode_counted

    def counted(self, caption, **options):
        calls.append(caption)
        return encode(self, caption, **options)

    monkeypatch.setattr(type(model.text), "encode_counted", counted)
    model = dataclasses.replace(model)
    assert model.num_dropped_tokens("a red circle") == 0
    codes_of(model, [ImageRequest(text, seed) for text in ("a red circle", "a star") for seed in (0, 1, 2)])
    assert calls == ["a red circle", "a star"]


@pytest.mark.parametrize(
    ("captions", "copies", "batch_size", "want"),
    [(1, 1, 8, (1, 1)), (9, 1, 8, (8, 1)), (9, 3, 8, (2, 3)), (1, 16, 8, (1, 8)), (5, 9, 8, (1, 5))],
)
def test_batch_shape(captions, copies, batch_size, want):
    assert text_to_image.text_to_image_batch_shape(captions, copies, batch_size) == want


@pytest.mark.parametrize("count", [0, -1])
def test_no_rows_are_refused(tokenizer, count):
    with pytest.raises(ValueError, match=f"Expected count of at least 1, got {count}"):
        metrics.measure_tokenizer(tokenizer, DATA, count)


@pytest.mark.parametrize(
    ("requests", "options", "match"),
    [
        ([], {}, "Expected at least one request, got none"),
        ([ImageRequest("a")], {"batch_size": 0}, "Expected batch_size of at least 1, got 0"),
        ([ImageRequest("a", label=1)], {}, "Expected requests without label for a Transformer"),
        ([ImageRequest("a", prefix_codes=np.zeros(64, np.int32))], {}, "of fewer than 64 integers"),
        (
            [ImageRequest("a", prefix_codes=np.full(3, 99))],
            {},
            r"Expected prefix_codes in \[0, 16\), got codes from 99 to 99",
        ),
    ],
)
def test_requests_that_are_not_valid(model, requests, options, match):
    """They are refused by the call, before any image is asked for."""
    with pytest.raises(ValueError, match=match):
        model.sample(requests, **options)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seed": 2**32}, r"Expected an integer seed in \[0, 2\*\*32\)"),
        ({"temperature": -1.0}, "Expected temperature of at least 0, got -1.0. Use 0"),
        ({"top_p": 0.0}, r"Expected top_p in \(0, 1\], got 0.0"),
        ({"guidance_scale": -1.0}, "Expected guidance_scale of at least 0, got -1.0"),
    ],
)
def test_settings_that_are_not_valid(settings, match):
    with pytest.raises(ValueError, match=match):
        ImageRequest("a", **settings)


def test_a_table_for_people():
    assert metrics.format_metrics({"psnr": 27.123456, "step": 20}) == "psnr  27.12\nstep  20"
