"""Tests of the file formats of torch and Flax, which are read with NumPy alone, and of malicious and damaged files."""

import io
import itertools
import json
import mmap
import os
import re
import subprocess
import sys
import zipfile

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from foreign_checkpoints import (
    pickle_int,
    pickle_state_dict,
    pickle_tensor,
    pickle_text,
    read_arrays,
    shapes_by_name,
    torch_zip,
)
from safetensors.numpy import save_file

from dalle_jax import cli
from dalle_jax.config import DVAEConfig
from dalle_jax.files import archives
from dalle_jax.files.archives import read_npz
from dalle_jax.importers import openai_dvae
from dalle_jax.importers.formats import flax_files, safetensors, torch_files
from dalle_jax.importers.formats.files import read_tensor_files

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.array([1.5, -2], np.float16),
    "b.brain": np.array([3, 0.25], ml_dtypes.bfloat16),
}


def test_a_zip_of_torch_is_memory_mapped(tmp_path):
    tensors = read_tensor_files(torch_zip(tmp_path / "x.pt", ARRAYS))
    assert list(tensors) == list(ARRAYS)
    for name, want in ARRAYS.items():
        assert (tensors[name].shape, tensors[name].dtype) == (want.shape, want.dtype)
        array = tensors[name].read()
        np.testing.assert_array_equal(array, want)
        while getattr(array, "base", None) is not None:
            array = array.base
        assert isinstance(array, mmap.mmap)  # the array is a view of the mapped file


def test_views_of_one_storage_have_their_own_offset_and_strides(tmp_path):
    whole = np.arange(12, dtype=np.float32)
    table = pickle_state_dict({
        "slice": pickle_tensor("0", whole, offset=4, shape=(2, 2), strides=(2, 1)),
        "transposed": pickle_tensor("0", whole, shape=(3, 4), strides=(1, 3)),
    })  # fmt: skip
    tensors = read_tensor_files(torch_zip(tmp_path / "x.pt", {"whole": whole}, table))
    np.testing.assert_array_equal(tensors["slice"].read(), [[4, 5], [6, 7]])
    np.testing.assert_array_equal(tensors["transposed"].read(), whole.reshape(4, 3).T)


def test_the_format_before_torch_1_6(tmp_path):
    entries = {
        name: pickle_tensor(f"key{i}", array, legacy=True) for i, (name, array) in enumerate(ARRAYS.items())
    }
    magic = torch_files.LEGACY_MAGIC.to_bytes(10, "little")
    data = (
        b"\x80\x02\x8a\x0a"
        + magic
        + b"."
        + b"\x80\x02"
        + pickle_int(1001)
        + b"."
        + b"\x80\x02}."
        + pickle_state_dict(entries)
    )
    order = [2, 0, 1]  # the order of the storages in the file
    data += b"\x80\x02](" + b"".join(pickle_text(f"key{i}") for i in order) + b"e."
    for i in order:
        array = list(ARRAYS.values())[i]
        data += array.size.to_bytes(8, "little") + array.tobytes()
    (tmp_path / "x.bin").write_bytes(data)
    tensors = read_tensor_files(tmp_path / "x.bin")
    for name, want in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].read(), want)
    (tmp_path / "x.bin").write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=r"is cut off: Expected 4 bytes for tensor a.half \(2,\), got 3 in storage key1"
    ):
        read_tensor_files(tmp_path / "x.bin")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_a_state_dict_is_found_in_the_checkpoint_of_a_trainer(tmp_path, wrapper):
    inner = pickle_state_dict({"w": pickle_tensor("0", np.zeros(2, np.float32))})[2:-1]
    settings = (
        b"ctraining\nSettings\n)\x81}" + pickle_text("lr") + b"G" + b"\0" * 8 + b"sb"
    )  # an object of an unknown class
    table = (
        b"\x80\x02}("
        + pickle_text("epoch")
        + b"K\x03"
        + pickle_text("settings")
        + settings
        + pickle_text(wrapper)
        + inner
        + b"u."
    )
    assert list(read_tensor_files(torch_zip(tmp_path / "x.pt", {"w": np.zeros(2, np.float32)}, table))) == [
        "w"
    ]


