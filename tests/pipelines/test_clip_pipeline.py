"""Tests of CLIP: scores, re-ranking, retrieval and classification by hand, the command line, and training."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_line import json_of, refused, run

from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import (
    ClipConfig,
    DalleConfig,
    DataConfig,
    DVAEConfig,
    ScenesSource,
    TextConfig,
    TowerConfig,
    TrainConfig,
    to_json,
)
from dalle_jax.data import images
from dalle_jax.data.scenes import generator
from dalle_jax.evaluate import metrics, reranking, retrieval
from dalle_jax.models import clip as clips
from dalle_jax.models import dalle, dvae
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.pipelines import (
    ClipPipeline,
    GeneratedImage,
    ImageRequest,
    TextToImagePipeline,
    load,
    sample_and_rerank,
)
from dalle_jax.text import tokenizers
from dalle_jax.train import loop
from dalle_jax.train.tasks import make_task

SIZE = 32
DATA = DataConfig(source=ScenesSource(count=40, max_objects=1), batch_size=8, num_threads=1, prefetch=1)
DVAE = DVAEConfig(image_size=SIZE, groups=3, blocks=1, width=8, decoder_width=8, vocab=16)
DALLE = DalleConfig(
    text_vocab=400,
    text_len=8,
    image_vocab=16,
    grid=8,
    dim=16,
    layers=1,
    heads=2,
    dtype="float32",
    remat="none",
)
CLIP = ClipConfig(
    image_size=32, patch_size=16, vision=TowerConfig(dim=16, layers=1, heads=2), text_vocab=402, text_len=10,
    embed_dim=8,
    text=TowerConfig(dim=16, layers=1, heads=2), dtype="float32",
)  # fmt: skip
CAPTIONS = ["a red circle", "蓝色的方块", "a green star"]


def random_params(init, cfg, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    return jax.tree.map(lambda s: np.asarray(0.4 * rng.normal(size=s.shape), np.float32), shapes)


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Exported runs with random weights: `dalle` with its tokenizer, and `clip`."""
    run_dirs = tmp_path_factory.mktemp("clip")
    for name, model, init in (("dalle", DALLE, dalle.init), ("clip", CLIP, clips.init)):
        (run_dirs / name).mkdir()
        tokenizers.train_text_tokenizer(
            [c.text for c, _ in generator.generate_evaluation_set("one_object", 60)],
            run_dirs / name / "text_tokenizer.model",
            vocab=400,
        )
        write_params(run_dirs / name / PARAMS_FILE, random_params(init, model, 1), 7)
        (run_dirs / name / "config.json").write_text(to_json(TrainConfig(model=model, data=DATA)))
    tokenizer = random_params(dvae.init, DVAE, 2)
    write_run(run_dirs / "dalle" / "image_tokenizer", TrainConfig(model=DVAE, data=DATA), tokenizer)
    return run_dirs


@pytest.fixture(scope="module")
def model(run_dirs):
    return load(run_dirs / "dalle", TextToImagePipeline)


@pytest.fixture(scope="module")
def clip(run_dirs):
    return load(run_dirs / "clip", ClipPipeline)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    for module in (metrics, reranking, retrieval):
        monkeypatch.setattr(module, "EVAL_ROWS", 8)


