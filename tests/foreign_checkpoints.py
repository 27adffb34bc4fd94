"""Files of other libraries, written by hand from the descriptions of their formats, for the tests of the importers."""

import zipfile

import jax

from dalle_jax.models.registry import model_shapes
from dalle_jax.parallel.sharding import path_name

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def pickle_text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def pickle_int(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def pickle_ints(values):
    return b"(" + b"".join(map(pickle_int, values)) + b"t"


def pickle_tensor(key, array, *, offset=0, shape=None, strides=None, legacy=False):
    """Return the pickle of a tensor over storage `key` that holds all of `array`."""
    shape = array.shape if shape is None else shape
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    kind = STORAGES[array.dtype.name].encode()
    storage = (
        b"("
        + pickle_text("storage")
        + b"ctorch\n"
        + kind
        + b"\n"
        + pickle_text(key)
        + pickle_text("cpu")
        + pickle_int(array.size)
    )
    storage += b"NtQ" if legacy else b"tQ"
    args = (
        b"("
        + storage
        + pickle_int(offset)
        + pickle_ints(shape)
        + pickle_ints(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"tR"


def pickle_state_dict(entries):
    return b"\x80\x02}(" + b"".join(pickle_text(name) + value for name, value in entries.items()) + b"u."


def torch_zip(path, arrays, table=None):
    """Write a state dict as torch.save does, by hand from the description of the format."""
    keys = {name: str(i) for i, name in enumerate(arrays)}
    if table is None:
        table = pickle_state_dict({name: pickle_tensor(keys[name], array) for name, array in arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", table)
        for name, array in arrays.items():
            archive.writestr(f"archive/data/{keys[name]}", array.tobytes())
    return path


def shapes_by_name(cfg):
    """Return shape and dtype of every parameter of a model, by its path `a/b/c`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(model_shapes(cfg))
    return {path_name(path): leaf for path, leaf in pairs}


def read_arrays(tensors):
    """Return the arrays of lazily read tensors, by name."""
    return {name: tensor.read() for name, tensor in tensors.items()}