PROOF = "proof_that_it_ran"


def run_by_reduce(command):
    return b"cos\nsystem\n(" + pickle_text(command) + b"tR"


def run_by_inst(command):
    return b"(" + pickle_text(command) + b"ios\nsystem\n"


def run_by_obj(command):
    return b"(cos\nsystem\n" + pickle_text(command) + b"o"


def run_by_stack_global(command):
    return pickle_text("os") + pickle_text("system") + b"\x93(" + pickle_text(command) + b"tR"


def run_by_getattr(command):
    return b"cbuiltins\neval\n(" + pickle_text(f"__import__('os').system({command!r})") + b"tR"


@pytest.mark.parametrize(
    "attack", [run_by_reduce, run_by_inst, run_by_obj, run_by_stack_global, run_by_getattr]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_rejected(tmp_path, capsys, monkeypatch, attack, zipped):
    monkeypatch.chdir(tmp_path)
    arrays = {"w": np.zeros(2, np.float32)}
    table = pickle_state_dict(
        {"w": pickle_tensor("0", arrays["w"]), "blocks.input.w": attack(f"touch {PROOF}")}
    )
    path = tmp_path / "in" / "encoder.pkl"
    torch_zip(path, arrays, table)
    if not zipped:
        path.write_bytes(table)
    torch_zip(tmp_path / "in" / "decoder.pkl", arrays)
    assert cli.main(["import", "openai-dvae", str(tmp_path / "in"), "--out", "out"]) == 1
    message = capsys.readouterr().err
    assert "is a pickle that would run" in message and "at 'blocks.input.w'" in message
    assert ("os.system" in message) or ("builtins.eval" in message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]  # no code ran and no file was written


def test_incomplete_pickles_are_rejected(tmp_path):
    good = pickle_state_dict({"w": pickle_tensor("0", np.zeros(2, np.float32))})
    arrays = {"w": np.zeros(2, np.float32)}
    broken = (b".", b"N0.", b"t.", b"K\x01h\x09.", b"NN.", b"K\x01)R.", b"NNs.", b"\x82\x01.")
    for table in (good[:-1], good[:20], *(b"\x80\x02" + rest for rest in broken)):
        with pytest.raises(ValueError, match=r"is not a whole pickle of a model|without tensors"):
            torch_files.read_torch(torch_zip(tmp_path / "x.pt", arrays, table))
    for entry, message in (
        (pickle_tensor("7", arrays["w"]), r"the bytes of tensor w \(storage 7\) are not there"),
        (
            pickle_tensor("0", arrays["w"], shape=(3,), strides=(1,)),
            r"cut off: Expected 12 bytes for tensor w \(3,\)",
        ),
        (pickle_tensor("0", arrays["w"], offset=1), r"cut off: Expected \d+ bytes for tensor w \(2,\)"),
        (
            pickle_tensor("0", arrays["w"], shape=(10**9,), strides=(0,)),
            r"tensor w .* within its storage, got a storage of 2 numbers",
        ),
        (pickle_tensor("0", arrays["w"], offset=-1), "a tensor has shape"),
        (pickle_tensor("0", arrays["w"], strides=(-1,)), "a tensor has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            torch_files.read_torch(torch_zip(tmp_path / "x.pt", arrays, pickle_state_dict({"w": entry})))


def test_incomplete_zips_are_rejected(tmp_path):
    whole = torch_zip(tmp_path / "x.pt", ARRAYS).read_bytes()
    middle = whole.index(ARRAYS["a.half"].tobytes()) + 1
    for length, where in ((len(whole) - 1, ""), (middle, " in tensor a.half"), (40, "")):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"is cut off or damaged{where}: its zip archive cannot be read"):
            read_tensor_files(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"zip file made by torch\.save, got .* without one data\.pkl"):
        read_tensor_files(tmp_path / "y.pt")


def test_flax_files_are_read_as_written(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tree = {
        "encoder": {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)}},
        "half": np.array([1.5], np.float16),
        "brain": np.array([2.5], ml_dtypes.bfloat16),
        "count": np.array(7, np.int32),
        "long/" * 60: np.zeros((0, 3), np.float32),
    }
    monkeypatch.setattr(
        flax.serialization, "MAX_CHUNK_SIZE", 64
    )  # bytes, so that the kernel is written in chunks
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    tensors = read_tensor_files(tmp_path)
    want = {
        "encoder/conv/kernel": tree["encoder"]["conv"]["kernel"],
        **{k: v for k, v in tree.items() if k != "encoder"},
    }
    assert set(tensors) == set(want)
    for name, array in want.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_damaged_flax_files_are_rejected(tmp_path):
    path = tmp_path / "x.msgpack"
    whole = flax.serialization.msgpack_serialize(
        {"a": {"w": np.ones(4, np.float32)}, "b": np.ones(2, np.float32)}
    )
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is cut off in array (\(the first\)|a|a/w|b)$"):
            flax_files.read_flax(path)
    path.write_bytes(whole.replace(b"float32", b"object0"))
    with pytest.raises(ValueError, match="array a/w has an entry that is not understood"):
        flax_files.read_flax(path)
    for data, message in (
        (whole + b"\0", "with 1 more bytes"),
        (b"\x81\xa1a\xc1", "byte 0xc1 at 3"),
        (b"\x82\xa1a\x01\xa1a\x01", "has the name 'a', no text or there twice"),
        (b"\x81\xa1a" * 100, "nested at most 64 deep, got more"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "is cut off in array a"),
        (b"\x81\xa1a\x01", "without arrays"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            flax_files.read_flax(path)


def test_the_format_is_detected_from_the_bytes(tmp_path):
    for size in range(560, 700, 7):  # a safetensors table of 640 bytes begins like a pickle of protocol 2
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / "x.bin", {"k": "v" * size})
        assert list(read_tensor_files(tmp_path / "x.bin")) == ["w"]
    for data, message in (
        (b"hello, world", "Expected a file of torch.save"),
        (b"\x1f\x8b\0", "gzip archive .*Unpack it"),
    ):
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_tensor_files(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match=r"Expected one of model\.safetensors, .* got none"):
        read_tensor_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensor_files(tmp_path / "none")


def split(path, parts, name="pytorch_model.bin"):
    """Write a model split into parts with an index, as Hugging Face does. Return the index."""
    index = path / f"{name}.index.json"
    places = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_the_parts_of_a_model_are_read_together(tmp_path):
    first, second = {"a": ARRAYS["a.weight"]}, {"b": ARRAYS["b.brain"], "c": ARRAYS["a.half"]}
    torch_zip(tmp_path / "1.bin", first)
    save_file(second, tmp_path / "2.bin")
    # Indices of converted files also list tied tensors, which are in no file.
    index = split(tmp_path, {"1.bin": ["a", "tied"], "2.bin": ["b", "c"]})
    for path in (tmp_path, index):
        tensors = read_tensor_files(path)
        assert sorted(tensors) == ["a", "b", "c"]
        for name, want in (first | second).items():
            np.testing.assert_array_equal(tensors[name].read(), want)
    save_file(first, tmp_path / "model.safetensors")
    assert list(read_tensor_files(tmp_path)) == ["a"]  # a whole file has priority over parts


def test_damaged_indices_are_rejected(tmp_path):
    torch_zip(tmp_path / "1.bin", ARRAYS)
    torch_zip(tmp_path / "2.bin", ARRAYS)
    (tmp_path / "below").mkdir()
    for parts, error, message in (
        (
            {"1.bin": ["a"], "3.bin": ["b"]},
            FileNotFoundError,
            r"Expected every part of .*, got no file .*3\.bin",
        ),
        ({"../1.bin": ["a"]}, ValueError, r"parts of .* beside it, got '\.\./1\.bin'"),
        (
            {"1.bin": ["a"], "2.bin": ["b"]},
            ValueError,
            r"each tensor in one part of .*, got a\.half also in .*2\.bin",
        ),
    ):
        with pytest.raises(error, match=message):
            read_tensor_files(split(tmp_path, parts))
    index = split(tmp_path, {})
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "1.bin"}}'):
        index.write_text(text)
        with pytest.raises(
            ValueError, match=r"Expected JSON with a weight_map of names in .*, got other text"
        ):
            read_tensor_files(tmp_path)