def noise(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


# --- captions with begin and end tokens -------------------------------------------------------------------


def test_captions_have_begin_and_end_tokens(clip):
    options = {"text_vocab": 402, "text_len": 10}
    ids = clip.text.encode("a red circle", **options)
    inside = ids[1:].tolist().index(401)
    assert ids[0] == 400 and (ids[1 + inside :] == 401).all()
    assert clip.text.decode(ids[1 : 1 + inside]) == "a red circle"
    long = clip.text.encode("a red circle " * 9, **options)  # truncated, but with the end token
    assert long[-1] == 401 and (long[1:-1] < 400).all()
    assert clip.text.encode("", **options).tolist() == [400] + [401] * 9
    with pytest.raises(ValueError, match=r"beside a start and an end in text_vocab 300, got \d+\. Raise"):
        clip.text.encode("a", text_vocab=300, text_len=10)


def test_begin_and_end_are_the_last_ids_of_clips_vocabulary():
    """512 letters and no merge: begin 512, end 513. They are the last two of the published 49,408 as well."""
    pairs = tokenizers.BosEosTokenizer(b'"bpe #version: 0.2\n')
    assert (pairs.vocab_size, pairs.num_used_ids) == (514, 512)
    assert pairs.encode("a", text_vocab=514, text_len=4).tolist() == [512, 320, 513, 513]


# --- scores and ranks --------------------------------------------------------------------------------------


def test_scores_equal_the_similarity_of_the_model(clip):
    image_batch, captions = noise(5), [*CAPTIONS, CAPTIONS[0], CAPTIONS[2]]
    ids = np.stack([clip.text.encode(c, text_vocab=402, text_len=10) for c in captions])
    want = jax.jit(clips.similarity, static_argnums=0)(
        CLIP, clip.run.params, image_batch / np.float32(255), ids
    )
    np.testing.assert_allclose(clip.score(image_batch, captions), want, atol=1e-5)
    np.testing.assert_allclose(
        clip.embed_images(image_batch, batch_size=2), clip.embed_images(image_batch), atol=1e-6
    )
    which, best = clip.rerank(image_batch[:4].reshape(2, 2, SIZE, SIZE, 3), CAPTIONS[:2], 2)
    each = clip.score(image_batch[:4], [CAPTIONS[0]] * 2 + [CAPTIONS[1]] * 2).reshape(2, 2)
    np.testing.assert_array_equal(which, np.argsort(-each, axis=1))
    assert (np.diff(best, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda c: c.score(noise(2), ["a"]),
            "Expected one caption for each image, got 2 images and 1 captions",
        ),
        (lambda c: c.embed_images(noise(2) / 255), "Expected images uint8 .*, got float64"),
        (lambda c: c.embed_images(noise(2)[0]), r"Expected images uint8 \(rows, height, width, 3\)"),
        (lambda c: c.embed_captions([]), "Expected at least one caption"),
        (lambda c: c.rerank(noise(2), ["a", "b"], 1), r"of shape \(2, candidates, height, width, 3\)"),
        (lambda c: c.rerank(noise(2)[None], ["a"], 3), r"Expected top in \[1, 2\], .* got 3"),
    ],
)
def test_invalid_input_of_ranking_is_rejected(clip, call, match):
    with pytest.raises(ValueError, match=match):
        call(clip)


def test_reranking_returns_the_best_candidates(model, clip):
    """With any batch size, also one that splits the candidates of a caption."""
    requests = [ImageRequest(caption, seed) for caption, seed in zip(CAPTIONS, (10, 20, 30), strict=True)]
    every = [ImageRequest(request.prompt, request.seed + i) for request in requests for i in range(3)]
    candidates = list(model.sample(every, batch_size=9))
    images_RHWC = np.stack([image.image for image in candidates])
    each = clip.score(images_RHWC, [request.prompt for request in every]).reshape(3, 3)
    assert len({image.codes.tobytes() for image in candidates}) == 9
    for batch_size in (9, 2):
        result = list(sample_and_rerank(model, clip, requests, 3, 2, batch_size=batch_size))
        assert len(result) == 3
        for i, best in enumerate(result):
            want = np.argsort(-each[i])[:2]
            assert [image.request.seed for image in best] == [requests[i].seed + k for k in want]
            np.testing.assert_allclose([image.score for image in best], each[i][want], atol=1e-5)
            for image, k in zip(best, want, strict=True):
                np.testing.assert_array_equal(image.codes, candidates[3 * i + k].codes)
                np.testing.assert_array_equal(image.image, candidates[3 * i + k].image)


