"""The command line: every verb on a tiny pair of trained runs, and every kind of bad input."""

import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.cli import COMMANDS, demo, main, sample_file
from dalle_jax.config import (
    ArraysSource,
    DalleConfig,
    DataConfig,
    DVAEConfig,
    FolderSource,
    OptimConfig,
    ScenesSource,
    Schedule,
    TextConfig,
    TrainConfig,
    to_json,
)
from dalle_jax.data import images
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.loader.pipeline import eval_batch, open_train_source
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import classifier, fid, inception, metrics
from dalle_jax.models import dvae
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.pipelines import (
    SamplingConfig,
    decode_codes,
    encode_images,
    load_image_tokenizer,
    load_text_to_image,
    loading,
    text_to_image,
)
from dalle_jax.sampling.batcher import SamplingRequest
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.train import loop
from dalle_jax.train.tasks import make_task

GRID, VOCAB, TEXT_LEN, SIZE = 8, 32, 24, 32
ENCODE, DECODE = (jax.jit(f, static_argnums=0) for f in (dvae.encode, dvae.decode))
GUIDED = ("--guidance-scale", 100)  # so that a model of two updates tells captions apart


def run(*argv) -> SimpleNamespace:
    """One call of the command: `code`, `out`, `err`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def json_of(*argv) -> dict:
    """What `--json` prints; standard output holds one line and nothing else."""
    done = run(*argv, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def refused(*argv, code=1) -> str:
    """The message of a call that must fail; standard output stays empty."""
    done = run(*argv)
    assert done.code == code and done.out == "" and "Traceback" not in done.err, (done.code, done.err)
    return done.err


def tiny_dvae(out="runs/demo") -> TrainConfig:
    return TrainConfig(
        run=f"{out}/dvae",
        model=DVAEConfig(
            image_size=SIZE, groups=3, blocks=1, width=8, decoder_width=8, vocab=VOCAB,
            tau=Schedule(start=1.0, end=0.5, steps=2), kl_weight=Schedule(start=0.0, end=0.0, steps=0),
        ),
        data=DataConfig(batch_size=8, source=ScenesSource(count=40, max_objects=2)),
        optim=OptimConfig(warmup_steps=1, ema_every=1),
        steps=2, eval_every=2, save_every=2, sample_every=100, eval_rows=8,
    )  # fmt: skip


def tiny_dalle(out="runs/demo") -> TrainConfig:
    return TrainConfig(
        run=f"{out}/dalle",
        image_tokenizer=f"{out}/dvae",
        model=DalleConfig(
            text_vocab=512, text_len=TEXT_LEN, image_vocab=VOCAB, grid=GRID, dim=16, layers=1, heads=2,
            dtype="float32", remat="none",
        ),
        data=DataConfig(batch_size=8, source=ScenesSource(count=40, max_objects=2)),
        text=TextConfig(num_train_captions=40),
        optim=OptimConfig(learning_rate=0.05, warmup_steps=0, ema_every=1),
        steps=2, eval_every=2, save_every=2, sample_every=100, eval_rows=8,
    )  # fmt: skip


def tiny_config(name: str) -> TrainConfig:
    """In place of `load_config`."""
    return {"demo_dvae": tiny_dvae, "demo_dalle": tiny_dalle}[name]()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What `dalle-jax demo` makes with the tiny configurations; `first` is what that call printed."""
    out = tmp_path_factory.mktemp("cli") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_config", tiny_config)
        patch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))  # compiles faster
        patch.setattr(metrics, "EVAL_ROWS", 8)
        first = json_of("demo", "--out", out, "--count", 4)
    return SimpleNamespace(out=out, dvae=out / "dvae", dalle=out / "dalle", first=first)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(metrics, "EVAL_ROWS", 8)  # that of `sample`: one program for both


@pytest.fixture
def pictures(tmp_path):
    """Three PNG files of the model's size."""
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"picture_{i}.png")
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        images.save_png(paths[-1], noise.repeat(8, axis=0).repeat(8, axis=1))
    return paths


# --- one's own pictures -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures with a caption each, beside them."""
    for i in range(12):
        images.save_png(tmp_path / "mine" / f"{i}.png", np.full((40, 40, 3), 20 * i, np.uint8))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"grey of {i}")
    return tmp_path / "mine"


def finetune(made, folder, *more):
    config = Path(__file__).parents[2] / "configs" / "finetune.py"
    return run(
        "train", config, "--init-from", made.dalle, "--data.path", folder, "--run", folder.parent / "run",
        "--data.batch-size", 8, "--data.source.eval-fraction", 0.2, "--steps", 1, "--eval-rows", 8,
        "--optim.learning-rate", 1e-9, *more,
    )  # fmt: skip


def test_finetuning_begins_with_the_weights_of_the_other_run(made, folder):
    done = finetune(made, folder)
    assert done.code == 0, done.err
    old, new = load_run(made.dalle), load_run(folder.parent / "run", ema=False)
    assert new.config.model == old.config.model and new.config.data.source.kind == "folder"
    for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("text_tokenizer.model", "image_tokenizer/config.json"):
        assert (new.path / name).read_bytes() == (made.dalle / name).read_bytes()
    assert load_image_tokenizer(new.path).fingerprint == load_image_tokenizer(made.dalle).fingerprint
    assert finetune(made, folder).code == 0  # has its step already


def test_finetuning_from_what_does_not_fit(made, folder):
    for more, message in (
        (("--init-from", made.dvae), "is a run of stage dvae, this configuration of stage dalle"),
        (("--init-from", "nowhere"), "no run directory nowhere"),
        (("--model.dim", "32"), "parameter .* has shape .*Keep the fields of `model`"),
        (("--data.path", "no where"), "got nothing at 'no where'"),
    ):
        done = finetune(made, folder, *more)
        assert done.code == 1 and re.search(message, done.err), done.err


def test_data_tells_what_a_folder_holds_and_builds_a_tfds_set(folder, tmp_path):
    (folder / "2.png").write_bytes(b"")
    told = json_of("data", folder)
    splits = told["splits"]
    assert told["kind"] == "folder" and sum(s["rows"] for s in splits.values()) == 12
    assert Counter(splits["train"]["unusable"]) + Counter(splits["eval"]["unusable"]) == {
        "empty image file": 1
    }
    built = json_of("data", folder, "--convert-to", "tfds", "--out", tmp_path / "sets", "--size", 16)["built"]
    again = json_of("data", built)
    assert again["kind"] == "tfds" and again["splits"]["train"]["unusable"] == {}
    assert again["splits"]["train"]["rows"] in (10, 11)  # the empty picture is in one of the splits
    assert "--convert-to and --out go together" in refused("data", folder, "--convert-to", "tfds")
    assert "got nothing at" in refused("data", "no where")