# --- small files that would need much time or memory ------------------------------------------------------------

LIMITED = """
import os, resource, sys, time
from dalle_jax.importers.formats.files import read_tensor_files
pages = int(open("/proc/self/statm").read().split()[0]) if os.path.exists("/proc/self/statm") else 1 << 20
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        print("READ", len(read_tensor_files(path)), flush=True)
    except ValueError as error:
        said = str(error)
        assert len(said) < len(path) + 600 and said.isprintable(), said[:600]
        print(said.replace(path, "FILE"), flush=True)
    assert time.process_time() - start < 20
"""


def read_in_a_limited_process(files, tmp_path):
    """Return the error of reading each of `files`, {name: bytes}, in a process that may grow by 1 GiB."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return dict(zip(files, done.stdout.splitlines(), strict=True))


def zip_of(table, more=(), kind=zipfile.ZIP_STORED):
    """Return the bytes of a zip archive of torch.save with this data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr("archive/data.pkl", table)
        archive.writestr("archive/data/0", bytes(8))
        for name, data in more:
            archive.writestr(name, data)
    return buffer.getvalue()


GRAPH = b"N" + b"2\x86" * 60  # t = (t, t), 60 times: 2**60 elements when hashed or printed
DEEP = b"N" + b"\x85" * 1_000_000
GET = b"h\x00"  # the first entry of the memo
LEGACY = b"\x80\x02\x8a\x0a" + torch_files.LEGACY_MAGIC.to_bytes(10, "little") + b"." + b"\x80\x02K\x01." * 2
WEIGHT = pickle_tensor("0", np.zeros(2, np.float32))


