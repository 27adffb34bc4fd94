"""`dalle-jax info`: sizes computed by hand, and the memory for sampling."""

import numpy as np
import pytest
from command_line import TEXT_LEN, json_of, refused, run, write_config
from etils import epath

from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.pipelines import TextToImagePipeline, load


def test_info_of_the_paper_transformer(tmp_path):
    """The parameters counted by hand: embeddings, 64 blocks of width D = 3968, heads without bias."""
    D, text, N, V, side, L = 3968, 16_384 + 256, 1024, 8192, 32, 64
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    expected = text * D + 256 * D + V * D + 2 * side * D + L * block + 2 * D + text * D + V * D
    result = json_of("info", write_config(tmp_path / "paper.py", "DalleConfig()"))
    assert result["parameters"] == expected == sum(result["parts"].values())
    assert result["parts"]["blocks"] == L * block
    assert result["shapes"]["blocks/attn/q/kernel"] == [64, 3968, 3968]
    assert result["memory"]["parameters"] == 4 * expected and result["memory"]["ema"] == 4 * expected
    assert result["memory"]["optimizer"] - 8 * expected < 100  # two moments and counters
    cache_rows = (
        47 * (256 + 33) + 16 * (256 + N) + (256 + 5 * side + 5 + 1)
    )  # row, column and conv layers; B.1
    assert result["memory"]["kv_cache_per_image"] == 2 * cache_rows * D * 2  # keys and values, bfloat16
    assert (result["seq_len"], result["num_codes"], result["grid"]) == (1280, 1024, 32)


def test_info_of_the_paper_tokenizer(tmp_path):
    result = json_of("info", write_config(tmp_path / "paper.py", "DVAEConfig()"))
    assert result["parts"] == {"encoder": 53_786_240, "decoder": 43_829_766}
    assert (result["image_size"], result["grid"], result["vocab"]) == (256, 32, 8192)


def test_info_of_a_run(made):
    result = json_of("info", made.dalle)
    assert (result["stage"], result["step"], result["best_step"], result["saved_steps"]) == (
        "dalle",
        2,
        2,
        [2],
    )
    assert np.isfinite(result["metrics"]["eval_loss"])
    done = run("info", made.dvae, "--shapes")
    pairs = [
        line.split("  ", 1) for line in done.out.splitlines() if not line.startswith(" ") and "  " in line
    ]
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in map("  ".join, pairs)}) == 1
    assert all(word in done.out for word in ("encoder/input/kernel", "eval_psnr", "KiB"))


def test_info_shows_the_step_of_a_run_in_a_bucket_and_of_an_exported_run(made, tmp_path, monkeypatch):
    """A local directory replaces the bucket. The test's `made` trained two steps."""
    monkeypatch.setattr(remote_dir, "_mirrors", {})
    monkeypatch.setattr(
        remote_dir, "remote_path", lambda url: epath.Path(url.replace("gs://bucket", str(made.out)))
    )
    local, remote = json_of("info", made.dalle), json_of("info", "gs://bucket/dalle")
    assert remote == local | {"run": "gs://bucket/dalle"} and remote["step"] == 2
    json_of("export", made.dalle, "--out", tmp_path / "exported")
    exported = json_of("info", tmp_path / "exported")
    assert (exported["step"], exported["saved_steps"], exported["best_step"]) == (2, [], None)
    assert "step" in run("info", tmp_path / "exported").out.split()


def test_info_measures_the_memory_for_sampling(made):
    """The total contains parameters and caches and grows with the batch; the largest batch fits."""
    few, many = (json_of("info", made.dalle, "--batch-size", n)["sampling"] for n in (2, 6))
    model = load(made.dalle, TextToImagePipeline).config
    per_image = 2 * 4 * model.dim * (TEXT_LEN + 46)  # one conv layer, its cache 5 rows and 6; float32
    assert few["caches"] == 2 * per_image and many["caches"] == 6 * per_image
    for result in (few, many):
        assert (
            result["total"] > result["checkpoint_parameters"] + result["parameters"] + result["caches"]
            and result["fits"]
            and result["device_memory"] > 2**28
        )
    assert 4 * per_image <= many["total"] - few["total"] < 40 * per_image
    room = few["device_memory"] - few["total"]
    assert 0 < few["largest_batch"] - 2 <= room / per_image
    guided = json_of("info", made.dalle, "--batch-size", 2, "--use-cfg")["sampling"]
    assert guided["total"] > few["total"]
    small = json_of("info", made.dalle, "--batch-size", 2, "--quantization", "int8")["sampling"]
    assert (
        small["parameters"] < few["parameters"]
        and small["quantization"] == "int8"
        and few["quantization"] is None
    )
    assert "Expected --batch-size with --quantization, got none" in refused(
        "info", made.dalle, "--quantization", "int8"
    )
    message = refused("info", made.dalle, "--device", "h200")
    assert "Expected --batch-size with --device, got none" in message
    assert "Did you mean h200?" in refused("info", made.dalle, "--batch-size", 1, "--device", "h20")
    assert "Expected a target of one device with --device, got 2 of h200:2. Use h200" in refused(
        "info", made.dalle, "--batch-size", 1, "--device", "h200:2"
    )
    assert "--batch-size of at least 1, got 0" in refused("info", made.dalle, "--batch-size", 0)
    assert "Expected a Transformer with --batch-size, got" in refused("info", made.dvae, "--batch-size", 1)


def test_info_and_compile_only_agree_on_sampling(made):
    """Both count the parameters of the run, those prepared for decoding, and the program."""
    result = json_of("info", made.dalle, "--batch-size", 2)["sampling"]
    report = compile_sampler(read_run_config(made.dalle), "local", 2)
    assert report["peak_gib_per_device"] * 2**30 == pytest.approx(result["total"], rel=1e-9)
    memory = {name: size * 2**30 for name, size in report["memory_gib"].items()}
    assert memory["checkpoint_parameters"] == pytest.approx(result["checkpoint_parameters"])
    assert memory["cache"] == pytest.approx(result["caches"])
    assert (
        memory["parameters"] == pytest.approx(result["parameters"])
        and result["device_kind"] == report["device_kind"]
    )


def test_invalid_input_is_rejected(made, tmp_path):
    assert "Expected a run directory" in refused("info", tmp_path / "none")
    assert "Expected a configuration file or name" in refused("info", tmp_path / "none.py")
    (tmp_path / "bad.py").write_text("config = 3\n")
    assert "End the file in `config = TrainConfig(...)`" in refused("info", tmp_path / "bad.py")
    (tmp_path / "worse.py").write_text("from dalle_jax.config import *\nTrainConfig(modle=1)\n")
    assert "worse.py:2: TypeError" in refused("info", tmp_path / "worse.py")
    assert "divisible by heads 3, got 10" in refused(
        "info", write_config(tmp_path / "odd.py", "DalleConfig(dim=10, heads=3)")
    )