def test_data_and_text_take_a_configuration_with_a_mixture_and_a_run(made, folder, tmp_path):
    (folder / "2.png").write_bytes(b"no image")
    config = tmp_path / "mix.py"
    config.write_text(
        "from dalle_jax.config import *\n"
        f"parts = (FolderSource(path={str(folder)!r}, max_bad_fraction=0.0), ScenesSource(count=40, max_objects=1))\n"
        "source = MixtureSource(parts=parts, weights=(1, 1))\n"
        "config = TrainConfig(model=DVAEConfig(), data=DataConfig(source=source))\n"
    )
    told = json_of("data", config)
    assert told["kind"] == "mixture" and told["splits"]["train"]["captions"]["zh"] == 80  # the scenes'
    causes = Counter(told["splits"]["train"]["unusable"]) + Counter(told["splits"]["eval"]["unusable"])
    assert causes == {"not an image": 1}
    told = json_of("text", "train", config, "--out", tmp_path / "mix.model", "--vocab", 600)
    assert set(told["languages"]) == {"en", "zh"}
    told = json_of("data", made.dalle)
    assert told["kind"] == "scenes" and told["splits"]["train"]["rows"] == 40
    assert "no configuration file none.py" in refused("data", "none.py")


def test_duplicates_between_the_splits_are_told_and_shown(folder, tmp_path):
    for split in ("train", "val"):
        (folder / split).mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        (folder / f"{i}.png").unlink()
        images.save_png(folder / ("val" if i < 2 else "train") / f"{i}.png", noise)
    (folder / "val" / "again.png").write_bytes((folder / "train" / "7.png").read_bytes())
    Image.open(folder / "train" / "5.png").save(folder / "val" / "jpeg.jpg", quality=95)
    told = json_of("data", folder, "--duplicates", tmp_path / "report")
    assert told["duplicates"] == {
        "exact": 1, "near": 1, "training_duplicates": 2, "evaluation": 4, "training": 10
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "report" / "duplicates.jsonl").read_text().splitlines()]
    assert {(x["eval"], x["train"], x["exact"]) for x in lines} == {
        ("val/again.png", "train/7.png", True), ("val/jpeg.jpg", "train/5.png", False),
    }  # fmt: skip
    assert Image.open(tmp_path / "report" / "duplicates.png").width > 2 * 96
    for picture in (folder / "val").iterdir():
        picture.unlink()
    assert "no rows of split 'val'" in refused("data", folder, "--duplicates", tmp_path / "report")


def test_text_train_writes_a_vocabulary(folder, tmp_path):
    told = json_of(
        "text",
        "train",
        folder,
        "--out",
        tmp_path / "v" / "text_tokenizer.model",
        "--vocab",
        300,
        "--text-len",
        2,
    )
    assert TextTokenizer.load(tmp_path / "v" / "text_tokenizer.model").vocab_size == told["pieces"] <= 300
    assert set(told["languages"]) == {"en"} and told["languages"]["en"]["cut"] >= 1
    assert "too small" in refused("text", "train", folder, "--out", tmp_path / "x", "--vocab", 20)


# --- the command itself -----------------------------------------------------------------------------------


def test_help_names_every_verb_and_no_verb_is_an_error():
    for argv in (("--help",), ("-h",)):
        done = run(*argv)
        assert done.code == 0 and all(verb in done.out for verb in COMMANDS)
    assert "usage: dalle-jax COMMAND" in refused(code=2)


@pytest.mark.parametrize("verb", COMMANDS)
def test_each_verb_explains_itself(verb):
    done = run(verb, "--help")
    assert done.code == 0 and f"dalle-jax {verb}" in done.out and done.err == ""


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("smaple", "x"), "perhaps you meant 'sample'"),
        (("frobnicate",), "use one of demo, train, sample"),
        (("sample", "runs/x", "a", "--temprature", "1"), "--temperature"),
        (("info", "runs/x", "--jsn"), "--json"),
        (("sample", "runs/x", "a", "--num-images", "many"), "many"),
        (("decode", "runs/x", "codes.npz"), "--out"),
        (("train",), "usage: dalle-jax train"),
    ],
)
def test_a_command_that_is_not_understood(argv, told):
    assert told in refused(*argv, code=2)


# --- demo -------------------------------------------------------------------------------------------------


def test_demo_makes_its_pictures_and_figures(made):
    assert made.first["finished"]
    figures = made.first["figures"]
    for name in (
        "psnr",
        "codebook_use",
        "accuracy_one_object",
        "accuracy_two_objects",
        "accuracy_held_out",
        "loss",
    ):
        assert np.isfinite(figures[name]), name
    assert set(made.first["seconds"]) == {"tokenizer", "transformer", "measure"}
    for name in ("grid.png", "reconstructions.png"):
        assert Image.open(made.out / name).width > 500
    saved = json.loads((made.out / "results.json").read_text())
    assert saved["figures"] == figures