@pytest.mark.parametrize(
    ("prompt", "top", "match"),
    [
        (" ", 1, "captions with text .* got none in caption 0"),
        ("a", 4, r"Expected top in \[1, 3\], .* got 4"),
        ("a", 0, r"Expected top in \[1, 3\], .* got 0"),
    ],
)
def test_reranking_rejects_invalid_input_before_sampling(model, clip, prompt, top, match):
    with pytest.raises(ValueError, match=match):
        sample_and_rerank(model, clip, [ImageRequest(prompt)], 3, top)


# --- recalls, classes, best of n: by hand ------------------------------------------------------------------


def test_ranks_by_hand():
    score = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    correct = np.array([[True, False, False], [False, False, True], [False, True, False]])
    assert retrieval.retrieval_ranks(score, correct).tolist() == [0, 2, 2]  # ties count against
    assert retrieval.retrieval_ranks(score, correct | np.array([[False, True, False]] * 3)).tolist() == [
        0,
        1,
        2,
    ]
    assert retrieval.recall_at_k("x", np.array([0, 2, 5, 9]), 10) == {"x_recall_1": 0.25, "x_recall_5": 0.5}


class Rows:
    """Four images; the first two have a caption in common."""

    classes = ("cat", "dog")

    def __len__(self):
        return 4

    def image(self, i, size, crop, rng=None):
        return np.full((size, size, 3), i, np.uint8)

    def captions(self, i):
        return {"en": ("shared" if i < 2 else f"own {i}",), "zh": (f"zh {i}",)}

    def label(self, i):
        return (0, 1, 1, None)[i]


def test_retrieval_of_a_perfect_and_a_constant_model(monkeypatch, clip):
    monkeypatch.setattr(retrieval, "open_source", lambda *_, **__: Rows())
    axes = np.eye(4)
    embeddings = {"shared": axes[0] + axes[1], "own 2": axes[2], "own 3": axes[3]} | {
        f"zh {i}": axes[i] for i in range(4)
    }
    monkeypatch.setattr(ClipPipeline, "embed_images", lambda self, x, **_: axes[x[:, 0, 0, 0]])
    monkeypatch.setattr(
        ClipPipeline, "embed_captions", lambda self, texts, **_: np.stack([embeddings[t] for t in texts])
    )
    result = retrieval.measure_retrieval(clip, DATA, 9)
    assert (result["images"], result["texts"]) == (4, 7)
    assert result["image_to_text_recall_1"] == result["text_to_image_recall_1"] == 1.0
    monkeypatch.setattr(ClipPipeline, "embed_captions", lambda self, texts, **_: np.ones((len(texts), 4)))
    result = retrieval.measure_retrieval(clip, DATA, 9)
    assert result["image_to_text_recall_1"] == result["text_to_image_recall_1"] == 0.0


def test_zero_shot_classification_by_hand(monkeypatch, clip):
    captions_embedded = []

    def captions(clip, texts, **_):
        captions_embedded.extend(texts)
        return np.array(
            [[1.0, 0.0] if "cat" in t else [0.0, 1.0] if "photo" in t else [0.6, 0.8] for t in texts]
        )

    monkeypatch.setattr(retrieval, "open_source", lambda *_, **__: Rows())
    monkeypatch.setattr(ClipPipeline, "embed_captions", captions)
    monkeypatch.setattr(ClipPipeline, "embed_images", lambda self, x, **_: np.eye(2)[x[:, 0, 0, 0] % 2])
    vectors = retrieval.class_embeddings(clip, ["cat", "dog"], ["a photo of a {}", "{}"])
    assert captions_embedded == ["a photo of a cat", "cat", "a photo of a dog", "dog"]
    mean = np.array([0.3, 0.9])
    np.testing.assert_allclose(vectors, [[1, 0], mean / np.linalg.norm(mean)])
    data = SimpleNamespace(source=SimpleNamespace(templates=("{}",)), crop="center")
    result = retrieval.measure_zero_shot(
        clip, data, 9
    )  # rows 0 (cat) and 1 (dog) are correct, row 2 (dog) is classified as cat
    assert result == {"zero_shot_top1": pytest.approx(2 / 3), "classes": 2}
    with pytest.raises(ValueError, match=r"each with \{\} for the name"):
        retrieval.class_embeddings(clip, ["cat"], ["a photo"])