def rebuilt(storage, shape=b")", strides=b")"):
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + strides + b"tR"


STORAGE = (
    b"("
    + pickle_text("storage")
    + b"ctorch\nFloatStorage\n"
    + pickle_text("0")
    + pickle_text("cpu")
    + b"K\x02tQ"
)
HOSTILE_PICKLES = {  # name -> (pickle without its end, part of the message)
    "graph_as_key": (b"}(" + GRAPH + b"Nu", "without tensors"),
    "graph_as_key_of_a_marked_dict": (b"(" + GRAPH + b"Nd", "without tensors"),
    "graph_as_one_key": (b"}" + GRAPH + b"Ns", "without tensors"),
    "graph_as_key_of_pairs": (b"ccollections\nOrderedDict\n]" + GRAPH + b"N\x86a\x85R", "without tensors"),
    "graph_in_a_set": (b"\x8f(" + GRAPH + b"\x90", "without tensors"),
    "graph_in_a_frozenset": (b"(" + GRAPH + b"\x91", "without tensors"),
    "graph_as_identifier": (GRAPH + b"Q", "an identifier, a tuple, is not one of"),
    "graph_as_storage_type": (
        b"(" + pickle_text("storage") + GRAPH + b"N" * 3 + b"tQ", "an identifier, a tuple, is not",
    ),
    "graph_as_shape": (rebuilt(STORAGE, GRAPH, GRAPH), "a tensor has shape"),
    "graph_as_callee": (GRAPH + b")R", "it calls a tuple"),
    "graph_as_argument": (b"cos\nsystem\n" + GRAPH + b"\x85R", "would run os.system"),
    "graph_as_name": (GRAPH + pickle_text("system") + b"\x93", "a name is not text"),
    "deep_tuple_as_key": (b"}(" + DEEP + b"Nu", "without tensors"),
    "deep_tuple": (DEEP, "without tensors"),
    "deep_lists": (b"]" + b"]" * 900_000 + b"a" * 900_000, "without tensors"),
    "deep_dicts": ((b"}" + pickle_text("a")) * 5000 + b"N" + b"s" * 5000, "nested at most 128 deep, got more"),
    "deep_modules": ((b"}" + pickle_text("_parameters")) * 5000 + b"}" + b"s" * 5000, "at most 128 deep, got more"),
    "deep_objects": (b"ca\nB\n)\x81" * 200_000 + b"}" + b"b" * 200_000, "without tensors"),
    "empty_lists": (b"(" + b"]" * 20_000_000 + b"t", "at most 2097152 opcodes"),
    "empty_dicts": (b"(" + b"}\x94" * 5_000_000 + b"t", "at most 2097152 opcodes"),
    "objects": (b"ca\nB\nq\0(" + (GET + b")\x81") * 2_000_000 + b"t", "at most 2097152 opcodes"),
    "long_list_as_many_dicts": (b"](" + pickle_text("k") + b"N\x86" + b"2" * 100_000 + b"eq\0(" + (
        b"ccollections\nOrderedDict\n" + GET + b"\x85R") * 100_000 + b"t", "at most 2097152 opcodes"),
    "long_arguments_of_many_calls": (b"(" + b"N" * 100_000 + b"tq\0(" + (b"ca\nB\n" + GET + b"\x81") * 100_000
                                     + b"t", "at most 2097152 opcodes"),
    "list_as_arguments": (b"ccollections\nOrderedDict\n]R", "it calls a Name with a list"),
    "many_axes": (rebuilt(STORAGE, *[b"(" + b"K\x01" * 100_000 + b"t"] * 2), "a tensor has shape and strides of"),
    "huge_numbers": (rebuilt(STORAGE, *[b"\x8b" + (100_000).to_bytes(4, "little") + b"\1" * 100_000 + b"\x85"] * 2),
                     "a tensor has shape, strides or offset"),
    "far_in_the_memo": (b"Nr\xff\xff\xff\xff", "without tensors"),
    "text_longer_than_the_file": (b"\x8d" + (1 << 40).to_bytes(8, "little") + b"text", "is not a whole pickle"),
    "bytes_longer_than_the_file": (b"\x8e" + (1 << 62).to_bytes(8, "little") + b"data", "is not a whole pickle"),
    "array_longer_than_the_file": (b"\x96" + (1 << 40).to_bytes(8, "little") + b"data", "is not a whole pickle"),
    "long_name_of_a_class": (b"c" + b"torch.nn." + b"x" * 1000 + b"\nB\n)R", "a name is not text of at most 256"),
    "long_name_of_a_tensor": (b"}" + pickle_text("x" * 10_000_000) + WEIGHT + b"s", "at most 500 printable characters"),
    "long_names_of_dicts": (
        (b"}" + pickle_text("x" * 400)) * 60 + WEIGHT + b"s" * 60, "at most 500 printable characters",
    ),
    "escape_in_a_name": (b"}" + pickle_text("w\x1b[31m") + WEIGHT + b"s", r"got 'w\x1b[31m'"),
    "escape_in_a_call": (pickle_text("os\x1b[31m") + pickle_text("system") + b"\x93)R", r"would run os\x1b[31m.system"),
    "escape_in_a_storage": (
        b"(" + pickle_text("storage") + b"ctorch\nFloatStorage\n" + pickle_text("\x1b[31m") + pickle_text("cpu")
        + b"K\x02tQ",
        r"a storage has the key '\x1b[31m'",
    ),
    "extension": (b"\x82\x01)R", "opcode EXT1"),
    "out_of_band_buffer": (b"\x97", "opcode NEXT_BUFFER"),
}  # fmt: skip


