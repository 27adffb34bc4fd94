"""Tests of folders, npz files and TFDS directories: rows, captions, classes, splits, unusable files."""

import dataclasses
import json
import shutil
import struct
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from data_files import encode_image, solid_image, write_records
from PIL import Image

from dalle_jax import config
from dalle_jax.data.codes import CodesInfo, ShardWriter, describe_codes_source, open_codes_dir
from dalle_jax.data.loader.pipeline import open_train_source, train_batches
from dalle_jax.data.sources import infer_source, open_source
from dalle_jax.data.sources.tfrecord import crc32c, masked_crc
from dalle_jax.data.tfds_builder import build_tfds
from dalle_jax.text.tokenizers import TextTokenizer, train_text_tokenizer


def png(i, kind="PNG"):
    return encode_image(solid_image((i, 100, 200), (12, 12)), kind)


def noise():
    return encode_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))


def write(root, name, data):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def number(rows, i):
    return int(rows.image(i, 4, "center")[0, 0, 0])


def open_folder(root, split="train", languages=("en", "zh"), **fields):
    return open_source(config.FolderSource(path=str(root), **fields), split, languages=languages)


def captions_by_number(rows):
    return {number(rows, i): rows.captions(i) for i in range(len(rows))}


# --- folders --------------------------------------------------------------------------------------------


def test_captions_in_text_files(tmp_path):
    for i in range(4):
        write(tmp_path, f"a/{i}.png", png(i))
        write(tmp_path, f"a/{i}.txt", f"\ufeffone {i}\r\n\r\n two {i} \n")
    write(tmp_path, "a/.hidden.png", png(9))
    rows = open_folder(tmp_path, eval_fraction=0.0)
    assert (
        captions_by_number(rows) == {i: {"en": (f"one {i}", f"two {i}")} for i in range(4)}
        and rows.classes == ()
    )


def test_captions_in_json_files(tmp_path):
    write(tmp_path, "0.png", png(0))
    write(tmp_path, "0.json", json.dumps({"captions": ["x"], "captions_zh": "红", "split": "train"}))
    write(tmp_path, "1.png", png(1))
    write(tmp_path, "1.json", json.dumps({"caption": "y", "split": "val"}))
    assert captions_by_number(open_folder(tmp_path)) == {0: {"en": ("x",), "zh": ("红",)}}
    assert captions_by_number(open_folder(tmp_path, "eval")) == {1: {"en": ("y",)}}


@pytest.mark.parametrize("form", ["captions.jsonl", "metadata.jsonl", "metadata.csv"])
def test_metadata_in_split_folders(tmp_path, form):
    for split, first in (("train", 0), ("validation", 2)):
        names = [(f"{i}.png", f"say, {i}") for i in (first, first + 1)]
        for i in (first, first + 1):
            write(tmp_path, f"{split}/{i}.png", png(i))
        lines = [json.dumps({"file_name": n, "text": t}) for n, t in names]
        rows = ["file_name,text", *(f'{n},"{t}"' for n, t in names)] if form.endswith("csv") else lines
        write(tmp_path, f"{split}/{form}", "\n".join(rows))
    assert captions_by_number(open_folder(tmp_path)) == {i: {"en": (f"say, {i}",)} for i in (0, 1)}
    assert captions_by_number(open_folder(tmp_path, "eval")) == {i: {"en": (f"say, {i}",)} for i in (2, 3)}


def test_subfolders_are_classes(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("red_fox", "cat")):
            write(tmp_path, f"{split}/{name}/1.png", png(10 * i))
    rows = open_folder(tmp_path, templates=("a {}", "one {}"))
    assert rows.classes == ("cat", "red_fox")
    assert captions_by_number(rows) == {
        10: {"en": ("a cat", "one cat")},
        0: {"en": ("a red fox", "one red fox")},
    }
    assert {number(rows, i): rows.label(i) for i in range(2)} == {10: 0, 0: 1}
    assert len(open_folder(tmp_path, "eval", eval_split="test")) == 2


