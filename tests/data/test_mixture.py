"""Tests of mixtures: fractions in every prefix, order of rows, resuming, and reports of the parts."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from dalle_jax import config
from dalle_jax.cli.train import parse_train_args
from dalle_jax.data.loader.pipeline import eval_batch, open_train_source, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.data.sources.mixture import mixture_pattern
from dalle_jax.data.tfds_builder import build_tfds
from dalle_jax.text.tokenizers import TextTokenizer, train_text_tokenizer

SIZE = 8


def folder(root, colors, *, eval_rows=2, broken=()):
    """Write images of one color each, with the color as caption; the files of `broken` are cut short."""
    lines = []
    for split, values in (("train", colors), ("val", [c + 1 for c in colors[:eval_rows]])):
        for c in values:
            out = io.BytesIO()
            Image.new("RGB", (12, 12), (c, c, c)).save(out, "PNG")
            root.mkdir(parents=True, exist_ok=True)
            (root / f"{c:03d}.png").write_bytes(out.getvalue()[: 40 if c in broken else None])
            lines.append({"file_name": f"{c:03d}.png", "caption": f"color {c}", "split": split})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return config.FolderSource(path=str(root), max_bad_fraction=0.5)


def arrays(path, colors, names, labels):
    x = np.broadcast_to(np.array(colors, np.uint8)[:, None, None, None], (len(colors), 8, 8, 3))
    np.savez(path, train_x=x, train_y=labels, test_x=x[:1], test_y=labels[:1], label_names=names)
    return config.ArraysSource(path=str(path), templates=("{}",))


@pytest.fixture
def parts(tmp_path):
    return (
        folder(tmp_path / "a", [10, 20, 30]),
        arrays(tmp_path / "b.npz", [110, 120, 130, 140, 150], ["cat", "dog"], [0, 1, 0, 1, 1]),
    )


def mixed(*parts, weights, split="train", languages=("en",)):
    return open_source(config.MixtureSource(parts=parts, weights=weights), split, languages=languages)


def color(rows, i):
    return int(rows.image(i, SIZE, "center")[0, 0, 0])


# --- the pattern ----------------------------------------------------------------------------------------


def test_patterns_by_hand():
    """By Tijdeman's rule on paper; equal weights alternate."""
    assert mixture_pattern([2, 1]).tolist() == [0, 1, 0]
    assert mixture_pattern([2, 2]).tolist() == [0, 1, 0, 1]
    assert mixture_pattern([1]).tolist() == [0]
    assert mixture_pattern([1, 1, 1]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_has_less_than_a_row_more_or_less(seed):
    rng = random.Random(seed)
    counts = [rng.choice((1, 2, 7, rng.randrange(1, 300))) for _ in range(rng.randrange(1, 9))]
    found_P, m_P = mixture_pattern(counts), np.arange(1, sum(counts) + 1)
    for part, count in enumerate(counts):
        had_P = np.cumsum(found_P == part)
        assert had_P[-1] == count
        assert np.abs(had_P - m_P * count / sum(counts)).max() < 1


@pytest.mark.parametrize(
    "weights", [(1.0,), (3.0, 1.0), (1.0, 1.0, 1.0), (0.1, 7.7, 1e3, 31.4), (1e300, 1e299)]
)
def test_fractions_are_the_weights(weights):
    mixture = config.MixtureSource(parts=(config.ScenesSource(),) * len(weights), weights=weights)
    assert sum(mixture.counts) == config.MIXTURE_PERIOD
    for weight, count in zip(weights, mixture.counts, strict=True):
        assert abs(count / config.MIXTURE_PERIOD - weight / sum(weights)) < 1 / config.MIXTURE_PERIOD
    doubled = config.MixtureSource(parts=mixture.parts, weights=tuple(w / 4 for w in weights))
    assert doubled.counts == mixture.counts


# --- rows -----------------------------------------------------------------------------------------------


def test_each_part_is_read_in_order_and_starts_again(parts):
    rows = mixed(*parts, weights=(3, 1))
    seen = {0: [], 1: []}
    for i in range(len(rows)):
        seen[rows.locate(i)[0]].append(color(rows, i))
    assert seen[1] == [110, 120, 130, 140, 150]  # the epoch ends when the last part was read once
    assert seen[0] == ([10, 20, 30] * 9)[: len(seen[0])] and abs(len(seen[0]) - 15) <= 3
    for i in range(len(rows)):
        value = color(rows, i)
        name = {110: "cat", 120: "dog", 130: "cat", 140: "dog", 150: "dog"}.get(value, f"color {value}")
        assert rows.captions(i) == {"en": (name,)}


def test_rows_continue_across_the_period(tmp_path):
    """Part 0 has 7 rows, which do not divide its 9,999 rows in a period."""
    parts = (config.ScenesSource(count=7), config.ScenesSource(count=3, seed=1))
    rows = mixed(*parts, weights=(9_999, 1))
    assert 2 * config.MIXTURE_PERIOD < len(rows) <= 3 * config.MIXTURE_PERIOD
    locations = [rows.locate(i) for i in range(len(rows))]
    assert [row for part, row in locations if part == 1] == [0, 1, 2]
    assert [row for part, row in locations if part == 0] == [j % 7 for j in range(len(rows) - 3)]


def test_evaluation_rows_do_not_repeat(parts):
    rows = mixed(*parts, weights=(1, 1), split="eval")  # 2 rows and 1 row: the second of part 1 would repeat
    assert [color(rows, i) for i in range(len(rows))] == [11, 110, 21]
    captions = eval_batch(config.DataConfig(), rows, 10, image_size=SIZE)["caption"]
    assert captions == ["color 11", "cat", "color 21"]


def test_labels_of_one_name_are_one_class(tmp_path):
    a = arrays(tmp_path / "a.npz", [1, 2], ["cat", "dog"], [0, 1])
    b = arrays(tmp_path / "b.npz", [3, 4], ["bird", "cat"], [0, 1])
    rows = mixed(a, folder(tmp_path / "c", [5, 7]), b, weights=(1, 1, 1))
    assert rows.classes == ("cat", "dog", "bird")
    assert {color(rows, i): rows.label(i) for i in range(len(rows))} == {
        1: 0, 2: 1, 3: 2, 4: 0, 5: None, 7: None,
    }  # fmt: skip


# --- the input pipeline ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text_tokenizer.model"
    train_text_tokenizer([f"color {i}" for i in range(200)] + ["cat", "dog"], path, vocab=300)
    return {"text": TextTokenizer.load(path), "text_vocab": 300, "text_len": 8}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_stream_equals_the_straight_one(parts, text, processes):
    data = config.DataConfig(
        source=config.MixtureSource(parts=parts, weights=(3, 1)),
        batch_size=4,
        crop="random",
        languages=("en",),
    )

    def batches(start, n, index=0, count=1):
        source = open_train_source(data)
        each = data.batch_size // count
        rows = range(index * each, (index + 1) * each)
        with train_batches(
            data, source, start=start, image_size=SIZE, bpe_dropout=0.1, **text, rows=rows
        ) as stream:
            return [next(stream) for _ in range(n)]

    straight, resumed = batches(0, 12), [batches(7, 5, p, processes) for p in range(processes)]
    for step in range(5):
        for key in ("image", "text"):
            got = np.concatenate([part[step][key] for part in resumed])
            np.testing.assert_array_equal(got, straight[7 + step][key])
    seen = {int(v) for batch in straight for v in batch["image"][:, 0, 0, 0]}
    assert seen == {10, 20, 30, 110, 120, 130, 140, 150}


def test_broken_images_are_replaced_within_their_part_and_reported(tmp_path):
    a = folder(tmp_path / "a", [10, 20, 30], broken=[20])
    b = folder(tmp_path / "b", [110, 120, 130, 140, 150], broken=[110])
    rows = mixed(a, b, weights=(2, 1))
    colors_read = [color(rows, i) for i in range(len(rows))]
    assert 20 not in colors_read and 110 not in colors_read and {10, 30, 120} <= set(colors_read)
    assert [rows.captions(i)["en"] for i in range(len(rows))] == [(f"color {v}",) for v in colors_read]
    assert sum(rows.report().values()) == 2
    replacements = rows.replacements
    broken_rows = {(0, 1), (1, 0)}
    assert set(replacements) == {i for i in range(len(rows)) if rows.locate(i) in broken_rows}
    for i, j in replacements.items():
        assert rows.locate(j) == {(0, 1): (0, 2), (1, 0): (1, 1)}[rows.locate(i)]
    rows.log_to(tmp_path / "bad_records.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == 2 and {"020.png", "110.png"} == {x["name"].rpartition("/")[2] for x in listed}


def test_the_fingerprint_depends_on_weights_parts_and_their_order(parts):
    a, b = parts
    others = [
        mixed(a, b, weights=(2, 1)), mixed(b, a, weights=(3, 1)), mixed(a, weights=(1,)),
        mixed(a, b, weights=(3, 1), split="eval"),
    ]  # fmt: skip
    first = mixed(a, b, weights=(3, 1)).fingerprint()
    assert first == mixed(a, b, weights=(6, 2)).fingerprint()
    assert len({first, *(rows.fingerprint() for rows in others)}) == 5


def test_a_mixture_becomes_a_tfds_set(parts, tmp_path):
    rows = mixed(*parts, weights=(1, 1))
    with pytest.raises(ValueError, match="no files to store"):
        build_tfds("mix", {"train": rows}, tmp_path / "out")
    where, _ = build_tfds("mix", {"train": rows}, tmp_path / "out", size=SIZE)
    again = open_source(config.TfdsSource(path=str(where)), "train")
    assert [(color(again, i), again.label(i)) for i in range(len(again))] == [
        (color(rows, i), rows.label(i)) for i in range(len(rows))
    ]
    assert {again.label(i) for i in range(len(again))} == {None, 0, 1}


# --- bad input ------------------------------------------------------------------------------------------


def test_a_missing_part_is_named(parts, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data\.source\.parts\[1\] \(tar\): .*nowhere.*does not exist"
    ):
        mixed(parts[0], config.TarSource(path=str(tmp_path / "nowhere.tar")), weights=(1, 1))
    with pytest.raises(ValueError, match=r"data\.source\.parts\[1\] \(arrays\): .*array other_x"):
        mixed(parts[0], config.ArraysSource(path=parts[1].path, train_split="other"), weights=(1, 1))


def test_too_many_broken_images_name_the_part(tmp_path):
    bad = folder(tmp_path / "b", [110, 120, 130], broken=[110, 120, 130])
    rows = mixed(folder(tmp_path / "a", [10]), bad, weights=(1, 1))
    with pytest.raises(ValueError, match=r"data\.source\.parts\[1\]: .*max_bad_fraction"):
        [color(rows, i) for i in range(len(rows))]


def test_an_endless_epoch_is_rejected():
    big = config.ScenesSource(count=2**30)
    with pytest.raises(ValueError, match="Raise the smallest weights"):
        mixed(config.ScenesSource(), big, weights=(9_999, 1))
    with pytest.raises(IndexError, match=r"row in \[0, 4\), got 4"):
        mixed(config.ScenesSource(count=4), weights=(1,)).captions(4)


def test_flags_of_a_run_with_a_mixture(tmp_path):
    file = tmp_path / "mix.py"
    file.write_text(
        "from dalle_jax.config import *\n"
        "parts = (FolderSource(path='cats'), ScenesSource())\n"
        "source = MixtureSource(parts=parts, weights=(3, 1))\n"
        "config = TrainConfig(model=DVAEConfig(), data=DataConfig(source=source))\n"
    )
    got = parse_train_args([str(file), "--data.batch-size", "8", "--data.source.weights", "1", "2"]).config
    assert got.data.batch_size == 8 and got.data.source.weights == (1.0, 2.0)
    assert got.data.source.parts == (config.FolderSource(path="cats"), config.ScenesSource())
    assert config.from_json(config.TrainConfig, config.to_json(got)) == got