def test_demo_again_trains_and_measures_nothing(made, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(demo, "load_config", tiny_config)
    monkeypatch.setattr(demo.loop, "train", refuse)
    monkeypatch.setattr(demo, "_measure", refuse)
    assert json_of("demo", "--out", made.out, "--count", 4)["figures"] == made.first["figures"]
    done = run("demo", "--out", made.out, "--count", 4)
    assert "accuracy_held_out" in done.out and "dalle-jax sample" in done.out


def test_demo_stops_and_says_so_when_training_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_config", tiny_config)
    monkeypatch.setattr(demo.loop, "train", lambda config: SimpleNamespace(finished=False))
    done = run("demo", "--out", tmp_path, "--json")
    assert done.code == 0 and json.loads(done.out)["finished"] is False
    assert "run the same command to resume" in done.err


def test_the_demo_configurations_fit_together():
    tokenizer, transformer = demo.demo_configs(demo.DemoArgs(out="x", seed=3, transformer_steps=7))
    assert (tokenizer.run, transformer.run, transformer.image_tokenizer) == ("x/dvae", "x/dalle", "x/dvae")
    assert (transformer.seed, transformer.data.seed, transformer.steps) == (3, 3, 7)
    assert (transformer.model.grid, transformer.model.image_vocab) == (
        tokenizer.model.grid,
        tokenizer.model.vocab,
    )


# --- sample -----------------------------------------------------------------------------------------------


def codes_of(out) -> dict:
    with np.load(out / "codes.npz") as file:
        return dict(zip(file["names"].tolist(), file["codes"], strict=True))


def test_sample_writes_each_picture_and_a_grid(made, tmp_path):
    told = json_of(
        "sample",
        made.dalle,
        "a red circle",
        "一个红色的圆",
        "--num-images",
        2,
        "--seed",
        5,
        "--out",
        tmp_path,
    )
    assert [(p["caption"], p["seed"]) for p in told["pictures"]] == [
        ("a red circle", 5), ("a red circle", 6), ("一个红色的圆", 5), ("一个红色的圆", 6),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {
        "c000_s0005.png", "c000_s0006.png", "c001_s0005.png", "c001_s0006.png", "grid.png", "codes.npz",
    }  # fmt: skip
    assert Image.open(told["pictures"][3]["file"]).size == (SIZE, SIZE)
    model = load_text_to_image(made.dalle)
    codes = codes_of(tmp_path)["c001_s0006.png"]
    want = DECODE(model.tokenizer.config, model.tokenizer.params, jnp.asarray(codes)[None])[0]
    np.testing.assert_allclose(
        np.asarray(Image.open(told["pictures"][3]["file"])) / 255, want, atol=0.51 / 255
    )


def test_a_picture_depends_on_its_caption_and_seed_alone(made, tmp_path):
    """Alone, or among eleven others of other captions and seeds, in another place of another batch."""
    json_of(
        "sample",
        made.dalle,
        "a blue star",
        "--num-images",
        1,
        "--seed",
        2,
        *GUIDED,
        "--out",
        tmp_path / "alone",
    )
    many = ["", "a green heart", "一个红色的圆", "a blue star"]
    json_of("sample", made.dalle, *many, "--num-images", 3, "--seed", 1, *GUIDED, "--out", tmp_path / "many")
    alone, among = codes_of(tmp_path / "alone"), codes_of(tmp_path / "many")
    np.testing.assert_array_equal(alone["c000_s0002.png"], among["c003_s0002.png"])
    assert (tmp_path / "alone" / "c000_s0002.png").read_bytes() == (
        tmp_path / "many" / "c003_s0002.png"
    ).read_bytes()
    assert len({codes.tobytes() for codes in among.values()}) > 4  # and on both of them: 4 captions, 3 seeds


def test_sampling_twice_gives_the_same_files(made, tmp_path):
    for name in ("a", "b"):
        json_of(
            "sample",
            made.dalle,
            "a red cross",
            "--num-images",
            2,
            *GUIDED,
            "--out",
            tmp_path / name,
        )
    for name in ("c000_s0000.png", "c000_s0001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pictures_are_shown_as_they_are_drawn(made, tmp_path, monkeypatch):
    """Every three rows of codes a grid, its lower part grey; in the end the pictures are those of no showing."""
    call = ("sample", made.dalle, "a red cross", "a star", "--num-images", 1, *GUIDED)
    json_of(*call, "--out", tmp_path / "at_once")
    grids, save = [], images.save_png

    def kept(path, picture):
        if path.name == "grid.png":
            grids.append(np.asarray(picture))
        save(path, picture)

    monkeypatch.setattr(images, "save_png", kept)
    json_of(*call, "--preview-rows", 3, "--out", tmp_path / "shown")
    for name in ("c000_s0000.png", "c001_s0000.png", "grid.png"):
        assert (tmp_path / "at_once" / name).read_bytes() == (tmp_path / "shown" / name).read_bytes()
    final = np.asarray(Image.open(tmp_path / "shown" / "grid.png").convert("RGB"))
    scale, grey = 128 // SIZE, np.array([128, 128, 128])
    assert len(grids) == 4  # after 3 and 6 rows, all 8, and the pictures as they are kept
    for grid, rows in zip(grids, (3, 6), strict=False):
        first = grid[grid.shape[0] - final.shape[0] :][4 : 4 + SIZE * scale, 8:100]
        edge = rows * (SIZE // GRID) * scale
        assert (first[edge + 4 :] == grey).all() and (first[: edge - 4] != grey).any()
    np.testing.assert_array_equal(grids[-1], final)
    grids.clear()
    told = json_of(*call, "--preview-rows", 3, "--draft-len", 6, "--out", tmp_path / "faster")
    for name in ("c000_s0000.png", "c001_s0000.png", "grid.png"):
        assert (tmp_path / "at_once" / name).read_bytes() == (tmp_path / "faster" / name).read_bytes()
    assert len(grids) in (3, 4) and 1 <= told["codes_per_pass"] <= 6


def test_jacobi_draws_the_same_and_8_bits_nearly(made, tmp_path):
    call = ("sample", made.dalle, "a red cross", "--num-images", 2, "--temperature", 0.5, *GUIDED)
    plain = json_of(*call, "--out", tmp_path / "plain")
    faster = json_of(*call, "--draft-len", 6, "--out", tmp_path / "faster")
    assert "codes_per_pass" not in plain and 1 <= faster["codes_per_pass"] <= 6
    want = codes_of(tmp_path / "plain")
    for name, codes in codes_of(tmp_path / "faster").items():
        np.testing.assert_array_equal(codes, want[name])
    json_of(*call, "--draft-len", 6, "--quantization", "int8", "--out", tmp_path / "small")
    small = codes_of(tmp_path / "small")
    same = np.mean([small[name] == want[name] for name in want])
    assert same > 0.5  # of 32 codes; pictures drawn apart share a thirtieth


def test_guidance_one_is_none_and_top_k_one_is_greedy(made, tmp_path):
    calls = {
        "plain": (), "one": ("--guidance-scale", 1), "two": GUIDED,
        "greedy": ("--temperature", 0), "k": ("--top-k", 1), "p": ("--top-p", 1e-6),
    }  # fmt: skip
    found = {}
    for name, flags in calls.items():
        json_of("sample", made.dalle, "a red cross", "--num-images", 1, *flags, "--out", tmp_path / name)
        found[name] = codes_of(tmp_path / name)["c000_s0000.png"]
    np.testing.assert_array_equal(found["plain"], found["one"])
    np.testing.assert_array_equal(found["greedy"], found["k"])
    np.testing.assert_array_equal(found["greedy"], found["p"])
    assert (found["plain"] != found["two"]).any() and (found["plain"] != found["greedy"]).any()


@pytest.mark.parametrize("rows", [None, 3])
def test_prefix_rows_are_kept_exactly(made, pictures, tmp_path, rows):
    flags = () if rows is None else ("--prefix-rows", rows)
    json_of("encode", made.dvae, pictures[0], "--out", tmp_path / "codes.npz")
    want = np.load(tmp_path / "codes.npz")["codes"][0]
    flags = (*GUIDED, "--prefix", pictures[0], *flags)
    json_of("sample", made.dalle, "", "a star", "--num-images", 2, *flags, "--out", tmp_path / "s")
    given = (rows or GRID // 2) * GRID
    for codes in codes_of(tmp_path / "s").values():
        np.testing.assert_array_equal(codes[:given], want[:given])
    assert len({codes[given:].tobytes() for codes in codes_of(tmp_path / "s").values()}) > 1


def test_captions_from_a_file_and_without_a_caption(made, tmp_path):
    (tmp_path / "captions.txt").write_text("\ufeffa red circle\n\n  一个蓝色的星 \n", encoding="utf-8")
    told = json_of(
        "sample",
        made.dalle,
        "a cross",
        "--captions-file",
        tmp_path / "captions.txt",
        "--num-images",
        1,
        "--out",
        tmp_path,
    )
    assert [p["caption"] for p in told["pictures"]] == ["a cross", "a red circle", "一个蓝色的星"]
    json_of("sample", made.dalle, "--unconditional", "--num-images", 1, "--out", tmp_path / "none")
    json_of("sample", made.dalle, "", "--num-images", 1, "--out", tmp_path / "empty")
    np.testing.assert_array_equal(
        codes_of(tmp_path / "none")["c000_s0000.png"], codes_of(tmp_path / "empty")["c000_s0000.png"]
    )


def job_file(path):
    """Eleven captions with seeds, guidance and temperature of their own."""
    rows = [
        {"caption": f"a {c} {s}"} for c in ("red", "blue") for s in ("star", "ring", "cross", "heart", "disc")
    ]
    rows += [{"caption": "", "guidance_scale": 1}]
    for i, row in enumerate(rows):
        row |= [{"seed": 7}, {"guidance_scale": 90.0, "top_p": 0.9}, {"temperature": 0.5}, {}][i % 4]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path, rows


def test_a_file_of_captions_goes_on_where_it_was_killed(made, tmp_path, monkeypatch):
    """Killed in the middle of a line: nothing is drawn twice, nothing is lost, and all is as if in one go."""
    path, rows = job_file(tmp_path / "captions.jsonl")
    call = ("sample", made.dalle, "--captions-file", path, "--num-images", 2, "--batch-size", 3, *GUIDED)
    whole = json_of(*call, "--out", tmp_path / "whole")
    assert [(p["caption"], p["seed"]) for p in whole["pictures"]] == [
        (row["caption"], row.get("seed", 0) + i) for row in rows for i in range(2)
    ]
    add, asked = sample_file.Manifest.add, []

    def killed(self, lines):
        if len(self.done) >= 9:
            self._file.write(b'{"file": "c00' + b"x" * 10_000)  # longer than all that is written after it
            self._file.flush()
            raise KeyboardInterrupt
        add(self, lines)

    monkeypatch.setattr(sample_file.Manifest, "add", killed)
    assert run(*call, "--out", tmp_path / "s").code == 130
    monkeypatch.setattr(sample_file.Manifest, "add", add)
    done = [
        json.loads(line)["file"] for line in (tmp_path / "s" / "manifest.jsonl").read_text().split("\n")[1:-1]
    ]
    assert 9 <= len(done) < 22
    monkeypatch.setattr(sample_file, "SamplingRequest", lambda *a: (asked.append(a), SamplingRequest(*a))[1])
    again = json_of(*call, "--out", tmp_path / "s")
    assert len(asked) == 22 - len(done) and len(again["pictures"]) == 22
    for name in [*(Path(p["file"]).name for p in whole["pictures"]), "grid.png"]:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, codes in codes_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(codes_of(tmp_path / "s")[name], codes)
    asked.clear()
    assert json_of(*call, "--out", tmp_path / "s")["pictures"] == again["pictures"] and not asked
    assert len((tmp_path / "s" / "manifest.jsonl").read_text().splitlines()) == 1 + 22
    other = refused(*call, "--top-k", 3, "--out", tmp_path / "s")
    assert "holds another job (top_k differ): give another --out" in other


def test_a_picture_of_a_file_is_the_one_sampled_alone(made, tmp_path):
    """Whether the queue draws one code a pass or several."""
    path, rows = job_file(tmp_path / "captions.jsonl")
    call = ("sample", made.dalle, "--captions-file", path, "--num-images", 1, *GUIDED, "--batch-size", 4)
    assert "codes_per_pass" not in json_of(*call, "--out", tmp_path / "s")
    faster = json_of(*call, "--draft-len", 6, "--out", tmp_path / "faster")
    assert 1 <= faster["codes_per_pass"] <= 6
    for name, codes in codes_of(tmp_path / "s").items():
        np.testing.assert_array_equal(codes_of(tmp_path / "faster")[name], codes)
    assert "codes_per_pass" not in json_of(
        *call, "--draft-len", 6, "--out", tmp_path / "faster"
    )  # nothing left
    told = refused(*call, "--draft-len", GRID * GRID + 1, "--out", tmp_path / "none")
    assert f"Expected draft_len from 2 to {GRID * GRID}, got" in told and not (tmp_path / "none").exists()
    for j in (0, 1, 2, 10):
        own = {"guidance_scale": 100, **rows[j]}
        flags = [x for k, v in own.items() if k != "caption" for x in ("--" + k.replace("_", "-"), v)]
        json_of("sample", made.dalle, own["caption"], *flags, "--num-images", 1, "--out", tmp_path / str(j))
        (alone,) = codes_of(tmp_path / str(j)).values()
        np.testing.assert_array_equal(list(codes_of(tmp_path / "s").values())[j], alone)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ('{"text": "a"}', "line 2 has no caption"),
        ('{"caption": "a", "gidance": 2}', "line 2 has 'gidance'; want caption, seed"),
        ('{"caption": "a", "seed": 0.5}', "line 2: seed is 0.5; want a number"),
        ('{"caption": "a", "top_p": 2}', "caption 1 ('a'): top_p is 2.0; want a share"),
        ('{"caption": "a", "seed": -1}', "caption 1 has seeds from -1"),
    ],
)
def test_bad_lines_of_a_captions_file(made, tmp_path, line, told):
    (tmp_path / "c.jsonl").write_text('{"caption": "b"}\n' + line)
    message = refused("sample", made.dalle, "--captions-file", tmp_path / "c.jsonl", "--out", tmp_path / "s")
    assert told in message and not (tmp_path / "s").exists()


def test_a_long_caption_is_cut_with_a_warning(made, tmp_path):
    told = run("sample", made.dalle, "short", "word " * 200, "--num-images", 1, "--out", tmp_path, "--json")
    cut = [p["tokens_cut"] for p in json.loads(told.out)["pictures"]]
    assert told.code == 0 and cut[0] == 0 and cut[1] > 100
    assert f"warning: caption 1 has {TEXT_LEN + cut[1]} tokens, the model reads {TEXT_LEN}" in told.err
    assert f"the last {cut[1]} are cut" in told.err


def test_characters_that_the_vocabulary_lacks_are_drawn_too(made, tmp_path):
    json_of("sample", made.dalle, "🦩\x00\ud800 ſ", "--num-images", 1, "--out", tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--temperature", -1), "temperature is -1.0; want 0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-k", 0), "top_k is 0; want at least 1"),
        (("--top-p", 0), r"top_p is 0.0; want a share in (0, 1]"),
        (("--top-p", 1.5), "top_p is 1.5"),
        (("--guidance-scale", -2), "guidance_scale is -2.0; want 0 or more"),
        (("--num-images", 0), "--num-images is 0; want at least 1"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--seed", -1), "want integers in [0, 2**32)"),
        (("--seed", 2**32), "want integers in [0, 2**32)"),
        (("--unconditional",), "leave the captions out"),
        (("--prefix-rows", 2), "give --prefix"),
        (("--preview-rows", 0), "--preview-rows is 0; want at least 1"),
        (("--draft-len", 1), "jacobi is 1; want at least 2 codes at once"),
        (
            ("--draft-len", GRID * GRID + 1),
            f"Expected draft_len from 2 to {GRID * GRID}, got {GRID * GRID + 1}",
        ),
        (("--captions-file", "missing.txt"), "cannot read --captions-file missing.txt: No such file"),
        (("--prefix", "missing.png"), "Cannot read the image missing.png"),
    ],
)
def test_sampling_flags_that_cannot_be(made, tmp_path, flags, told):
    message = refused("sample", made.dalle, "a", "--out", tmp_path / "s", *flags)
    assert message.startswith("dalle-jax sample: error: ") and told in message
    assert not list((tmp_path / "s").glob("*")) if (tmp_path / "s").exists() else True


def test_sample_wants_a_caption(made):
    assert "or --unconditional to draw without" in refused("sample", made.dalle)


def test_bad_prefix_pictures(made, pictures, tmp_path):
    images.save_png(tmp_path / "big.png", np.zeros((64, 48, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:60])
    (tmp_path / "text.png").write_text("not a picture")
    for name, told in (
        ("big.png", f"is 48 x 64 pixels; this model's pictures are {SIZE} x {SIZE}: crop and resize"),
        ("broken.png", "broken.png: The image does not decode"),
        ("text.png", "text.png: Expected an image of a known format"),
    ):
        assert told in refused(
            "sample", made.dalle, "a", "--prefix", tmp_path / name, "--out", tmp_path / "s"
        )
    for rows in (0, GRID):
        message = refused("sample", made.dalle, "a", "--prefix", pictures[0], "--prefix-rows", rows)
        assert (
            f"--prefix-rows is {rows}; the picture has {GRID} rows of codes: want 1 to {GRID - 1}" in message
        )


def test_bad_captions_files(made, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "is not UTF-8" in refused("sample", made.dalle, "--captions-file", tmp_path / "latin.txt")
    assert "has no captions" in refused("sample", made.dalle, "--captions-file", tmp_path / "empty.txt")


def test_guidance_wants_a_model_that_saw_null_captions(made, tmp_path):
    copy = tmp_path / "dalle"
    shutil.copytree(made.dalle, copy)
    text = (copy / "config.json").read_text().replace('"cond_drop_prob": 0.1', '"cond_drop_prob": 0.0')
    (copy / "config.json").write_text(text)
    assert "trained with model.cond_drop_prob 0" in refused(
        "sample", copy, "a", "--guidance-scale", 2, "--out", tmp_path / "s"
    )
    assert "an empty caption needs the null caption" in refused("sample", copy, "", "--out", tmp_path / "s")
    json_of("sample", copy, "a", "--guidance-scale", 1, "--num-images", 1, "--out", tmp_path / "s")


# --- runs that cannot be used -----------------------------------------------------------------------------


def test_runs_that_are_missing_half_written_or_of_another_stage(made, tmp_path):
    """And none of these calls changes the directory."""
    assert f"no run directory {tmp_path / 'none'}" in refused("sample", tmp_path / "none", "a")
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refused("evaluate", tmp_path / "empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((made.dalle / "config.json").read_bytes())
    assert "has no checkpoint yet; train it first" in refused("sample", tmp_path / "half", "a")
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32))
    message = refused("decode", tmp_path / "half", tmp_path / "c.npz", "--out", tmp_path / "x")
    assert "image_tokenizer does not exist yet; train the run first" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "is not a configuration of this version" in refused("info", tmp_path / "broken")
    message = refused("sample", made.dvae, "a")
    assert (
        "is a tokenizer run (stage dvae): it knows no captions" in message
        and "`encode` and `decode`" in message
    )
    assert {p.name for p in (tmp_path / "half").iterdir()} == {"config.json"}


# --- encode and decode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dvae", "dalle"])
def test_encode_then_decode_are_the_tokenizer_s_functions(made, pictures, tmp_path, stage):
    model = load_image_tokenizer(made.dvae)
    true = np.stack([np.asarray(Image.open(p)) for p in pictures])
    told = json_of("encode", made.out / stage, *pictures, "--out", tmp_path / "codes.npz")
    assert (told["rows"], told["codes_per_picture"]) == (3, GRID * GRID)
    with np.load(tmp_path / "codes.npz") as file:
        codes, names = file["codes"], file["names"].tolist()
    assert names == [str(p) for p in pictures] and codes.dtype == np.int32
    want = ENCODE(model.config, model.params, jnp.asarray(true / np.float32(255)))
    np.testing.assert_array_equal(codes, want)

    json_of("decode", made.out / stage, tmp_path / "codes.npz", "--out", tmp_path / "images.npz")
    back = np.load(tmp_path / "images.npz")["images"]
    assert (
        back.dtype == np.float32 and back.shape == (3, SIZE, SIZE, 3) and 0 <= back.min() <= back.max() <= 1
    )
    np.testing.assert_allclose(back, DECODE(model.config, model.params, want), atol=1e-6)

    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "mine.txt").write_text("stays")
    json_of("decode", made.out / stage, tmp_path / "codes.npz", "--out", tmp_path / "dir")
    assert sorted(p.name for p in (tmp_path / "dir").iterdir()) == [
        "00000.png", "00001.png", "00002.png", "mine.txt",
    ]  # fmt: skip
    np.testing.assert_allclose(
        np.asarray(Image.open(tmp_path / "dir" / "00001.png")) / 255, back[1], atol=0.51 / 255
    )


@pytest.mark.parametrize("rows", [None, 10])
def test_encode_ahead_is_what_training_reads(made, tmp_path, rows):
    out = tmp_path / "codes"
    flags = () if rows is None else ("--rows", rows)
    again = (
        "encode",
        made.dvae,
        "--data",
        made.dalle,
        *flags,
        "--shard-rows",
        16,
        "--out",
        out,
        "--eval-rows",
        16,
    )
    told = [json_of(*again, "--process", p, "--processes", 2) for p in (1, 0)] + [json_of(*again)]
    shards = 1 if rows else 3
    assert [t["made"] for t in told] == [shards // 2, shards - shards // 2, 0]
    assert [t["missing"] for t in told] == [shards - shards // 2, 0, 0]
    coded, model = CodesDataset(out), load_image_tokenizer(made.dvae)
    assert (len(coded), coded.info.tokenizer, coded.info.shards) == (rows or 40, model.fingerprint, shards)
    source = open_source(tiny_dalle().data.source, "train")
    true = np.stack([source.image(i, SIZE, "center") for i in range(len(coded))])
    want = ENCODE(model.config, model.params, jnp.asarray(true / np.float32(255)))
    np.testing.assert_array_equal([coded.row(i)[0] for i in range(len(coded))], want)
    assert [coded.captions(i) for i in range(10)] == [source.captions(i) for i in range(10)]
    config = tiny_dalle(made.out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, codes=str(out)))
    task = make_task(config)
    task.prepare(made.dalle)  # takes them
    assert len(CodesDataset(out / "eval")) == 16
    pixels = make_task(tiny_dalle(made.out))
    pixels.prepare(made.dalle)
    for got, want in zip(task.eval_batches(), pixels.eval_batches(), strict=True):
        assert got.keys() == {"codes", "text"}
        np.testing.assert_array_equal(got["text"], want["text"])
        shown = jnp.asarray(want["image"] / np.float32(255))
        np.testing.assert_array_equal(got["codes"], ENCODE(model.config, model.params, shown))
    assert task.sample_grid(load_run(made.dalle).params, task.frozen, jax.random.key(0)).size[0] > 4 * SIZE
    held_out = json.loads((out / "eval/codes.json").read_text())
    for name, value, told in (
        ("tokenizer", "fedcba9876543210", "was encoded by tokenizer fedcba9876543210"),
        ("source", held_out["source"].replace('"seed": 0', '"seed": 5'), "seed 5 there, 0 here"),
    ):
        (out / "eval/codes.json").write_text(json.dumps({**held_out, name: value}))
        with pytest.raises(ValueError, match=told):
            make_task(config).prepare(made.dalle)


def test_encode_takes_data_as_it_lies(made, folder, tmp_path):
    told = json_of("encode", made.dvae, "--data", folder, "--out", tmp_path / "codes")
    rows = open_source(FolderSource(path=str(folder)), "train")
    assert told["rows"] == len(rows) and CodesDataset(tmp_path / "codes").captions(0) == rows.captions(0)
    data = DataConfig(source=FolderSource(path="moved"), codes=str(tmp_path / "codes"))
    assert len(open_train_source(data)) == len(rows)


def test_codes_of_another_tokenizer_are_refused_by_training_and_told_by_decode(made, tmp_path):
    out = tmp_path / "codes"
    encode = ("encode", made.dvae, "--data", made.dalle, "--rows", 8, "--out", out, "--eval-rows", 0)
    json_of(*encode)
    about = json.loads((out / "codes.json").read_text()) | {"tokenizer": "0123456789abcdef"}
    (out / "codes.json").write_text(json.dumps(about))
    assert "holds other codes (tokenizer '0123456789abcdef' there" in refused(*encode)
    config = tiny_dalle(made.out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, codes=str(out)))
    with pytest.raises(
        ValueError, match="was encoded by tokenizer 0123456789abcdef, this run's tokenizer is"
    ):
        make_task(config).prepare(made.dalle)
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32), tokenizer=np.array("0123456789abcdef"))
    done = run("decode", made.dvae, tmp_path / "c.npz", "--out", tmp_path / "i.npz")
    assert done.code == 0 and "warning" in done.err and "made by tokenizer 0123456789abcdef" in done.err


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"codes": np.full((2, 64), VOCAB)}, "codes from 32 to 32; this tokenizer's are in [0, 32)"),
        ({"codes": np.full((2, 64), -1)}, "row 0 has codes from -1 to -1"),
        ({"codes": np.zeros((2, 63), int)}, "codes have 63 columns; this tokenizer's pictures"),
        ({"codes": np.zeros((2, 64))}, "codes are float64 (2, 64); want integers"),
        ({"codes": np.zeros((0, 64), int)}, "want integers (pictures, 64)"),
        ({"codes": np.zeros(64, int)}, "codes are int64 (64,)"),
        ({"tokens": np.zeros((2, 64), int)}, "has no array `codes`, it has tokens"),
        ({"codes": np.array([[{}]])}, "is not an npz file of numbers"),
        ("text", "is not a whole npz file"),
        ("npy", "is not a whole npz file (File is not a zip file); want an npz file"),
        ("cut", "is not a whole npz file"),
        ("missing", "no file"),
    ],
)  # fmt: skip
def test_files_that_do_not_decode(made, tmp_path, arrays, told):
    path = tmp_path / "codes.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros((2, 64), int))
    elif arrays == "cut":
        np.savez(path, codes=np.zeros((20, 64), int))
        path.write_bytes(path.read_bytes()[:5000])
    elif arrays == "text":
        path.write_text("codes")
    message = refused("decode", made.dvae, path, "--out", tmp_path / "out")
    assert told in message and "unsafely" not in message


