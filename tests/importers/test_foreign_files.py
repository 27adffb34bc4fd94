"""Files of torch and Flax read with NumPy alone, and files that must not be believed."""

import itertools
import json
import mmap
import re
import zipfile

import flax.serialization
import ml_dtypes
import numpy as np
import pytest

from dalle_jax import cli
from dalle_jax.checkpoint.run_dir import shapes_by_name
from dalle_jax.config import DVAEConfig
from dalle_jax.importers import openai_dvae
from dalle_jax.importers.formats import flax_files, safetensors, torch_files
from dalle_jax.importers.formats.files import read_tensors

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def integers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key, array, *, offset=0, shape=None, strides=None, legacy=False):
    """The pickle of a tensor over storage `key` that holds all of `array`."""
    shape = array.shape if shape is None else shape
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    kind = STORAGES[array.dtype.name].encode()
    storage = (
        b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + integer(array.size)
    )
    storage += b"NtQ" if legacy else b"tQ"
    args = (
        b"("
        + storage
        + integer(offset)
        + integers(shape)
        + integers(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"tR"


def state_dict(entries):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def torch_zip(path, arrays, table=None):
    """What torch.save writes of a state dict, by hand from the description of the format."""
    keys = {name: str(i) for i, name in enumerate(arrays)}
    if table is None:
        table = state_dict({name: tensor(keys[name], array) for name, array in arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", table)
        for name, array in arrays.items():
            archive.writestr(f"archive/data/{keys[name]}", array.tobytes())
    return path


ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.array([1.5, -2], np.float16),
    "b.brain": np.array([3, 0.25], ml_dtypes.bfloat16),
}


def test_zip_of_torch_is_read_and_mapped(tmp_path):
    found = read_tensors(torch_zip(tmp_path / "x.pt", ARRAYS))
    assert list(found) == list(ARRAYS)
    for name, want in ARRAYS.items():
        assert (found[name].shape, found[name].dtype) == (want.shape, want.dtype)
        array = found[name].read()
        np.testing.assert_array_equal(array, want)
        while getattr(array, "base", None) is not None:
            array = array.base
        assert isinstance(array, mmap.mmap)  # nothing was copied


def test_views_of_one_storage_have_their_own_offset_and_strides(tmp_path):
    whole = np.arange(12, dtype=np.float32)
    table = state_dict({
        "slice": tensor("0", whole, offset=4, shape=(2, 2), strides=(2, 1)),
        "transposed": tensor("0", whole, shape=(3, 4), strides=(1, 3)),
    })  # fmt: skip
    found = read_tensors(torch_zip(tmp_path / "x.pt", {"whole": whole}, table))
    np.testing.assert_array_equal(found["slice"].read(), [[4, 5], [6, 7]])
    np.testing.assert_array_equal(found["transposed"].read(), whole.reshape(4, 3).T)


def test_the_format_before_torch_1_6(tmp_path):
    entries = {name: tensor(f"key{i}", array, legacy=True) for i, (name, array) in enumerate(ARRAYS.items())}
    magic = torch_files.LEGACY_MAGIC.to_bytes(10, "little")
    data = (
        b"\x80\x02\x8a\x0a"
        + magic
        + b"."
        + b"\x80\x02"
        + integer(1001)
        + b"."
        + b"\x80\x02}."
        + state_dict(entries)
    )
    order = [2, 0, 1]  # storages stand in their own order
    data += b"\x80\x02](" + b"".join(text(f"key{i}") for i in order) + b"e."
    for i in order:
        array = list(ARRAYS.values())[i]
        data += array.size.to_bytes(8, "little") + array.tobytes()
    (tmp_path / "x.bin").write_bytes(data)
    found = read_tensors(tmp_path / "x.bin")
    for name, want in ARRAYS.items():
        np.testing.assert_array_equal(found[name].read(), want)
    (tmp_path / "x.bin").write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=r"is cut off: tensor a.half \(2,\) wants 4 bytes, of which storage key1 has 3"
    ):
        read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_a_state_dict_is_taken_out_of_what_a_trainer_saves(tmp_path, wrapper):
    inner = state_dict({"w": tensor("0", np.zeros(2, np.float32))})[2:-1]
    settings = (
        b"ctraining\nSettings\n)\x81}" + text("lr") + b"G" + b"\0" * 8 + b"sb"
    )  # an object; its class is not known
    table = (
        b"\x80\x02}(" + text("epoch") + b"K\x03" + text("settings") + settings + text(wrapper) + inner + b"u."
    )
    assert list(read_tensors(torch_zip(tmp_path / "x.pt", {"w": np.zeros(2, np.float32)}, table))) == ["w"]


PROOF = "proof_that_it_ran"


def run_by_reduce(command):
    return b"cos\nsystem\n(" + text(command) + b"tR"


def run_by_inst(command):
    return b"(" + text(command) + b"ios\nsystem\n"


def run_by_obj(command):
    return b"(cos\nsystem\n" + text(command) + b"o"


def run_by_stack_global(command):
    return text("os") + text("system") + b"\x93(" + text(command) + b"tR"


def run_by_getattr(command):
    return b"cbuiltins\neval\n(" + text(f"__import__('os').system({command!r})") + b"tR"


@pytest.mark.parametrize(
    "attack", [run_by_reduce, run_by_inst, run_by_obj, run_by_stack_global, run_by_getattr]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, monkeypatch, attack, zipped):
    monkeypatch.chdir(tmp_path)
    arrays = {"w": np.zeros(2, np.float32)}
    table = state_dict({"w": tensor("0", arrays["w"]), "blocks.input.w": attack(f"touch {PROOF}")})
    path = tmp_path / "in" / "encoder.pkl"
    torch_zip(path, arrays, table)
    if not zipped:
        path.write_bytes(table)
    torch_zip(tmp_path / "in" / "decoder.pkl", arrays)
    assert cli.main(["import", "openai-dvae", str(tmp_path / "in"), "--out", "out"]) == 1
    said = capsys.readouterr().err
    assert "is a pickle that would run" in said and "at 'blocks.input.w'" in said
    assert ("os.system" in said) or ("builtins.eval" in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]  # nothing ran, nothing was written


def test_pickles_that_are_not_whole_are_refused(tmp_path):
    good = state_dict({"w": tensor("0", np.zeros(2, np.float32))})
    arrays = {"w": np.zeros(2, np.float32)}
    broken = (b".", b"N0.", b"t.", b"K\x01h\x09.", b"NN.", b"K\x01)R.", b"NNs.", b"\x82\x01.")
    for table in (good[:-1], good[:20], *(b"\x80\x02" + rest for rest in broken)):
        with pytest.raises(ValueError, match=r"is not a whole pickle of a model|holds no tensors"):
            torch_files.read_torch(torch_zip(tmp_path / "x.pt", arrays, table))
    for entry, said in (
        (tensor("7", arrays["w"]), r"the bytes of tensor w \(storage 7\) are not there"),
        (tensor("0", arrays["w"], shape=(3,), strides=(1,)), r"cut off: tensor w \(3,\) wants 12 bytes"),
        (tensor("0", arrays["w"], offset=1), r"cut off: tensor w \(2,\)"),
        (tensor("0", arrays["w"], shape=(10**9,), strides=(0,)), r"tensor w .* is larger than its storage"),
        (tensor("0", arrays["w"], offset=-1), "a tensor has shape"),
        (tensor("0", arrays["w"], strides=(-1,)), "a tensor has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            torch_files.read_torch(torch_zip(tmp_path / "x.pt", arrays, state_dict({"w": entry})))


def test_zips_that_are_cut_off_are_refused(tmp_path):
    whole = torch_zip(tmp_path / "x.pt", ARRAYS).read_bytes()
    middle = whole.index(ARRAYS["a.half"].tobytes()) + 1
    for length, where in ((len(whole) - 1, ""), (middle, " in tensor a.half"), (40, "")):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"is cut off or damaged{where}: its zip archive cannot be read"):
            read_tensors(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"zip file without one data\.pkl"):
        read_tensors(tmp_path / "y.pt")


def test_flax_files_are_what_flax_wrote(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tree = {
        "encoder": {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)}},
        "half": np.array([1.5], np.float16),
        "brain": np.array([2.5], ml_dtypes.bfloat16),
        "count": np.array(7, np.int32),
        "long/" * 60: np.zeros((0, 3), np.float32),
    }
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)  # bytes: the kernel is written in chunks
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    found = read_tensors(tmp_path)
    want = {
        "encoder/conv/kernel": tree["encoder"]["conv"]["kernel"],
        **{k: v for k, v in tree.items() if k != "encoder"},
    }
    assert set(found) == set(want)
    for name, array in want.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name].read(), array)


