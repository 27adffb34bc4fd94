"""Fixtures of the tests of the command line: trained runs and files (a plugin of tests/conftest.py)."""

from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Directories of `dalle-jax demo` with the tiny configurations; `first` is the output of the call."""
    import jax
    from command_line import json_of, tiny_demo_config

    from dalle_jax.cli import demo
    from dalle_jax.evaluate import metrics
    from dalle_jax.parallel.mesh import make_mesh
    from dalle_jax.train import loop

    out = tmp_path_factory.mktemp("cli") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_shipped_config", tiny_demo_config)
        patch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))  # compiles faster
        patch.setattr(metrics, "EVAL_ROWS", 8)
        first = json_of("demo", "--out", out, "--count", 4)
    return SimpleNamespace(out=out, dvae=out / "dvae", dalle=out / "dalle", first=first)


@pytest.fixture
def small_batches(monkeypatch):
    """Evaluate with the batch size of `sample`, so that one program is compiled for both."""
    from dalle_jax.evaluate import metrics

    monkeypatch.setattr(metrics, "EVAL_ROWS", 8)


@pytest.fixture
def image_files(tmp_path):
    """Three PNG files of the model's size."""
    from dalle_jax.data import images

    paths = []
    for i in range(3):
        paths.append(tmp_path / f"image_{i}.png")
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        images.save_png(paths[-1], noise.repeat(8, axis=0).repeat(8, axis=1))
    return paths


@pytest.fixture
def folder(tmp_path):
    """Twelve images with a caption file each."""
    from dalle_jax.data import images

    for i in range(12):
        images.save_png(tmp_path / "mine" / f"{i}.png", np.full((40, 40, 3), 20 * i, np.uint8))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"gray of {i}")
    return tmp_path / "mine"