def test_encode_refuses_what_it_cannot_use(made, pictures, tmp_path):
    out = tmp_path / "codes.npz"
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:60])
    message = refused("encode", made.dvae, pictures[0], tmp_path / "broken.png", "--out", out)
    assert "broken.png: The image does not decode" in message and not out.exists()
    assert "Cannot read the image" in refused("encode", made.dvae, tmp_path / "none.png", "--out", out)
    assert "give pictures to encode, or --data DATA" in refused("encode", made.dvae, "--out", out)
    assert "give pictures to encode, or --data DATA" in refused(
        "encode", made.dvae, pictures[0], "--data", made.dvae, "--out", out
    )
    assert "--rows is for --data" in refused("encode", made.dvae, pictures[0], "--rows", 2, "--out", out)
    ahead = ("encode", made.dvae, "--data", made.dvae, "--out", tmp_path / "codes")
    assert "41 rows of a source of 40" in refused(*ahead, "--rows", 41)
    assert "process 2 of 2; want 0 to 1" in refused(*ahead, "--process", 2, "--processes", 2)
    assert "--process and --processes go together" in refused(*ahead, "--process", 2)
    assert "0 rows in a shard" in refused(*ahead, "--shard-rows", 0)
    assert "no configuration file none.py" in refused("encode", made.dvae, "--data", "none.py", "--out", out)