def test_flax_files_that_must_not_be_believed(tmp_path):
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
    for data, said in (
        (whole + b"\0", "1 bytes follow its map"),
        (b"\x81\xa1a\xc1", "byte 0xc1 at 3"),
        (b"\x82\xa1a\x01\xa1a\x01", "has the name 'a', no text or there twice"),
        (b"\x81\xa1a" * 100, "nested more than 64 deep"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "is cut off in array a"),
        (b"\x81\xa1a\x01", "holds no arrays"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            flax_files.read_flax(path)


def test_the_format_is_told_by_the_bytes(tmp_path):
    for size in range(560, 700, 7):  # a safetensors table of 640 bytes begins like a pickle of protocol 2
        safetensors.write_safetensors(tmp_path / "x.bin", {"w": np.zeros(2, np.float32)}, {"k": "v" * size})
        assert list(read_tensors(tmp_path / "x.bin")) == ["w"]
    for data, said in (
        (b"hello, world", "which is no format that is read"),
        (b"\x1f\x8b\0", "gzip archive; unpack it"),
    ):
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(ValueError, match=said):
            read_tensors(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match=r"has no weights: want one of model\.safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensors(tmp_path / "none")


def split(path, parts, name="pytorch_model.bin"):
    """Files of Hugging Face's for a model that is split: an index beside its parts. Returns the index."""
    index = path / f"{name}.index.json"
    places = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_a_model_in_parts_is_one_model(tmp_path):
    first, second = {"a": ARRAYS["a.weight"]}, {"b": ARRAYS["b.brain"], "c": ARRAYS["a.half"]}
    torch_zip(tmp_path / "1.bin", first)
    safetensors.write_safetensors(tmp_path / "2.bin", second, {})
    # Indices of converted files also list tensors that are tied to others and in no file.
    index = split(tmp_path, {"1.bin": ["a", "tied"], "2.bin": ["b", "c"]})
    for path in (tmp_path, index):
        found = read_tensors(path)
        assert sorted(found) == ["a", "b", "c"]
        for name, want in (first | second).items():
            np.testing.assert_array_equal(found[name].read(), want)
    safetensors.write_safetensors(tmp_path / "model.safetensors", first, {})
    assert list(read_tensors(tmp_path)) == ["a"]  # a whole file goes before parts


def test_indices_that_must_not_be_believed(tmp_path):
    torch_zip(tmp_path / "1.bin", ARRAYS)
    torch_zip(tmp_path / "2.bin", ARRAYS)
    (tmp_path / "below").mkdir()
    for parts, error, said in (
        ({"1.bin": ["a"], "3.bin": ["b"]}, FileNotFoundError, r"no file .*3\.bin, which .* names as a part"),
        ({"../1.bin": ["a"]}, ValueError, r"names the part '\.\./1\.bin'; want a file beside it"),
        ({"1.bin": ["a"], "2.bin": ["b"]}, ValueError, r"2\.bin has tensor a\.half, as another part of"),
    ):
        with pytest.raises(error, match=said):
            read_tensors(split(tmp_path, parts))
    index = split(tmp_path, {})
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "1.bin"}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is no index of weights: want JSON with a weight_map"):
            read_tensors(tmp_path)


# --- a whole import, and what must not come through it -----------------------------------------------------

CFG = DVAEConfig(groups=2, blocks=1, width=4, decoder_width=4, vocab=8)


def source_arrays():
    """Tensors of a tiny dVAE as the reference would hold them."""
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
    ("changes", "said"),
    [
        ({NAME: None}, f"lacks, of OpenAI's dVAE: {NAME}"),
        ({"encoder.more": np.zeros(2, np.float32)}, "has what is not of OpenAI's dVAE: encoder.more"),
        ({NAME: np.zeros((2, 3, 3, 3), np.float32)}, rf"tensor {NAME} \(2, 3, 3, 3\) becomes .*conv_2/kernel .*want"),
        ({NAME: np.zeros((2, 2), np.float32)}, rf"tensor {NAME} \(2, 2\) cannot become"),
        ({NAME: np.full((2, 2, 3, 3), np.nan, np.float32)}, f"tensor {NAME} has values that are not finite"),
        ({NAME: np.zeros((2, 2, 3, 3), np.int64)}, f"tensor {NAME} is int64; want floating-point numbers"),
        ({"encoder.blocks.input.w": None}, "it has no tensor encoder.blocks.input.w"),
        ({"encoder.blocks.input.w": np.zeros((0, 3, 7, 7), np.float32)}, "tensor encoder.blocks.input.w has shape"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole_writes_nothing(tmp_path, capsys, changes, said):
    arrays = source_arrays() | changes
    path = write_dvae(tmp_path / "in", {n: a for n, a in arrays.items() if a is not None})
    assert cli.main(["import", "openai-dvae", path, "--out", str(tmp_path / "out")]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_every_tensor_arrives_at_its_place(tmp_path, capsys):
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
    found, metadata = safetensors.read_safetensors(tmp_path / "runs" / "out" / "model.safetensors")
    assert metadata == {"format": "dalle_jax", "step": "0"}
    kernel = found["encoder.groups.group_2_block_1.conv_3.kernel"]
    want = arrays["encoder.blocks.group_2.block_1.res_path.conv_3.w"]
    for h, w, i, o in itertools.product(range(3), range(3), range(2), range(2)):
        assert kernel[h, w, i, o] == want[o, i, h, w]
    assert cli.main(words) == 1  # a run is there
    assert "is there already" in capsys.readouterr().err