def test_pickles_that_would_need_much_time_or_memory_are_rejected(tmp_path):
    files = {name: zip_of(b"\x80\x02" + table + b".") for name, (table, _) in HOSTILE_PICKLES.items()}
    expected = {name: want for name, (_, want) in HOSTILE_PICKLES.items()}
    for name, data, want in (
        ("legacy_graph", b"\x80\x02" + GRAPH + b".", "made by torch.save, got FILE, another pickle"),
        ("legacy_graph_as_key", LEGACY + b"\x80\x02}(" + GRAPH + b"Nu.\x80\x02].", "without tensors"),
        ("legacy_graph_in_list", LEGACY + b"\x80\x02}.\x80\x02]" + GRAPH + b"a.", "belongs to no tensor"),
        ("legacy_long_text", b"\x80\x02\x8d" + (1 << 40).to_bytes(8, "little"), "is not a whole pickle"),
        ("legacy_lists", b"\x80\x02" + b"]" * 20_000_000, "at most 2097152 opcodes"),
        ("compressed", zip_of(b"\x80\x02}.", kind=zipfile.ZIP_DEFLATED), "got 'archive/data.pkl' compressed"),
        ("large", zip_of(bytes(1 << 26) + b"."), "Expected a data.pkl of at most 67108864 bytes"),
        ("many_entries", many_entries(250_000), "Expected a directory of at most 8388608 bytes"),
        ("many_headers", b"PK\3\4" * 1_000_000, "is cut off or damaged"),
        ("many_maps", b"\x81\xa1a\xdd" + (5_000_000).to_bytes(4, "big") + b"\x80" * 5_000_000,
         "Expected a Flax file of at most 1048576 values"),
        ("long_key", b"\x81\xdb" + (1 << 20).to_bytes(4, "big") + b"k" * (1 << 20), "got 1048576 at"),
        ("escape_in_a_key", b"\x81\xa2a\x1b\x80", r"got 'a\x1b'"),
        ("list_as_key", b"\x81\xdd" + (500_000).to_bytes(4, "big") + b"\x90" * 500_000, "has the name of a list"),
        ("many_axes_of_flax", flax_array(b"\xdd" + (100_000).to_bytes(4, "big") + (b"\xcf" + b"\xff" * 8) * 100_000),
         "array a has an entry that is not understood"),
    ):  # fmt: skip
        files[name], expected[name] = data, want
    for name, message in read_in_a_limited_process(files, tmp_path).items():
        assert expected[name] in message, (name, message)