def test_new_images_move_no_other_between_the_splits(tmp_path):
    for i in range(60):
        write(tmp_path, f"{i}.png", png(i))
    first = {
        s: set(captions_by_number(open_folder(tmp_path, s, (), eval_fraction=0.2))) for s in ("train", "eval")
    }
    assert first["train"] | first["eval"] == set(range(60)) and not first["train"] & first["eval"]
    assert 4 <= len(first["eval"]) <= 20
    for i in range(60, 120):
        write(tmp_path, f"{i}.png", png(i))
    later = {
        s: set(captions_by_number(open_folder(tmp_path, s, (), eval_fraction=0.2))) for s in ("train", "eval")
    }
    assert all(first[s] <= later[s] for s in first)


def test_at_least_one_image_is_held_out(tmp_path):
    for i in range(2):
        write(tmp_path, f"{i}.png", png(i))
    assert (
        len(open_folder(tmp_path, "eval", (), eval_fraction=1e-9))
        == len(open_folder(tmp_path, languages=()))
        == 1
    )


def test_unusable_records_of_a_folder_are_counted_and_listed(tmp_path):
    root, good = tmp_path / "data", 40
    lines = []
    for i in range(good):
        write(root, f"{i:02d}.png", png(i))
        lines.append(
            json.dumps({"file_name": f"{i:02d}.png", "caption": f"n {i}", "split": "train"}).encode()
        )
    for name, data in (("x0", b""), ("x1", b"no image"), ("x2", noise()[:900]), ("x3", png(1))):
        write(root, f"{name}.png", data)
        if name != "x3":
            lines.append(json.dumps({"file_name": f"{name}.png", "caption": "c"}).encode())
    lines += [
        b'{"file_name": "missing.png", "caption": "c"}', b"{", b'{"caption": "c"}', b'{"file_name": "00.png"}',
        b'{"file_name": "../data/00.png", "caption": "c"}', b'{"file_name": "01.png", "caption": "\xff"}',
        b'{"file_name": "/etc/passwd", "caption": "c"}',
    ]  # fmt: skip
    (root / "captions.jsonl").write_bytes(b"\n".join(lines))
    rows = open_folder(root, max_bad_fraction=0.5)
    rows.log_to(tmp_path / "bad_records.jsonl")
    numbers = [number(rows, i) for i in range(len(rows))]
    assert numbers == [*range(good), 0, 0, 0]  # the next row that decodes; after the last row the first
    assert rows.captions(good) == {"en": ("n 0",)}
    assert rows.report() == {
        "missing image file": 1, "unreadable metadata line": 2, "metadata line without a file name": 1,
        "image listed twice": 1, "image outside the folder": 2, "no metadata line": 1,
        "empty image file": 1, "not an image": 1, "truncated image": 1,
    }  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == sum(rows.report().values())
    assert {"name": "missing.png", "cause": "missing image file"} in listed
    assert {"name": "x0.png", "cause": "empty image file"} in listed
    again = open_folder(root, max_bad_fraction=0.5)  # a resumed run logs no record twice
    again.log_to(tmp_path / "bad_records.jsonl")
    number(again, good)
    assert len((tmp_path / "bad_records.jsonl").read_text().splitlines()) == len(listed)
    with pytest.raises(
        ValueError, match=r"(?s)of 51 records of .*max_bad_fraction.*unreadable metadata line"
    ):
        open_folder(root)


def test_unusable_caption_files_are_counted_by_cause(tmp_path):
    for i in range(4):
        write(tmp_path, f"{i}.png", png(i))
    for name, data in (("0.txt", "good"), ("1.txt", b"\xff\xfe\xff"), ("2.txt", "\n \n"), ("3.json", "[1]")):
        write(tmp_path, name, data)
    rows = open_folder(tmp_path, eval_fraction=0.0, max_bad_fraction=0.8)
    assert len(rows) == 1 and rows.report() == {"unreadable caption file": 2, "no caption in en or zh": 1}


def test_invalid_folders_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a folder of images"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"in .* and the folders below it, got none"):
        open_folder(tmp_path)


