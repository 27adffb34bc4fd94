"""Tests of encoded data sets: resuming, and rows and captions equal to those of the images."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    CODES_SIDE,
    codes_info,
    data_config,
    take_batches,
    write_codes,
    write_numbered_tar,
    write_shard,
)

from dalle_jax import config
from dalle_jax.data.codes import (
    CodesDataset,
    ShardWriter,
    describe_codes_source,
    is_shard_complete,
    open_codes_dir,
)
from dalle_jax.data.loader.pipeline import open_train_source
from dalle_jax.data.sources import open_source


@pytest.mark.parametrize("rows", [None, 11])
@pytest.mark.parametrize("broken", [(), (5, 6)])
def test_codes_have_the_rows_of_the_images(tmp_path, tokenizer, rows, broken):
    tar, short = (
        write_numbered_tar(tmp_path / "a.tar", broken=broken),
        write_numbered_tar(tmp_path / "b.tar", rows=16),
    )
    write_codes(tmp_path / "codes", data_config(tar), rows)
    pixels, coded = data_config(tar if rows is None else short), data_config(tar, tmp_path / "codes")
    if rows and broken:  # broken rows of the short tar have other replacements
        short = write_numbered_tar(tmp_path / "b.tar", rows=16, broken=broken)
        pixels = data_config(short)
    source, codes = open_train_source(pixels), open_train_source(coded)
    assert len(codes) == len(source) == (rows or 32)
    want = take_batches(pixels, source, tokenizer, 8, image_size=CODES_SIDE)
    os.rename(tmp_path / "a.tar", tmp_path / "gone")  # neither images nor captions are read again
    got = take_batches(coded, codes, tokenizer, 8, image_size=None)
    for a, b in zip(want, got, strict=True):
        assert b.keys() == {"codes", "text"} and b["codes"].dtype == np.int32
        np.testing.assert_array_equal(a["text"], b["text"])
        np.testing.assert_array_equal(a["image"][..., 0].reshape(8, -1), b["codes"])


def test_shard_k_holds_its_rows_and_processes_share_them(tmp_path):
    data = data_config(config.ScenesSource(count=30))
    source = open_source(data.source, "train")
    info = codes_info(source, data, num_codes=2, vocab=1000)
    assert [list(info.shard(k)) for k in (0, 4)] == [list(range(7)), [28, 29]] and info.shards == 5
    open_codes_dir(tmp_path, info)
    for process in range(2):
        for k in range(process, info.shards, 2):
            with ShardWriter(tmp_path, info, k) as writer:
                for i in info.shard(k):
                    writer.add(np.array([i, 999 - i]), source.captions(i), i % 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"codes-0000{k}-of-00005.array_record" for k in range(5)), "codes.json",
    ]  # fmt: skip
    rows = CodesDataset(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(rows.row, [*range(30)] * 5))
    for n, (codes, captions, label) in enumerate(results):
        i = n % 30
        assert codes.tolist() == [i, 999 - i] and captions == source.captions(i) and label == i % 3
    with pytest.raises(IndexError, match=r"row in \[0, 30\), got 30"):
        rows.row(30)


def test_the_number_of_open_shards_is_limited(tmp_path, monkeypatch):
    data = data_config(config.ScenesSource(count=30))
    source = open_source(data.source, "train")
    info = codes_info(source, data, shard_rows=2, num_codes=1)
    open_codes_dir(tmp_path, info)
    for k in range(info.shards):
        with ShardWriter(tmp_path, info, k) as writer:
            for i in info.shard(k):
                writer.add(np.array([i]), {}, None)
    monkeypatch.setattr("dalle_jax.data.codes._MAX_OPEN_SHARDS", 3)
    rows = CodesDataset(tmp_path)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: int(rows.row(i)[0][0]), [*range(30)] * 10))
    assert results == [*range(30)] * 10 and len(rows._readers) == 3


def test_a_killed_encoder_resumes(tmp_path):
    """After kill -9 within a shard, complete shards remain unchanged and the others equal those of a straight run."""
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import data_files as t
from dalle_jax.data.sources import TarDataset
def image(self, i, *more, real=TarDataset.image):
    if i == 17: print("here", flush=True); time.sleep(60)
    return real(self, i, *more)
TarDataset.image = image
t.write_codes({str(tmp_path / "codes")!r}, t.data_config(t.config.TarSource(path={str(tmp_path / "a.tar")!r})))
"""
    data = data_config(write_numbered_tar(tmp_path / "a.tar"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    source = open_source(data.source, "train")
    info = codes_info(source, data)
    complete = [k for k in range(info.shards) if is_shard_complete(tmp_path / "codes", info, k)]
    assert complete == [0, 1]
    unfinished = [p.name for p in (tmp_path / "codes").iterdir() if p.name.startswith(".codes-00002")]
    assert len(unfinished) == 1  # the shard being written
    with pytest.raises(
        ValueError, match=r"3 of 5 shards are missing .*codes-00002-of-00005.*To resume, run the same"
    ):
        CodesDataset(tmp_path / "codes")
    before = {
        k: (tmp_path / "codes" / f"codes-{k:05d}-of-00005.array_record").stat().st_mtime_ns for k in complete
    }
    time.sleep(0.02)
    open_codes_dir(tmp_path / "codes", info)
    for k in range(info.shards):
        if not is_shard_complete(tmp_path / "codes", info, k):
            write_shard(tmp_path / "codes", info, k, source)
    write_codes(tmp_path / "straight", data)
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "codes" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in (tmp_path / "codes").iterdir()} == {
        p.name for p in (tmp_path / "straight").iterdir()
    }
    for k, at in before.items():
        assert (tmp_path / "codes" / f"codes-{k:05d}-of-00005.array_record").stat().st_mtime_ns == at


def test_invalid_codes_are_not_written(tmp_path):
    data = data_config(config.ScenesSource(count=9))
    source = open_source(data.source, "train")
    info = codes_info(source, data, num_codes=2, vocab=4)
    open_codes_dir(tmp_path / "c", info)
    for bad in ([0, 4], [-1, 0], [1, 2, 3]):
        raises = pytest.raises(ValueError, match=r"codes \(2,\) in \[0, 4\) for row 7, got")
        with raises, ShardWriter(tmp_path / "c", info, 1) as writer:
            writer.add(np.array(bad), {}, None)
    raises = pytest.raises(ValueError, match=r"2 rows in codes-00001.*got 1")
    with raises, ShardWriter(tmp_path / "c", info, 1) as writer:
        writer.add(np.array([0, 1]), {}, None)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["codes.json"]  # no partial shard remains
    for change in ({"tokenizer": "other"}, {"rows": 8}, {"shard_rows": 5}, {"fingerprint": "{}"}):
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"holds other codes .{name} .*there.*now.*Choose another --out"):
            open_codes_dir(tmp_path / "c", dataclasses.replace(info, **change))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(ValueError, match=r"got .*mine with x"):
        open_codes_dir(tmp_path / "mine", info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": config.ScenesSource(count=30, seed=1)}, r"data\.source\.seed 0 there, 1 here"),
        ({"source": config.FolderSource(path="x")}, r"data\.source\.kind 'scenes' there, 'folder' here"),
        ({"languages": ("en",)}, r"captions in en, zh there, en here"),
        ({"crop": "none"}, r"crop 'center' there, 'none' here"),
        ({"crop": "narrow", "languages": ("zh", "en")}, None),
    ],
)
def test_codes_of_other_data_are_rejected(tmp_path, change, message):
    data = data_config(config.ScenesSource(count=30))
    write_codes(tmp_path / "codes", data, 4, image_size=32)
    requested = dataclasses.replace(data, codes=str(tmp_path / "codes"), **change)
    if message is None:
        assert len(open_train_source(requested)) == 4
        return
    with pytest.raises(ValueError, match=rf"was encoded from other data \(.*{message}"):
        open_train_source(requested)