def many_entries(count):
    """Return a zip archive of one data.pkl that its directory lists `count` times."""
    whole = zip_of(b"\x80\x02}.")
    start, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[start : whole.index(b"PK\1\2", start + 1)]
    sizes = (count * len(entry)).to_bytes(4, "little") + start.to_bytes(4, "little")
    return whole[:start] + entry * count + whole[end : end + 8] + b"\xff" * 4 + sizes + b"\0\0"


def flax_array(shape):
    inside = b"\x93" + shape + b"\xa7float32" + b"\xc4\0"
    return b"\x81\xa1a\xc9" + len(inside).to_bytes(4, "big") + b"\1" + inside


def test_entries_of_a_zip_are_unique_and_of_bounded_size(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_of(b"\x80\x02}.", [("archive/data/0", b"")])
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match="Expected each name once"):
        read_tensor_files(tmp_path / "x.pt")
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(100_000, np.float32))
    assert read_npz(tmp_path / "x.npz", "Use weights.")["w"].shape == (100_000,)
    monkeypatch.setattr(archives, "_MAX_INFLATED", 1 << 16)
    with pytest.raises(
        ValueError, match=r"Expected at most \d+ bytes when inflated, got 400128\)\. Use weights\."
    ):
        read_npz(tmp_path / "x.npz", "Use weights.")


