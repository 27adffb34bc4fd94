"""Tests of the input pipeline: batch k depends only on the configuration and k, with any threads and processes."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
from data_files import IMAGE_SIZE, assert_same_batches, take_batches, write_numbered_tar

from dalle_jax import config
from dalle_jax.data.loader.pipeline import eval_batch, open_train_source, train_batches
from dalle_jax.data.sources import open_source


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_numbered_tar(tmp_path_factory.mktemp("data") / "a.tar")


@pytest.fixture
def data(tar):
    return config.DataConfig(source=tar, batch_size=8, crop="random", num_threads=2, prefetch=3)


def rows_of(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def test_shapes_and_types(data, tokenizer):
    (batch,) = take_batches(data, open_train_source(data), tokenizer, 1)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((8, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        "text": ((8, 12), np.int32),
    }
    assert take_batches(data, open_train_source(data), None, 1)[0].keys() == {"image"}


def test_a_resumed_stream_equals_the_straight_one(data, tokenizer):
    source = open_train_source(data)
    straight = take_batches(data, source, tokenizer, 12)
    for start in (1, 5, 11):
        assert_same_batches(take_batches(data, source, tokenizer, 12 - start, start=start), straight[start:])
    assert_same_batches(take_batches(data, open_train_source(data), tokenizer, 12), straight)


def test_late_steps_start_as_fast_as_the_first(data):
    source = open_train_source(data)
    began = time.monotonic()
    (far,) = take_batches(data, source, None, 1, start=10**9)
    assert time.monotonic() - began < 5
    assert_same_batches(take_batches(data, source, None, 2, start=10**9 - 1)[1:], [far])


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (5, 2), (3, 16)])
def test_batches_do_not_depend_on_threads(data, tokenizer, threads, prefetch):
    source = open_train_source(data)
    other = config.DataConfig(
        source=data.source, batch_size=8, crop="random", num_threads=threads, prefetch=prefetch
    )
    assert_same_batches(take_batches(other, source, tokenizer, 10), take_batches(data, source, tokenizer, 10))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_global_batch_in_order(data, tokenizer, processes):
    source = open_train_source(data)
    want = take_batches(data, source, tokenizer, 6, start=2)
    parts = [
        take_batches(
            data, source, tokenizer, 6, start=2, rows=range(p * 8 // processes, (p + 1) * 8 // processes)
        )
        for p in range(processes)
    ]
    got = [{key: np.concatenate([part[k][key] for part in parts]) for key in want[k]} for k in range(6)]
    assert_same_batches(got, want)


def test_rows_need_not_be_adjacent(data, tokenizer):
    """A mesh may give a process any rows; each equals its row of the whole batch, with its caption."""
    source = open_train_source(data)
    want = take_batches(data, source, tokenizer, 3, start=4)
    got = take_batches(data, source, tokenizer, 3, start=4, rows=np.array([1, 2, 5]))
    assert_same_batches(got, [{key: batch[key][[1, 2, 5]] for key in batch} for batch in want])


def test_an_epoch_is_a_permutation_and_the_next_another(data):
    source = open_train_source(data)
    n = len(source)
    rows = rows_of(take_batches(data, source, None, 3 * n // 8))
    epochs = rows[: 3 * n].reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(n))}) == 4


def test_the_seed_changes_the_order(data, tokenizer):
    source = open_train_source(data)
    other = config.DataConfig(source=data.source, batch_size=8, crop="random", seed=1)
    a, b = take_batches(data, source, tokenizer, 3), take_batches(other, source, tokenizer, 3)
    assert (rows_of(a) != rows_of(b)).any()


def test_captions_are_chosen_among_languages_and_captions(data, tokenizer):
    options = dict(start=0, image_size=IMAGE_SIZE, text=tokenizer, text_vocab=400, text_len=32)
    source, counts = open_train_source(data), Counter()
    with train_batches(data, source, **options) as batches:
        for _ in range(100):
            batch = next(batches)
            for row, ids in zip(batch["image"][:, 0, 0, 0], batch["text"], strict=True):
                caption = tokenizer.decode(ids)
                assert str(row) in caption
                counts[caption.replace(str(row), "#")] += 1
    assert set(counts) == {"row #", "image of #", "第#行", "图#"}
    assert all(150 < count < 250 for count in counts.values())


def test_one_language(tar, tokenizer):
    data = config.DataConfig(source=tar, batch_size=8, languages=("zh",))
    batches = take_batches(data, open_train_source(data), tokenizer, 4)
    assert all(any(c > "\u4e00" for c in tokenizer.decode(ids)) for batch in batches for ids in batch["text"])


def test_a_source_shorter_than_a_batch_repeats(tmp_path, data, tokenizer):
    source = open_source(write_numbered_tar(tmp_path / "a.tar", rows=8), "train")
    assert len(source) == 3
    batches = take_batches(data, source, tokenizer, 3)
    assert Counter(rows_of(batches).tolist()) == {0: 8, 1: 8, 2: 8}
    assert_same_batches(take_batches(data, source, tokenizer, 1, start=2), batches[2:])


def test_a_broken_image_moves_no_other_row(tmp_path, data, tokenizer):
    broken = write_numbered_tar(tmp_path / "a.tar", broken=(5, 6, 20))
    damaged = config.DataConfig(source=broken, batch_size=8, crop="random")
    source = open_train_source(damaged)
    whole = take_batches(data, open_train_source(data), tokenizer, 12)
    got = take_batches(damaged, source, tokenizer, 12)
    rows = rows_of(whole).astype(int)
    want = np.select([(rows == 5) | (rows == 6), rows == 20], [7, 21], rows)
    np.testing.assert_array_equal(rows_of(got), want)
    untouched = (rows == want).reshape(12, 8)
    for k in range(12):
        for key in ("image", "text"):
            np.testing.assert_array_equal(got[k][key][untouched[k]], whole[k][key][untouched[k]])
    for k in range(12):  # the caption belongs to the image
        for row, ids in zip(got[k]["image"][:, 0, 0, 0], got[k]["text"], strict=True):
            assert str(row) in tokenizer.decode(ids)
    assert_same_batches(take_batches(damaged, open_train_source(damaged), tokenizer, 4, start=8), got[8:])


def test_errors_of_reading_reach_the_caller(tmp_path):
    source = config.TarSource(path=write_numbered_tar(tmp_path / "a.tar", broken=range(20)).path)
    data = config.DataConfig(source=source, batch_size=8)
    with pytest.raises(ValueError, match=r"(?s)records of .*truncated image"):
        take_batches(data, open_train_source(data), None, 20)


def test_closing_ends_the_threads(data):
    before = set(threading.enumerate())
    batches = train_batches(data, open_train_source(data), start=0, image_size=IMAGE_SIZE)
    next(batches)
    threads = [t for t in threading.enumerate() if t not in before]
    assert len(threads) == data.num_threads
    batches.close()
    batches.close()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_scenes(tokenizer):
    data = config.DataConfig(source=config.ScenesSource(count=100), batch_size=4)
    source = open_train_source(data)
    batches = take_batches(data, source, tokenizer, 2, image_size=32)
    assert_same_batches(take_batches(data, source, tokenizer, 1, start=1, image_size=32), batches[1:])
    held_out = eval_batch(data, open_source(data.source, "eval"), 3, image_size=32)
    assert held_out["image"].shape == (3, 32, 32, 3) and all(held_out["caption"])


def test_bad_arguments(data, tokenizer):
    source = open_train_source(data)
    for rows in ([], [3, 2], [2, 2], [6, 8], [-1, 0]):
        with pytest.raises(ValueError, match=r"ascending rows in \[0, 8\), got \["):
            take_batches(data, source, None, 1, rows=rows)
    with pytest.raises(ValueError, match="start step of 0 or more, got -1"):
        take_batches(data, source, None, 1, start=-1)
    with pytest.raises(ValueError, match="Expected image_size"):
        take_batches(data, source, None, 1, image_size=None)
    with pytest.raises(ValueError, match="text_vocab and text_len"):
        train_batches(data, source, start=0, image_size=8, text=tokenizer)
    bare = open_source(data.source, "train", languages=())
    with pytest.raises(ValueError, match="Expected captions for the text of a row"):
        take_batches(data, bare, tokenizer, 1)


# --- evaluation -----------------------------------------------------------------------------------------


def test_eval_batch_is_fixed(data, tokenizer):
    source = open_source(data.source, "eval", languages=data.languages)
    options = dict(image_size=IMAGE_SIZE, text=tokenizer, text_vocab=400, text_len=12)
    batch = eval_batch(data, source, 100, **options)
    assert batch["caption"] == ["row 32", "第33行", "row 34", "第35行", "row 36"]
    assert batch["image"].shape == (5, IMAGE_SIZE, IMAGE_SIZE, 3) and batch["text"].shape == (5, 12)
    assert [tokenizer.decode(ids) for ids in batch["text"]] == batch["caption"]
    for rows in (3, range(2, 5)):
        part = eval_batch(data, source, rows, **options)
        which = slice(0, 3) if rows == 3 else slice(2, 5)
        assert part["caption"] == batch["caption"][which]
        np.testing.assert_array_equal(part["image"], batch["image"][which])
        np.testing.assert_array_equal(part["text"], batch["text"][which])
    with pytest.raises(ValueError, match="got 0 of a source of 5 rows"):
        eval_batch(data, source, 0, **options)


def test_eval_batch_without_captions(data):
    batch = eval_batch(data, open_source(data.source, "eval", languages=()), 2, image_size=IMAGE_SIZE)
    assert batch["caption"] == ["", ""] and batch.keys() == {"image", "caption"}


def test_labels_are_those_of_the_rows(tmp_path):
    """Row i has the value i everywhere and the class i modulo 3; a source without classes has -1."""
    images = np.repeat(np.arange(7, dtype=np.uint8), 12).reshape(7, 2, 2, 3)
    arrays = {f"{split}_x": images for split in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, train_y=np.arange(7) % 3, test_y=np.arange(7) % 3)
    data = config.DataConfig(source=config.ArraysSource(path=str(tmp_path / "a.npz")), batch_size=4)
    with train_batches(
        data, open_source(data.source, "train", languages=()), start=0, image_size=2, with_labels=True
    ) as rows:
        batch = next(rows)
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (4,)
    np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 3)
    batch = eval_batch(
        data, open_source(data.source, "eval", languages=()), 7, image_size=2, with_labels=True
    )
    np.testing.assert_array_equal(batch["label"], [0, 1, 2, 0, 1, 2, 0])
    scenes = config.DataConfig(source=config.ScenesSource(count=3))
    batch = eval_batch(scenes, open_source(scenes.source, "eval"), 2, image_size=32, with_labels=True)
    assert batch["label"].tolist() == [-1, -1]