def test_classes_of_scenes_are_color_and_shape(monkeypatch, clip):
    """A model that finds the true pair has accuracy 1, also for held-out pairs."""
    index: dict[str, int] = {}

    def captions(clip, texts, **_):
        return np.eye(200)[[index.setdefault(t, len(index)) for t in texts]]

    def image_batch(clip, x, **_):
        kind = kinds.pop(0)
        objects = [scene.objects[0] for _, scene in metrics.unseen_captions(DATA, kind, len(x))]
        return np.eye(200)[[index[f"a {o.color} {o.shape}"] for o in objects]]

    monkeypatch.setattr(ClipPipeline, "embed_captions", captions)
    monkeypatch.setattr(ClipPipeline, "embed_images", image_batch)
    kinds = ["one_object", "held_out"]
    result = retrieval.measure_zero_shot(clip, DATA, 6)
    assert result == {
        "zero_shot_one_object_top1": 1.0, "zero_shot_one_object_top5": 1.0, "zero_shot_held_out_top1": 1.0,
        "zero_shot_held_out_top5": 1.0, "classes": 120,
    }  # fmt: skip


def test_best_of_by_hand():
    score = np.array([[0.1, 0.4, 0.3, 0.2], [0.5, 0.6, 0.7, 0.8]])
    correct = np.array([[0, 1, 0, 0], [1, 0, 0, 1]], bool)
    assert reranking.best_of(score, correct, 1) == 3 / 8
    assert reranking.best_of(score, correct, 2) == (1 + 0 + 0 + 1) / 4
    assert reranking.best_of(score, correct, 3) == (1 + 0) / 2  # one group of three; the fourth is not used
    assert reranking.best_of(score, correct, 4) == 1.0
    assert reranking.best_of(-score, correct, 4) == 0.5
    with pytest.raises(ValueError, match=r"Expected n in \[1, 4\], .* got 5"):
        reranking.best_of(score, correct, 5)
    assert [reranking.candidate_counts(n) for n in (1, 3, 4, 64, 100)] == [
        [1], [1, 3], [1, 4], [1, 4, 16, 64], [1, 4, 16, 64, 100]
    ]  # fmt: skip