# --- imports of incomplete and complete models ------------------------------------------------------------

CFG = DVAEConfig(groups=2, blocks=1, width=4, decoder_width=4, vocab=8)


def source_arrays():
    """Return the tensors of a tiny dVAE under the names of the reference."""
    rng, shapes, arrays = np.random.default_rng(0), shapes_by_name(CFG), {}
    for name, rule in openai_dvae._rules(CFG).items():
        shape = shapes[name].shape
        shape = shape if len(shape) == 1 else tuple(shape[i] for i in (3, 2, 0, 1))
        arrays[rule.parts[0].names[0]] = rng.normal(size=shape).astype(np.float32)
    return arrays


def write_dvae(path, arrays):
    for part in ("encoder", "decoder"):
        chosen = {n.removeprefix(f"{part}."): a for n, a in arrays.items() if n.startswith(f"{part}.")}
        torch_zip(path / f"{part}.pkl", chosen)
    return str(path)


NAME = "decoder.blocks.group_1.block_1.res_path.conv_2.w"  # (2, 2, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: None}, f"Expected the tensors of OpenAI's dVAE, got .* without tensors {NAME}"),
        ({"encoder.more": np.zeros(2, np.float32)}, "OpenAI's dVAE, got .* with other tensors encoder.more"),
        ({NAME: np.zeros((2, 3, 3, 3), np.float32)}, rf"conv_2/kernel .*got {NAME} \(2, 3, 3, 3\), converted to"),
        ({NAME: np.zeros((2, 2), np.float32)}, rf"a tensor for .*conv_2/kernel .*got {NAME} \(2, 2\)\."),
        ({NAME: np.full((2, 2, 3, 3), np.nan, np.float32)}, f"finite values in tensor {NAME}"),
        ({NAME: np.zeros((2, 2, 3, 3), np.int64)}, f"tensor {NAME} of floating-point numbers, got int64"),
        ({"encoder.blocks.input.w": None}, "with a tensor encoder.blocks.input.w, got .* without it"),
        ({"encoder.blocks.input.w": np.zeros((0, 3, 7, 7), np.float32)}, "input.w of 4 axes, .*got shape"),
    ],
)  # fmt: skip
def test_an_import_of_an_incomplete_model_writes_nothing(tmp_path, capsys, changes, message):
    arrays = source_arrays() | changes
    path = write_dvae(tmp_path / "in", {n: a for n, a in arrays.items() if a is not None})
    assert cli.main(["import", "openai-dvae", path, "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_every_tensor_becomes_its_parameter(tmp_path, capsys):
    arrays = source_arrays()
    path = write_dvae(tmp_path / "in", arrays)
    words = [
        "import",
        "openai-dvae",
        path,
        "--out",
        str(tmp_path / "runs" / "out"),
        "--image-size",
        "16",
        "--json",
    ]
    assert cli.main(words) == 0
    assert f'"parameters": {sum(a.size for a in arrays.values())}' in capsys.readouterr().out
    tensors, metadata = safetensors.lazy_safetensors(tmp_path / "runs" / "out" / "model.safetensors")
    tensors = read_arrays(tensors)
    assert metadata == {"format": "dalle_jax", "step": "0"}
    kernel = tensors["encoder.groups.group_2_block_1.conv_3.kernel"]
    want = arrays["encoder.blocks.group_2.block_1.res_path.conv_3.w"]
    for h, w, i, o in itertools.product(range(3), range(3), range(2), range(2)):
        assert kernel[h, w, i, o] == want[o, i, h, w]
    assert cli.main(words) == 1  # the run exists
    assert "got the existing" in capsys.readouterr().err