def test_places_that_cannot_be_written(made, pictures, tmp_path):
    (tmp_path / "file").write_text("mine")
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32))
    assert "is a file; want a directory" in refused("sample", made.dalle, "a", "--out", tmp_path / "file")
    assert "cannot write --out" in refused("sample", made.dalle, "a", "--out", tmp_path / "file" / "s")
    assert "is a directory; want the name of a file" in refused(
        "encode", made.dvae, pictures[0], "--out", tmp_path
    )
    assert "cannot write --out" in refused(
        "encode", made.dvae, pictures[0], "--out", tmp_path / "file" / "c.npz"
    )
    assert "is a file; want a directory" in refused(
        "decode", made.dvae, tmp_path / "c.npz", "--out", tmp_path / "file"
    )
    assert "is a file; want a directory" in refused("demo", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluate_a_tokenizer(made):
    found = json_of("evaluate", made.dvae, "--count", 4)
    assert {"psnr", "mse", "codebook_use", "codebook_perplexity", "accuracy_reconstruction"} <= set(found)
    assert (found["stage"], found["step"], found["count"]) == ("dvae", 2, 4)
    assert "psnr" in run("evaluate", made.dvae, "--count", 4).out


def test_evaluate_a_transformer_with_a_curve(made):
    found = json_of("evaluate", made.dalle, "--count", 4, "--guidance-scale", 1, 2.5)
    names = {"loss", "image_loss", "text_loss", "psnr", "codebook_use", "accuracy_reconstruction"}
    right = {"accuracy_one_object", "accuracy_two_objects", "accuracy_held_out", "accuracy_held_out_zh"}
    assert names | right <= set(found) and found["stage"] == "dalle"
    assert [row["guidance_scale"] for row in found["curve"]] == [1, 2.5] and right <= set(found["curve"][1])
    assert found["guidance_scale"] == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--count", 0), "--count is 0"),
        (("--guidance-scale", 1, -1), "guidance_scale is -1.0"),
        (("--guidance-scale",), "no value"),
    ],
)
def test_evaluate_refuses(made, flags, told):
    assert told in refused("evaluate", made.dalle, *flags)