# --- npz ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("npz") / "tiny.npz", np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 8, 8, 3), np.uint8)
    x[:, :, :, 0] = np.arange(20)[:, None, None]
    y = np.arange(20) % 2
    np.savez(path, train_x=x[:15], train_y=y[:15], test_x=x[15:], test_y=y[15:], label_names=["cat", "dog"])
    return path


def test_arrays(npz):
    rows = open_source(config.ArraysSource(path=str(npz)), "train")
    assert len(rows) == 15 and rows.classes == ("cat", "dog") and rows.label(3) == 1
    assert rows.captions(3) == {"en": ("a photo of a dog",)}
    with np.load(npz) as file:
        np.testing.assert_array_equal(rows.image(4, 8, "center"), file["train_x"][4])
    assert rows.image(4, 4, "random", np.random.default_rng(0)).shape == (4, 4, 3)
    assert len(open_source(config.ArraysSource(path=str(npz)), "eval", languages=())) == 5


def test_invalid_arrays_are_rejected(tmp_path, npz):
    with pytest.raises(
        ValueError, match=r"Expected an array dev_x or x_dev in .*, got .*\. Set data\.source\.path"
    ):
        open_source(config.ArraysSource(path=str(npz), train_split="dev"), "train")
    with pytest.raises(
        FileNotFoundError, match=r"got no file .*no\.npz\. Set data\.source\.path to an npz file"
    ):
        open_source(config.ArraysSource(path=str(tmp_path / "no.npz")), "train")
    np.savez(tmp_path / "f.npz", train_x=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"Expected uint8 .*got float64 \(2, 4, 4, 3\)"):
        open_source(config.ArraysSource(path=str(tmp_path / "f.npz")), "train", languages=())


# --- TFDS -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, npz):
    rows = {
        s: open_source(config.ArraysSource(path=str(npz)), t)
        for s, t in (("train", "train"), ("test", "eval"))
    }
    return build_tfds("tiny", rows, tmp_path_factory.mktemp("tfds"))[0]


def test_a_labeled_tfds_set_has_the_rows_of_its_source(labeled, npz):
    for split in ("train", "eval"):
        want = open_source(config.ArraysSource(path=str(npz)), split)
        got = open_source(config.TfdsSource(path=str(labeled)), split)
        assert len(got) == len(want) and got.classes == want.classes
        for i in range(len(want)):
            np.testing.assert_array_equal(got.image(i, 8, "center"), want.image(i, 8, "center"))
            assert got.captions(i) == want.captions(i) and got.label(i) == want.label(i)
    assert "tensorflow" not in sys.modules


def test_tfds_by_name_version_and_slice(labeled):
    root = str(labeled.parent.parent)
    for name in ("tiny", "tiny:1.0.0"):
        assert len(open_source(config.TfdsSource(path=name, data_dir=root), "train")) == 15
    sliced = config.TfdsSource(path="tiny", data_dir=root, train_split="train[5:]", eval_split="train[:5]")
    assert number(open_source(sliced, "train"), 0) == 5 and len(open_source(sliced, "eval")) == 5
    with pytest.raises(FileNotFoundError, match=r"got 'tiny:2\.0\.0', which is neither .* prepared in"):
        open_source(config.TfdsSource(path="tiny:2.0.0", data_dir=root), "train")
    with pytest.raises(ValueError, match=r"no split 'dev', it has .*train"):
        open_source(config.TfdsSource(path="tiny", data_dir=root, train_split="dev"), "train")
    with pytest.raises(ValueError, match=r"no field 'photo'.*image_field to one of"):
        open_source(config.TfdsSource(path="tiny", data_dir=root, image_field="photo"), "train")


