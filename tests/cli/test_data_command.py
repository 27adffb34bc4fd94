"""`dalle-jax data` on folders, mixtures and runs, and duplicates between splits."""

import json
import re
from collections import Counter

import numpy as np
from command_line import json_of, refused
from PIL import Image

from dalle_jax.data import images


def test_data_describes_a_folder_and_builds_a_tfds_data_set(folder, tmp_path):
    (folder / "2.png").write_bytes(b"")
    result = json_of("data", folder)
    splits = result["splits"]
    assert result["kind"] == "folder" and sum(s["rows"] for s in splits.values()) == 12
    assert Counter(splits["train"]["unusable"]) + Counter(splits["eval"]["unusable"]) == {
        "empty image file": 1
    }
    built = json_of("data", folder, "--convert-to", "tfds", "--out", tmp_path / "sets", "--size", 16)["built"]
    again = json_of("data", built)
    assert again["kind"] == "tfds" and again["splits"]["train"]["unusable"] == {}
    assert again["splits"]["train"]["rows"] in (10, 11)  # the empty image is in one of the splits
    assert "Expected --convert-to with --out, got one of them" in refused(
        "data", folder, "--convert-to", "tfds"
    )
    assert "Expected --size with --convert-to, got --size 8" in refused("data", folder, "--size", 8)
    assert "got nothing at" in refused("data", "no where")
    assert re.search(
        "Expected a folder .*, tar files, an .npz file, or .* of a TFDS .*, got 'nope', which is neither an existing "
        r"path nor a data set prepared in \S+\. Use an existing path",
        refused("data", "nope"),
    )


def test_data_and_text_accept_a_configuration_with_a_mixture_and_a_run(made, folder, tmp_path):
    (folder / "2.png").write_bytes(b"no image")
    config = tmp_path / "mix.py"
    config.write_text(
        "from dalle_jax.config import *\n"
        f"parts = (FolderSource(path={str(folder)!r}, max_bad_fraction=0.0), ScenesSource(count=40, max_objects=1))\n"
        "source = MixtureSource(parts=parts, weights=(1, 1))\n"
        "config = TrainConfig(model=DVAEConfig(), data=DataConfig(source=source))\n"
    )
    result = json_of("data", config)
    assert result["kind"] == "mixture" and result["splits"]["train"]["captions"]["zh"] == 80  # of the scenes
    causes = Counter(result["splits"]["train"]["unusable"]) + Counter(result["splits"]["eval"]["unusable"])
    assert causes == {"not an image": 1}
    result = json_of("text", "train", config, "--out", tmp_path / "mix.model", "--vocab", 600)
    assert set(result["languages"]) == {"en", "zh"}
    result = json_of("data", made.dalle)
    assert result["kind"] == "scenes" and result["splits"]["train"]["rows"] == 40
    assert "configuration file or name, got none.py" in refused("data", "none.py")


def test_duplicates_between_splits_are_listed_and_written(folder, tmp_path):
    for split in ("train", "val"):
        (folder / split).mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        (folder / f"{i}.png").unlink()
        images.save_png(folder / ("val" if i < 2 else "train") / f"{i}.png", noise)
    (folder / "val" / "again.png").write_bytes((folder / "train" / "7.png").read_bytes())
    Image.open(folder / "train" / "5.png").save(folder / "val" / "jpeg.jpg", quality=95)
    result = json_of("data", folder, "--duplicates", tmp_path / "report")
    assert result["duplicates"] == {
        "exact": 1, "near": 1, "training_duplicates": 2, "evaluation": 4, "training": 10
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "report" / "duplicates.jsonl").read_text().splitlines()]
    assert {(x["eval"], x["train"], x["exact"]) for x in lines} == {
        ("val/again.png", "train/7.png", True), ("val/jpeg.jpg", "train/5.png", False),
    }  # fmt: skip
    assert Image.open(tmp_path / "report" / "duplicates.png").width > 2 * 96
    for path in (folder / "val").iterdir():
        path.unlink()
    assert "Expected rows of split 'val'" in refused("data", folder, "--duplicates", tmp_path / "report")