@pytest.fixture
def colours(monkeypatch):
    """In place of Inception-v3, whose weights are not here: the mean colour of a picture as its features."""
    network = inception.Inception({}, "colours")
    monkeypatch.setattr(inception, "load_inception", lambda path: network)
    monkeypatch.setattr(
        inception, "inception_features", lambda _, rows: rows.mean(axis=(1, 2)).astype(np.float32)
    )
    return network


def test_evaluate_a_tokenizer_by_fid(made, colours, tmp_path):
    stats = tmp_path / "stats.npz"
    first = json_of("evaluate", made.dvae, "--count", 16, "--fid-weights", "w.npz", "--fid-save", stats)
    assert (first["rfid_count"], first["rfid_reference_count"]) == (16, 16)
    tokenizer = load_image_tokenizer(made.dvae)
    data = load_run(made.dvae).config.data
    true = eval_batch(data, open_source(data.source, "eval"), 16, image_size=SIZE)["image"]
    again = images.to_uint8(decode_codes(tokenizer, encode_images(tokenizer, true, batch=8), batch=8))
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (rows.mean(axis=(1, 2)) for rows in (true, again))
    )
    want = fid.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert want > 1 and first["rfid"] == pytest.approx(want, rel=1e-3)
    flags = ("--fid-weights", "w.npz", "--fid-reference", stats)
    assert json_of("evaluate", made.dvae, "--count", 16, *flags)["rfid"] == pytest.approx(first["rfid"])