def test_reranking_accuracy_by_hand(monkeypatch, model, clip):
    """One candidate in four is the true image. A perfect score always selects it, the negated score never."""
    kind, count = "one_object", 6
    pairs = metrics.unseen_captions(DATA, kind, count)
    true = [generator.render_scene(scene, SIZE) for _, scene in pairs]
    blank = np.full((SIZE, SIZE, 3), 255, np.uint8)

    def sample(self, requests, config=None, **_):
        images = [true[i // 4] if i % 4 == 2 else blank for i in range(len(requests))]
        return (GeneratedImage(image, request) for image, request in zip(images, requests, strict=True))

    monkeypatch.setattr(TextToImagePipeline, "sample", sample)
    monkeypatch.setattr(reranking, "scene_kinds", lambda *_: (kind,))
    for sign, best in ((1, 1.0), (-1, 0.0)):
        monkeypatch.setattr(
            ClipPipeline,
            "score",
            lambda self, x, captions, sign=sign: np.array([-sign * p.mean() for p in x]),
        )
        result = reranking.measure_reranking(model, clip, count, 4)
        assert result == {
            f"accuracy_{kind}_best_of_1": 0.25, f"accuracy_{kind}_best_of_4": best, f"accuracy_{kind}_any_of_4": 1.0
        }  # fmt: skip
    with pytest.raises(ValueError, match="Expected candidates of at least 1, got 0"):
        reranking.measure_reranking(model, clip, count, 0)


# --- the command line --------------------------------------------------------------------------------------


def test_sample_writes_the_best_candidates(run_dirs, tmp_path, clip):
    """Each image equals the one sampled with its seed alone, and has the highest scores of all candidates."""
    argv = ("sample", run_dirs / "dalle", *CAPTIONS[:2], "--seed", 5)
    every = json_of(*argv, "--num-images", 3, "--out", tmp_path / "all")["images"]
    result = json_of(
        *argv, "--clip", run_dirs / "clip", "--candidates", 3, "--top", 2, "--out", tmp_path / "best"
    )
    assert result["candidates"] == 3 and result["clip"] == str(run_dirs / "clip")
    by_seed = {(row["caption"], row["seed"]): Path(row["file"]) for row in every}
    sampled = {key: images.load_image(file, SIZE) for key, file in by_seed.items()}
    score = {key: float(clip.score(image[None], [key[0]])[0]) for key, image in sampled.items()}
    for caption in CAPTIONS[:2]:
        rows = [row for row in result["images"] if row["caption"] == caption]
        best = sorted((key for key in score if key[0] == caption), key=lambda key: -score[key])[:2]
        assert [row["seed"] for row in rows] == [seed for _, seed in best]
        for row in rows:
            key = (caption, row["seed"])
            np.testing.assert_array_equal(images.load_image(row["file"], SIZE), sampled[key])
            assert row["score"] == pytest.approx(score[key], abs=1e-5)
    names = [Path(row["file"]).name for row in result["images"]]
    assert {p.name for p in (tmp_path / "best").iterdir()} == {
        *names,
        "grid.png",
        "codes.npz",
        "manifest.jsonl",
    }
    assert np.load(tmp_path / "best" / "codes.npz")["codes"].shape == (4, 64)


def test_invalid_flags_of_sample_are_rejected(run_dirs, tmp_path):
    one = ("sample", run_dirs / "dalle", "a", "--out", tmp_path / "o")
    ranked = (*one, "--clip", run_dirs / "clip")
    assert "Expected --clip with --candidates and --top, got none" in refused(*one, "--top", 2)
    assert "Expected no --num-images with --clip" in refused(*ranked, "--num-images", 2)
    assert "Expected top in [1, 2], the candidates of a caption, got 3" in refused(
        *ranked, "--candidates", 2, "--top", 3
    )
    assert "Expected --candidates of at least 1, got 0" in refused(*ranked, "--candidates", 0)
    assert (
        f"Expected the run of a CLIP, as configs/demo_clip.py trains it, got {run_dirs / 'dalle'}"
        in refused(*one, "--clip", run_dirs / "dalle")
    )
    empty = (
        "sample",
        run_dirs / "dalle",
        "--unconditional",
        "--out",
        tmp_path / "o",
        "--clip",
        run_dirs / "clip",
    )
    assert "captions with text to rank images by, got none in caption 0" in refused(*empty)
    assert "of stage clip, which ranks them. Use the run of a Transformer" in refused(
        "sample", run_dirs / "clip", "a"
    )
    assert f"Expected a run with an image tokenizer, got {run_dirs / 'clip'} of stage clip" in refused(
        "encode", run_dirs / "clip", "a.png", "--out", "x"
    )


def test_a_clip_that_does_not_fit_is_rejected_before_sampling(run_dirs, tmp_path, monkeypatch):
    """A vocabulary of 400 pieces in a CLIP with room for 298. A caption that its 10 positions cut is a warning."""
    small = dataclasses.replace(CLIP, text_vocab=300)
    write_run(tmp_path / "small", TrainConfig(model=small, data=DATA), random_params(clips.init, small, 1))
    shutil.copy(run_dirs / "clip" / "text_tokenizer.model", tmp_path / "small")
    call = ("sample", run_dirs / "dalle", "a red circle " * 9, "--candidates", 1, "--out", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "_generate", lambda *_: pytest.fail("an image was sampled"))
        assert "Expected at most 298 pieces in " in refused(*call, "--clip", tmp_path / "small")
    assert not (tmp_path / "o").exists()
    assert "caption 0 is too long for the CLIP" in run(*call, "--clip", run_dirs / "clip").err


def test_rerank_lists_the_best_first(run_dirs, tmp_path, clip):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(paths, noise(4, 20), strict=True):
        images.save_png(path, image)
    result = json_of("rerank", run_dirs / "clip", "a red circle", *paths, "--top", 3)["images"]
    image_batch = np.stack([images.load_image(path, 32) for path in paths])
    want = clip.score(image_batch, ["a red circle"] * 4)
    order = np.argsort(-want)[:3]
    assert [row["file"] for row in result] == [str(paths[i]) for i in order]
    np.testing.assert_allclose([row["score"] for row in result], want[order], atol=1e-5)
    listed = run("rerank", run_dirs / "clip", "a red circle", *paths).out.splitlines()
    assert len(listed) == 4 and listed[0].endswith(str(paths[order[0]]))
    assert "Expected at least one image file" in refused("rerank", run_dirs / "clip", "a")
    assert "Expected a caption with text to rank the images by, got none" in refused(
        "rerank", run_dirs / "clip", " ", paths[0]
    )
    assert "Expected --top in [1, 1], the number of images, got 2" in refused(
        "rerank", run_dirs / "clip", "a", paths[0], "--top", 2
    )
    assert "Cannot read the image" in refused("rerank", run_dirs / "clip", "a", tmp_path / "none.png")
    message = refused("rerank", run_dirs / "dalle", "a", paths[0])
    assert f"trains it, got {run_dirs / 'dalle'} of stage dalle" in message


def test_evaluate_a_clip(run_dirs, tmp_path):
    result = json_of("evaluate", run_dirs / "clip", "--count", 9)
    assert result["stage"] == "clip" and result["images"] == 9 and result["step"] == 7
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= result[f"{direction}_recall_1"] <= result[f"{direction}_recall_5"] <= 1
    for i, image in enumerate(noise(6)):
        images.save_png(tmp_path / "labeled" / "val" / ("cat", "dog")[i % 2] / f"{i}.png", image)
    options = ("--data", tmp_path / "labeled", "--templates", "a {}", "{} there", "--count", 6)
    result = json_of("evaluate", run_dirs / "clip", *options)
    assert result["classes"] == 2 and 0 <= result["zero_shot_top1"] <= 1
    assert result["images"] == 6 and result["texts"] == 2
    assert "got nothing at" in refused("evaluate", run_dirs / "clip", "--data", tmp_path / "no ne")
    assert "--templates" in refused("evaluate", run_dirs / "dalle", "--templates", "a {}", code=2)
    assert "Expected --clip with --candidates, got none" in refused(
        "evaluate", run_dirs / "dalle", "--candidates", 4
    )
    assert "--clip" in refused("evaluate", run_dirs / "clip", "--clip", run_dirs / "clip", code=2)


def test_evaluate_with_a_clip_adds_its_metrics(run_dirs):
    options = ("--count", 2, "--candidates", 4, "--clip", run_dirs / "clip")
    result = json_of("evaluate", run_dirs / "dalle", *options)
    assert -1 <= result["clip_score"] <= 1 and -1 <= result["clip_score_true"] <= 1
    for n in (1, 4):
        assert 0 <= result[f"accuracy_one_object_best_of_{n}"] <= result["accuracy_one_object_any_of_4"] <= 1


# --- training ----------------------------------------------------------------------------------------------


def test_a_trained_clip_equals_its_export(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))  # compiles faster
    config = TrainConfig(
        model=CLIP, run=str(tmp_path / "run"), data=DATA, text=TextConfig(num_train_captions=40, bpe_dropout=0.0),
        steps=2, eval_every=2, save_every=2, sample_every=2, eval_rows=8, log_every=1,
    )  # fmt: skip
    outcome = loop.train(config)
    assert outcome.finished and set(outcome.metrics) == {
        "eval_loss",
        "eval_image_to_text",
        "eval_text_to_image",
    }
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()
    clip = load(tmp_path / "run", ClipPipeline)
    assert clip.run.step == 2 and len(clip.score(noise(1), ["a red circle"])) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(8), abs=1.5) and first["scale"] == pytest.approx(
        1 / 0.07, rel=1e-3
    )
    assert run("export", tmp_path / "run", "--out", tmp_path / "out").code == 0
    again = load(tmp_path / "out", ClipPipeline)
    jax.tree.map(np.testing.assert_array_equal, clip.run.params, again.run.params)
    np.testing.assert_array_equal(again.score(noise(3), CAPTIONS), clip.score(noise(3), CAPTIONS))
    assert read_run_config(tmp_path / "out").model == CLIP and load_run(tmp_path / "out", "clip").step == 2
    assert load(str(tmp_path / "out"), ClipPipeline).config == CLIP