def test_the_description_of_a_source_does_not_depend_on_its_path():
    tar = config.TarSource(path="a.tar")
    assert describe_codes_source(tar) == describe_codes_source(
        config.TarSource(path="b.tar", max_bad_fraction=0.5, eval_split="x")
    )
    assert describe_codes_source(tar) != describe_codes_source(
        config.TarSource(path="a.tar", train_split="extra")
    )
    mixed = [config.MixtureSource(parts=(config.FolderSource(path=p),), weights=(1,)) for p in "ab"]
    assert describe_codes_source(mixed[0]) == describe_codes_source(mixed[1])


def test_damaged_directories_of_codes_are_rejected(tmp_path):
    data = data_config(config.ScenesSource(count=30))
    codes = tmp_path / "codes"
    with pytest.raises(ValueError, match=r"directory that `dalle-jax encode .*codes does not exist"):
        CodesDataset(codes)
    (tmp_path / "codes.npz").touch()
    with pytest.raises(ValueError, match=r"Expected in data\.codes a directory .*codes\.npz is a file"):
        CodesDataset(tmp_path / "codes.npz")
    codes.mkdir()
    with pytest.raises(ValueError, match=r"codes has no codes\.json"):
        CodesDataset(codes)
    codes.rmdir()
    info = write_codes(codes, data, 14, image_size=32)
    description = json.loads((codes / "codes.json").read_text())
    for bad, message in [
        ("{", "Expecting"), ("[]", ""), (json.dumps(description | {"format": 1}), "format 1, this version reads 2"),
        (json.dumps({k: v for k, v in description.items() if k != "vocab"}), "vocab"),
    ]:  # fmt: skip
        (codes / "codes.json").write_text(bad)
        with pytest.raises(ValueError, match=rf"codes\.json is damaged \(.*{message}"):
            CodesDataset(codes)
    (codes / "codes.json").write_text(json.dumps(description))
    shard = codes / "codes-00001-of-00002.array_record"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    for at in range(0, len(damaged), 97):
        damaged[at] ^= 0x55
    other = (codes / "codes-00000-of-00002.array_record").read_bytes()
    for bad in (b"", b"text", whole[: len(whole) // 2], bytes(damaged)):
        shard.write_bytes(bad)
        assert not is_shard_complete(codes, info, 1) or bad == bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read row \d+ in .*codes-00001.*Delete that file"):
            rows = CodesDataset(codes)
            [rows.row(i) for i in range(14)]
    smaller = dataclasses.replace(info, rows=13)
    shard.write_bytes(other)
    assert is_shard_complete(codes, info, 1) and not is_shard_complete(codes, smaller, 1)


def test_a_code_out_of_range_names_its_row(tmp_path):
    data = data_config(config.ScenesSource(count=30))
    write_codes(tmp_path / "c", data, 14, image_size=32)
    description = json.loads((tmp_path / "c" / "codes.json").read_text()) | {"vocab": 2}
    (tmp_path / "c" / "codes.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"row 3 in .*codes from \d+ to \d+, not in \[0, 2\)"):
        CodesDataset(tmp_path / "c").row(3)