def test_evaluate_a_transformer_by_fid(made, colours, monkeypatch):
    flags = ("--count", 8, "--fid-weights", "w.npz")
    found = json_of("evaluate", made.dalle, *flags, "--guidance-scale", 1, 2.5)
    assert found["fid"] > 0 and (found["fid_count"], found["fid_reference_count"]) == (8, 8)
    assert [set(row) >= {"guidance_scale", "fid", "accuracy_one_object"} for row in found["curve"]] == [
        True,
        True,
    ]
    # a source whose captions cannot be verified has a FID all the same
    monkeypatch.setattr(metrics, "scene_kinds", lambda *_: ())
    other = json_of("evaluate", made.dalle, *flags)
    assert other["fid"] == pytest.approx(found["fid"]) and "accuracy_one_object" not in other


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--fid-weights", "absent.npz"), "no file absent.npz"),
        (("--fid-save", "x.npz"), "--fid-reference and --fid-save need --fid-weights"),
        (("--fid-weights", "w", "--fid-save", "x", "--fid-reference", "y"), "want one"),
        (("--fid-weights", "w.npz", "--count", 1), "want at least 2 pictures for a FID"),
    ],
)
def test_evaluate_refuses_wrong_fid_flags(made, flags, told):
    assert told in refused("evaluate", made.dvae, *flags)


def test_evaluate_refuses_statistics_of_other_pictures(made, colours, tmp_path):
    made_of = fid.FIDSettings("colours", inception.PREPROCESSING, SIZE * 2)
    fid.save_reference(tmp_path / "s.npz", fid.feature_stats(np.eye(3)), made_of)
    told = refused("evaluate", made.dvae, "--fid-weights", "w", "--fid-reference", tmp_path / "s.npz")
    assert "was made with image_size 64, this measure has 32" in told


# --- info -------------------------------------------------------------------------------------------------


def write_config(path, text) -> str:
    path.write_text(f"from dalle_jax.config import *\nconfig = TrainConfig(model={text})\n")
    return str(path)


def test_info_on_the_paper_s_transformer(tmp_path):
    """Its parameters by hand: embeddings, 64 blocks of width D = 3968, heads without bias."""
    D, text, N, V, side, L = 3968, 16_384 + 256, 1024, 8192, 32, 64
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    want = text * D + 256 * D + V * D + 2 * side * D + L * block + 2 * D + text * D + V * D
    found = json_of("info", write_config(tmp_path / "paper.py", "DalleConfig()"))
    assert found["parameters"] == want == sum(found["parts"].values())
    assert found["parts"]["blocks"] == L * block
    assert found["shapes"]["blocks/attn/q/kernel"] == [64, 3968, 3968]
    assert found["memory"]["parameters"] == 4 * want and found["memory"]["ema"] == 4 * want
    assert found["memory"]["optimizer"] - 8 * want < 100  # two moments and counters
    kept = 47 * (256 + 33) + 16 * (256 + N) + (256 + 5 * side + 5 + 1)  # row, column and conv layers; B.1
    assert found["memory"]["kv_cache_per_image"] == 2 * kept * D * 2  # keys and values, bfloat16
    assert (found["seq_len"], found["num_codes"], found["grid"]) == (1280, 1024, 32)


def test_info_on_the_published_tokenizer(tmp_path):
    found = json_of("info", write_config(tmp_path / "paper.py", "DVAEConfig()"))
    assert found["parts"] == {"encoder": 53_786_240, "decoder": 43_829_766}
    assert (found["image_size"], found["grid"], found["vocab"]) == (256, 32, 8192)


def test_info_on_a_run(made):
    found = json_of("info", made.dalle)
    assert (found["stage"], found["step"], found["best_step"], found["saved_steps"]) == ("dalle", 2, 2, [2])
    assert np.isfinite(found["metrics"]["eval_loss"])
    done = run("info", made.dvae, "--shapes")
    assert all(word in done.out for word in ("encoder/input/kernel", "eval_psnr", "KiB"))


def test_a_run_stays_on_the_host_where_it_only_draws(made, monkeypatch):
    """Another device stands for the host: what draws is made there, goes to the first device, and is the same."""
    host, first = jax.devices()[3], jax.devices()[0]
    monkeypatch.setattr(loading, "host_device", lambda: host)
    here, there = load_text_to_image(made.dalle), load_text_to_image(made.dalle, on_host=True)
    for model, device in ((here, first), (there, host)):
        assert {d for x in jax.tree.leaves(model.run.params) for d in x.devices()} == {device}
        ready = text_to_image._prepared(model, None)
        assert {d for x in jax.tree.leaves(ready) for d in x.devices()} == {first}
    want, got = (
        text_to_image.sample_code_rows(model, ["a red disc"], [5], SamplingConfig(guidance_scale=2.0))
        for model in (here, there)
    )
    np.testing.assert_array_equal(got, want)


