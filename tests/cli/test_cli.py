"""The command line: its help, errors, and the commands on a tiny pair of trained runs."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_line import TEXT_LEN, json_of, refused, run, tiny_demo_config
from PIL import Image

from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.cli import COMMANDS, demo
from dalle_jax.data import images
from dalle_jax.pipelines import TextToImagePipeline, TokenizerPipeline, load
from dalle_jax.text.tokenizers import TextTokenizer

pytestmark = pytest.mark.usefixtures("small_batches")

# --- one's own pictures -----------------------------------------------------------------------------------


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
    assert load(new.path, TokenizerPipeline).fingerprint == load(made.dalle, TokenizerPipeline).fingerprint
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
    assert "Expected rows of split 'val'" in refused("data", folder, "--duplicates", tmp_path / "report")


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
        (("rerank", "runs/x", "a", "b.png", "--tpo", "1"), "--top"),
        (("info", "runs/x", "--jsn"), "--json"),
        (("rerank", "runs/x", "a", "b.png", "--top", "many"), "many"),
        (("encode", "runs/x", "a.png"), "--out"),
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

    monkeypatch.setattr(demo, "load_config", tiny_demo_config)
    monkeypatch.setattr(demo.loop, "train", refuse)
    monkeypatch.setattr(demo, "_measure", refuse)
    assert json_of("demo", "--out", made.out, "--count", 4)["figures"] == made.first["figures"]
    done = run("demo", "--out", made.out, "--count", 4)
    assert "accuracy_held_out" in done.out and "dalle-jax sample" in done.out


def test_demo_stops_and_says_so_when_training_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_config", tiny_demo_config)
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
    assert "has no image_tokenizer/ yet; train it first" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "is not a configuration of this version" in refused("info", tmp_path / "broken")
    message = refused("sample", made.dvae, "a")
    assert (
        "is a tokenizer run (stage dvae): it reads no captions" in message
        and "`encode` and `decode`" in message
    )
    assert {p.name for p in (tmp_path / "half").iterdir()} == {"config.json"}


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


def test_info_says_what_drawing_takes(made):
    """What the compiler lays out holds parameters and caches, grows with the batch, and the largest batch fits."""
    few, many = (json_of("info", made.dalle, "--batch-size", n)["sampling"] for n in (2, 6))
    model = load(made.dalle, TextToImagePipeline).config
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
    assert memory["checkpoint_parameters"] == pytest.approx(told["checkpoint_parameters"])
    assert memory["cache"] == pytest.approx(told["caches"])
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