def test_every_second_image_is_reconstructed_by_the_tokenizer(run_dirs, tmp_path):
    """With a tokenizer the loss equals that of a batch whose rows 1, 3, ... were encoded and decoded."""
    tokenizer = random_params(dvae.init, DVAE, 2)
    (tmp_path / "dvae").mkdir()
    write_params(tmp_path / "dvae" / PARAMS_FILE, tokenizer, 1)
    (tmp_path / "dvae" / "config.json").write_text(to_json(TrainConfig(model=DVAE, data=DATA)))
    config = TrainConfig(
        model=CLIP, run=str(tmp_path / "run"), data=DATA, image_tokenizer=str(tmp_path / "dvae"),
        text=TextConfig(tokenizer_path=str(run_dirs / "clip" / "text_tokenizer.model")),
    )  # fmt: skip
    task = make_task(config)
    (tmp_path / "run").mkdir()
    task.prepare(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(task.frozen), tokenizer)
    params, pixels = random_params(clips.init, CLIP, 1), noise(4)
    text_BT = np.stack(
        [task.text_tokenizer.encode(c, text_vocab=402, text_len=10) for c in [*CAPTIONS, "a dot"]]
    )
    expected_images = images.to_float(pixels)
    expected_images[1::2] = dvae.decode(DVAE, tokenizer, dvae.encode(DVAE, tokenizer, expected_images[1::2]))
    assert np.abs(expected_images[1::2] - images.to_float(pixels)[1::2]).max() > 0.1
    got, _ = task.loss(params, task.frozen, {"image": pixels, "text": text_BT}, None, None)
    np.testing.assert_allclose(got, clips.loss(CLIP, params, expected_images, text_BT)[0], rtol=1e-6)
    large = dataclasses.replace(DVAE, image_size=64)
    for model, match in (
        (CLIP, r"Expected the run of an image tokenizer \(dvae, vqgan\), got .* of stage clip"),
        (large, r"Expected model\.image_size 64, that of the image tokenizer, got 32"),
    ):
        (tmp_path / "dvae" / "config.json").write_text(to_json(TrainConfig(model=model, data=DATA)))
        with pytest.raises(ValueError, match=match):
            make_task(config).check_prerequisites()


def test_a_vocabulary_without_an_id_for_the_end_is_rejected(run_dirs, tmp_path):
    small = ClipConfig(**{**vars(CLIP), "text_vocab": 300})
    config = TrainConfig(
        model=small,
        run=str(tmp_path / "run"),
        data=DATA,
        text=TextConfig(tokenizer_path=str(run_dirs / "clip" / "text_tokenizer.model")),
    )
    with pytest.raises(ValueError, match=r"at most 298 pieces .*Raise text_vocab to"):
        loop.train(config)