def test_info_says_what_drawing_takes(made):
    """What the compiler lays out holds parameters and caches, grows with the batch, and the largest batch fits."""
    few, many = (json_of("info", made.dalle, "--batch-size", n)["sampling"] for n in (2, 6))
    model = load_text_to_image(made.dalle).config
    per_picture = 2 * 4 * model.dim * (TEXT_LEN + 46)  # one conv layer, its ring 5 rows and 6; float32
    assert few["caches"] == 2 * per_picture and many["caches"] == 6 * per_picture
    for told in (few, many):
        assert (
            told["total"] > told["checkpoint_parameters"] + told["parameters"] + told["caches"]
            and told["fits"]
            and told["device_memory"] > 2**28
        )
    assert 4 * per_picture <= many["total"] - few["total"] < 40 * per_picture
    room = few["device_memory"] - few["total"]
    assert 0 < few["largest_batch"] - 2 <= room / per_picture
    guided = json_of("info", made.dalle, "--batch-size", 2, "--use-cfg")["sampling"]
    assert guided["total"] > few["total"]
    small = json_of("info", made.dalle, "--batch-size", 2, "--quantization", "int8")["sampling"]
    assert (
        small["parameters"] < few["parameters"]
        and small["quantization"] == "int8"
        and few["quantization"] is None
    )
    assert "--quantization is for sampling. Give --batch-size" in refused(
        "info", made.dalle, "--quantization", "int8"
    )
    assert "--device is for sampling. Give --batch-size" in refused("info", made.dalle, "--device", "h200")
    assert "Did you mean h200?" in refused("info", made.dalle, "--batch-size", 1, "--device", "h20")
    assert "--device compiles for one device, and h200:2 has 2. Use h200" in refused(
        "info", made.dalle, "--batch-size", 1, "--device", "h200:2"
    )
    assert "--batch-size is 0; want at least 1" in refused("info", made.dalle, "--batch-size", 0)
    assert "is of stage dvae" in refused("info", made.dvae, "--batch-size", 1)


def test_info_and_compile_only_say_the_same_of_drawing(made):
    """Both count what the command `sample` has on the device: the run, what it prepares, and the program."""
    told = json_of("info", made.dalle, "--batch-size", 2)["sampling"]
    report = compile_sampler(read_config(made.dalle), "local", 2)
    assert report["peak_gib_per_device"] * 2**30 == pytest.approx(told["total"], rel=1e-9)
    memory = {name: size * 2**30 for name, size in report["memory_gib"].items()}
    assert memory["checkpoint_parameters"] == pytest.approx(told["checkpoint_parameters"]) and memory[
        "cache"
    ] == pytest.approx(told["caches"])
    assert (
        memory["parameters"] == pytest.approx(told["parameters"])
        and told["device_kind"] == report["device_kind"]
    )


def test_info_refuses(made, tmp_path):
    assert "no run directory" in refused("info", tmp_path / "none")
    assert "no configuration file" in refused("info", tmp_path / "none.py")
    (tmp_path / "bad.py").write_text("config = 3\n")
    assert "end the file in `config = TrainConfig(...)`" in refused("info", tmp_path / "bad.py")
    (tmp_path / "worse.py").write_text("from dalle_jax.config import *\nTrainConfig(modle=1)\n")
    assert "worse.py:2: TypeError" in refused("info", tmp_path / "worse.py")
    assert "is not divisible by heads" in refused(
        "info", write_config(tmp_path / "odd.py", "DalleConfig(dim=10, heads=3)")
    )


def test_train_is_train_py(made, tmp_path):
    config = write_config(tmp_path / "c.py", "DVAEConfig(image_size=8, groups=1)")
    assert "no run directory: pass --run" in refused("train", config)
    assert "Perhaps you meant" in refused("train", config, "--stepz", 3, code=2)


# --- the classifier as a judge --------------------------------------------------------------------------


def test_evaluate_by_a_classifier(made, tmp_path, monkeypatch):
    """The pictures judged are those drawn for the rows' captions; a judge of their grey, by hand."""
    labels = np.arange(8) % 2
    pictures = np.broadcast_to((60 + 80 * labels)[:, None, None, None], (8, SIZE, SIZE, 3)).astype(np.uint8)
    arrays = {f"{s}_{a}": v for s in ("train", "test") for a, v in (("x", pictures), ("y", labels))}
    np.savez(tmp_path / "a.npz", **arrays, label_names=["dark", "bright"])
    path = shutil.copytree(made.dalle, tmp_path / "run")
    plain = json.loads((path / "config.json").read_text())
    plain["data"]["source"] = json.loads(to_json(ArraysSource(path=str(tmp_path / "a.npz"))))
    (path / "config.json").write_text(json.dumps(plain))
    judged = []

    def reads_grey(judge, images, batch):
        judged.append(images)
        return np.eye(2)[(images.mean(axis=(1, 2, 3)) > 100).astype(int)]

    monkeypatch.setattr(classifier, "load_classifier", lambda path: SimpleNamespace(classes=2))
    monkeypatch.setattr(classifier, "class_logits", reads_grey)
    found = json_of(
        "evaluate", path, "--classifier", "w.npz", "--count", 6, "--seed", 3, "--guidance-scale", 1, 2
    )
    assert found["accuracy_class_true"] == 1.0 and 0 <= found["accuracy_class_reconstruction"] <= 1
    model = load_text_to_image(path)
    captions = [f"a photo of a {('dark', 'bright')[k]}" for k in labels[:6]]
    for seen, row, guidance in zip(judged[2:], found["curve"], (1, 2), strict=True):
        how = SamplingConfig(guidance_scale=guidance)
        want = metrics.sample_for_captions(model, captions, range(3, 9), how)
        np.testing.assert_array_equal(seen, want)
        share = np.mean((want.mean(axis=(1, 2, 3)) > 100) == labels[:6])
        assert row["accuracy_class"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--classifier", "absent.npz"), "no file absent.npz"),
        (("--classifier", "{made}/dvae/config.json"), "not a whole npz file"),
    ],
)
def test_evaluate_refuses_a_wrong_classifier(made, flags, told):
    assert told in refused("evaluate", made.dvae, *(f.format(made=made.out) for f in flags))


@pytest.mark.parametrize(("field", "other"), [("dim", 32), ("layers", 2), ("image_vocab", VOCAB * 2)])
def test_a_checkpoint_of_another_configuration(made, tmp_path, field, other):
    """As after an edit of config.json: fewer layers or codes would draw without an error of their own."""
    path = shutil.copytree(made.dalle, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    assert config["model"][field] != other
    config["model"][field] = other
    (path / "config.json").write_text(json.dumps(config))
    assert "does not fit the model" in refused("sample", path, "a", "--out", tmp_path / "out")
