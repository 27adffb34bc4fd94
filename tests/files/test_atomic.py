"""Atomic writes: the old content or the new one, never a part; npz files of bounded size."""

import os

import numpy as np
import pytest

from dalle_jax.files.archives import list_npz, read_npz
from dalle_jax.files.atomic import atomic_path, write_atomic, write_npz


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "x.txt"
    write_atomic(file, "äh\n")
    assert file.read_bytes() == "äh\n".encode()
    with pytest.raises(ZeroDivisionError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text(encoding="utf-8") == "äh\n" and names(file.parent) == ["x.txt"]
    write_atomic(file, b"\0", sync=False)
    assert file.read_bytes() == b"\0" and names(file.parent) == ["x.txt"]


def test_a_failed_write_leaves_no_directory(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), atomic_path(out) as temporary:
        write_atomic(temporary / "a", "1")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    out.mkdir()  # an empty directory is replaced
    with atomic_path(out) as temporary:
        write_atomic(temporary / "a", "1")
    assert names(out) == ["a"] and names(tmp_path) == ["out"]
    with (
        pytest.raises(OSError, match=f"cannot write {out}: Directory not empty"),
        atomic_path(out) as temporary,
    ):
        write_atomic(temporary / "b", "1")
    assert names(out) == ["a"] and names(tmp_path) == ["out"]


def test_the_error_has_the_path_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/x: File exists"):
        write_atomic(tmp_path / "file" / "x", "1")
    with (
        pytest.raises(OSError, match=f"cannot write {tmp_path}/out: Is a directory"),
        atomic_path(tmp_path / "out") as out,
    ):
        (out / "x").mkdir(parents=True)
        write_atomic(out / "x", "1")  # the message has the path that the caller passed


def test_npz_round_trip(tmp_path):
    write_npz(tmp_path / "x.npz", a=np.arange(3), b=np.ones(2))
    assert list_npz(tmp_path / "x.npz", "Use x.") == ["a", "b"]
    assert list(read_npz(tmp_path / "x.npz", "Use x.", ("b", "c"))) == ["b"]
    np.testing.assert_array_equal(read_npz(tmp_path / "x.npz", "Use x.")["a"], np.arange(3))
    os.truncate(tmp_path / "x.npz", 100)
    for read in (read_npz, list_npz):
        with pytest.raises(ValueError, match=r"Expected a whole npz file, got .*x\.npz \(.*\)\. Use x\."):
            read(tmp_path / "x.npz", "Use x.")
        with pytest.raises(FileNotFoundError, match=r"Expected an npz file, got no file .*y\.npz\. Use x\."):
            read(tmp_path / "y.npz", "Use x.")
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))
    with pytest.raises(
        ValueError, match=r"npz file of numbers, got .*objects\.npz with other values\. Use x\."
    ):
        read_npz(tmp_path / "objects.npz", "Use x.")