def test_a_tfds_set_of_a_folder_omits_broken_images(tmp_path):
    for i in range(8):
        write(tmp_path, f"in/{i}.jpg", png(i, kind="JPEG") if i != 3 else b"no")
        write(tmp_path, f"in/{i}.json", json.dumps({"captions": [f"n {i}", "b"], "captions_zh": ["红"]}))
    rows = open_folder(tmp_path / "in", eval_fraction=0.0)
    where, left_out = build_tfds("set", {"train": rows}, tmp_path / "out")
    assert left_out == {"train": {"not an image": 1}}
    got = open_source(config.TfdsSource(path=str(where)), "train")
    usable = [0, 1, 2, 4, 5, 6, 7]
    assert [got.captions(i) for i in range(7)] == [{"en": (f"n {i}", "b"), "zh": ("红",)} for i in usable]
    assert [got.stored_image(i) for i in range(7)] == [
        rows.stored_image(i) for i in usable
    ]  # the original files
    with pytest.raises(ValueError, match=r"1\.0\.0 exists"):
        build_tfds("set", {"train": rows}, tmp_path / "out")
    with pytest.raises(ValueError, match="no files to store"):
        build_tfds("s", {"train": open_source(config.ScenesSource(count=2), "train")}, tmp_path / "out")


# --- TFDS as tfrecord -------------------------------------------------------------------------------------


def as_tfrecord(directory, out):
    """Copy a TFDS directory with its examples in tfrecord files, as TensorFlow writes them."""
    out.mkdir(parents=True)
    for path in directory.iterdir():
        if ".array_record-" not in path.name:
            shutil.copyfile(path, out / path.name)
            continue
        reader = ArrayRecordReader(str(path))
        with open(out / path.name.replace(".array_record-", ".tfrecord-"), "wb") as file:
            for data in reader.read_all():
                head = struct.pack("<Q", len(data))
                file.write(
                    head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))
                )
    about = json.loads((out / "dataset_info.json").read_text())
    (out / "dataset_info.json").write_text(json.dumps(about | {"fileFormat": "tfrecord"}))
    return out


@pytest.fixture(scope="module")
def tfrecord(labeled, tmp_path_factory):
    return as_tfrecord(labeled, tmp_path_factory.mktemp("tfrecord") / "tiny" / "1.0.0")


def test_crc32c_equals_published_values():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert masked_crc(b"") == 0xA282EAD8


def test_a_tfds_set_of_tfrecord_has_the_same_rows(labeled, tfrecord):
    for split in ("train", "eval"):
        want, got = (open_source(config.TfdsSource(path=str(p)), split) for p in (labeled, tfrecord))
        assert len(got) == len(want) > 0 and got.classes == want.classes
        for i in range(len(want)):
            assert got.stored_image(i) == want.stored_image(i) and got.captions(i) == want.captions(i)
            assert got.label(i) == want.label(i)
    sliced = config.TfdsSource(path=str(tfrecord), train_split="train[5:]", eval_split="train[:5]")
    assert number(open_source(sliced, "train"), 0) == 5 and len(open_source(sliced, "eval")) == 5
    assert "tensorflow" not in sys.modules


def test_damaged_tfrecords_are_rejected(labeled, tmp_path):
    copy = as_tfrecord(labeled, tmp_path / "tiny" / "1.0.0")
    (file,) = copy.glob("*-train.tfrecord-*")
    whole = file.read_bytes()
    second = 16 + struct.unpack("<Q", whole[:8])[0]
    for bad, at in [
        (whole[:-1], r"record 14"), (whole[:100], r"byte 0, in record 0"), (whole + b"x", "record 15"),
        (whole[:second] + b"\xff" * 8 + whole[second + 8 :], f"byte {second}, in record 1"),
        (struct.pack("<Q", second - 17) + whole[8:], "byte 0, in record 0"),  # a plausible length
    ]:  # fmt: skip
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"train\.tfrecord.* is damaged or cut short at .*{at}"):
            open_source(config.TfdsSource(path=str(copy)), "train")
    file.write_bytes(whole[:second])
    with pytest.raises(ValueError, match=r"Expected 15 records in .*, got 1"):
        open_source(config.TfdsSource(path=str(copy)), "train")
    file.unlink()
    with pytest.raises(ValueError, match="No such file"):
        open_source(config.TfdsSource(path=str(copy)), "train")
    about = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(about | {"fileFormat": "riegeli"}))
    with pytest.raises(ValueError, match=r"Expected array_record or tfrecord format .*got riegeli"):
        open_source(config.TfdsSource(path=str(copy)), "train")


