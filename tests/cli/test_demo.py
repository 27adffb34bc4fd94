"""`dalle-jax demo` with tiny configurations."""

import json
from types import SimpleNamespace

import numpy as np
from command_line import json_of, run, tiny_demo_config
from PIL import Image

from dalle_jax.cli import demo


def test_demo_writes_images_and_metrics(made):
    assert made.first["finished"]
    figures = made.first["metrics"]
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
    assert saved["metrics"] == figures


def test_a_finished_demo_is_not_repeated(made, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished stage was repeated")

    monkeypatch.setattr(demo, "load_shipped_config", tiny_demo_config)
    monkeypatch.setattr(demo.loop, "train", refuse)
    monkeypatch.setattr(demo, "_measure", refuse)
    assert json_of("demo", "--out", made.out, "--count", 4)["metrics"] == made.first["metrics"]
    done = run("demo", "--out", made.out, "--count", 4)
    assert "accuracy_held_out" in done.out and "dalle-jax sample" in done.out


def test_an_interrupted_demo_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_shipped_config", tiny_demo_config)
    monkeypatch.setattr(demo.loop, "train", lambda config: SimpleNamespace(finished=False))
    done = run("demo", "--out", tmp_path, "--json")
    assert done.code == 0 and json.loads(done.out)["finished"] is False
    assert "run the same command to resume" in done.err


def test_demo_configs_apply_the_flags():
    tokenizer, transformer = demo.demo_configs(demo.DemoArgs(out="x", seed=3, transformer_steps=7))
    assert (tokenizer.run, transformer.run, transformer.image_tokenizer) == ("x/dvae", "x/dalle", "x/dvae")
    assert (transformer.seed, transformer.data.seed, transformer.steps) == (3, 3, 7)