# --- every source -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory, npz, labeled, tfrecord):
    root = tmp_path_factory.mktemp("every")
    for i in range(15):
        write(root, f"folder/{i}.png", png(i))
        write(root, f"folder/{i}.txt", f"row {i}\nagain {i}")
    records = {str(i): (png(i), {"captions": [f"row {i}", f"again {i}"]}) for i in range(15)}
    write_records(root / "a.tar", records)
    configs = {
        "folder": config.FolderSource(path=str(root / "folder"), eval_fraction=0.0),
        "tar": config.TarSource(path=str(root / "a.tar")),
        "arrays": config.ArraysSource(path=str(npz), templates=("a {}", "one {}")),
        "tfds": config.TfdsSource(path=str(labeled)),
        "tfrecord": config.TfdsSource(path=str(tfrecord)),
        "scenes": config.ScenesSource(count=15),
    }
    configs["mixture"] = config.MixtureSource(parts=(configs["folder"], configs["scenes"]), weights=(2, 1))
    rows = open_source(configs["folder"], "train")
    info = CodesInfo(
        rows=15, shard_rows=4, num_codes=1, vocab=256, image_size=8, crop="center", tokenizer="",
        languages=("en", "zh"), classes=(),
        source=describe_codes_source(configs["folder"]), fingerprint=rows.fingerprint(),
    )  # fmt: skip
    open_codes_dir(root / "codes", info)
    for k in range(info.shards):
        with ShardWriter(root / "codes", info, k) as writer:
            for i in info.shard(k):
                writer.add(rows.image(i, 8, "center")[0, 0, :1], rows.captions(i), None)
    train_text_tokenizer(
        [f"row {i} again a photo of one" for i in range(15)] * 3, root / "bpe.model", vocab=320
    )
    return configs | {"codes": configs["folder"]}, root


KINDS = ("folder", "tar", "arrays", "tfds", "tfrecord", "scenes", "mixture", "codes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_is_equal_with_any_processes(sources, kind):
    """Images or codes, crops, captions and skipped merges of every step."""
    configs, root = sources
    codes = str(root / "codes") if kind == "codes" else None
    data = config.DataConfig(source=configs[kind], batch_size=4, crop="random", codes=codes, prefetch=1)
    text = {
        "text": TextTokenizer.load(root / "bpe.model"),
        "text_vocab": 400,
        "text_len": 24,
        "bpe_dropout": 0.3,
    }

    def take(start, n, workers=0, **options):
        source = open_train_source(data)  # as a new process does
        data_ = dataclasses.replace(data, num_workers=workers)
        with train_batches(data_, source, start=start, image_size=32, **text, **options) as batches:
            return [next(batches) for _ in range(n)]

    straight = take(0, 9)
    assert straight[0].keys() == {"codes" if kind == "codes" else "image", "text"}
    for count in (1, 2, 4):
        parts = [take(5, 4, rows=range(p * 4 // count, (p + 1) * 4 // count)) for p in range(count)]
        for step in range(4):
            for key, want in straight[5 + step].items():
                got = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(got, want)
    assert len({batch["text"].tobytes() for batch in straight}) == 9
    for got, want in zip(
        take(5, 4, workers=1), straight[5:], strict=True
    ):  # the source is sent to a worker process
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])


def test_the_kind_follows_from_the_path(tmp_path, labeled, npz):
    kinds = [
        (tmp_path, "folder"),
        (labeled, "tfds"),
        (npz, "arrays"),
        ("a/*.tar", "tar"),
        ("cifar10:3.0.2", "tfds"),
    ]
    assert [infer_source(str(path)).kind for path, _ in kinds] == [kind for _, kind in kinds]
    with pytest.raises(FileNotFoundError, match="got nothing at"):
        infer_source("no such place")
    assert len(open_train_source(config.DataConfig(source=infer_source(str(npz))))) == 15
