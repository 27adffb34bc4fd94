"""Compilation with the TPU compiler (package libtpu), which needs no TPU: `pytest -m libtpu`.

Each test runs in a process of its own, because libtpu is configured by environment variables.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from aot_configs import write_config

from dalle_jax.aot.gpu_kernels import find_loops

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.libtpu


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=500)


def tpu(config_file, *flags):
    """Return the exit code and the report of the command."""
    done = python("train.py", config_file, "--compile-only", *flags, "--json")
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


CLOUD_NAMES_SCRIPT = """
import json
from dalle_jax.aot.tpu_targets import CLOUD_NAMES, tpu_devices

found = {}
for name in CLOUD_NAMES:
    devices = tpu_devices(name)
    corners = [max(d.coords[axis] for d in devices) + 1 for axis in range(3)]
    found[name] = [len(devices), corners, devices[0].device_kind]
two = tpu_devices("v5litepod-16", 2)
found["two"] = [len(two), sorted({d.slice_index for d in two})]
print(json.dumps(found))
"""


def test_every_cloud_name_has_its_number_of_chips():
    """Names of v4 and v5p count TensorCores, two per chip; the others count chips."""
    done = python("-c", CLOUD_NAMES_SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("two") == [32, [0, 1]]
    kinds = {
        "v4": "TPU v4",
        "v5p": "TPU v5",
        "v5litepod": "TPU v5 lite",
        "v5e": "TPU v5 lite",
        "v6e": "TPU v6 lite",
    }
    assert {name.partition("-")[0] for name in found} == set(kinds)
    for name, (chips, corners, kind) in found.items():
        generation, _, count = name.partition("-")
        assert chips == int(count) // (2 if generation in ("v4", "v5p") else 1), name
        assert kind == kinds[generation], name
        assert corners[0] * corners[1] * corners[2] == chips, name
    assert found["v5p-128"][1] == [4, 4, 4] and found["v5litepod-256"][1] == [16, 16, 1]


STAGE_SCRIPT = """
import dataclasses, json, sys
sys.path.insert(0, "tests")
from aot_configs import stage_config
from dalle_jax.config import MeshConfig
from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.aot.training_step import compile_training_step

name, what = sys.argv[1:]
config = dataclasses.replace(stage_config(name), mesh=MeshConfig(data=2, fsdp=2), compiler_options=())
print(json.dumps(compile_training_step(config, "v5e:2x2") if what == "step" else compile_sampler(config, "v6e:1x1", 2)))
"""


@pytest.mark.parametrize("name", ["dvae", "vqgan", "clip", "bart", "diffusion"])
def test_every_stage_compiles_for_a_tpu(name):
    report = stage(name, "step")
    assert report["device_kind"] == "TPU v5 lite" and report["num_devices"] == 4
    assert "all-reduce" in report["collectives"]


@pytest.mark.parametrize("name", ["bart", "diffusion"])
def test_sampling_of_other_stages_compiles_for_a_tpu(name):
    report = stage(name, "sample")
    assert report["device_kind"] == "TPU v6 lite" and report["num_devices"] == 1 and not report["collectives"]


def stage(name, what):
    done = python("-c", STAGE_SCRIPT, name, what)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is True and 0 < report["peak_gib_per_device"] < 1
    assert 0 < report["estimated_mfu"] <= report["estimated_mfu_high"] < 1
    return report


def test_tpu_report(config_file):
    code, report = tpu(config_file, "v5e:2x4", "--mesh.data", "1", "--mesh.fsdp", "8")
    assert code == 0 and report["fits"] is True and report["num_devices"] == 8
    assert report["hbm_gib_per_device"] == 16 and 0 < report["peak_gib_per_device"] < 1
    assert 0 < report["estimated_mfu"] <= report["estimated_mfu_high"] < 1
    assert "all-gather" in report["collectives"]


def test_an_axis_may_be_a_part_of_a_torus_side(config_file):
    """An axis of 8 on 4 x 4 chips: jax.make_mesh refuses this mesh."""
    code, report = tpu(config_file, "v6e:4x4", "--mesh.data", "2", "--mesh.fsdp", "8")
    assert code == 0 and report["mesh"] == {"slice": 1, "data": 2, "fsdp": 8, "model": 1}


def test_tpu_slices_send_gradients_only(config_file):
    """Sums of gradients cross slices, and no parameters."""
    code, report = tpu(config_file, "v5e:2x2", "--slices", "2", "--mesh.data", "1", "--mesh.fsdp", "4")
    assert code == 0 and report["num_devices"] == 8 and report["mesh"]["slice"] == 2
    assert 0 < report["collectives"]["send"]["gib"] < 2 * report["parameters"] * 4 / 2**30


def test_tpu_out_of_memory_exits_3(config_file):
    code, report = tpu(
        config_file, "v5e:1x1", "--model.dim", "4096", "--model.layers", "40", "--mesh.data", "1"
    )
    assert code == 3 and report["fits"] is False
    assert report["peak_gib_per_device"] > report["hbm_gib_per_device"] == 16


def test_sampling_on_one_chip(config_file):
    code, report = tpu(config_file, "v5e:1x1", "--sample", "2")
    assert code == 0 and report["fits"] is True and report["num_devices"] == 1
    assert report["memory_gib"]["cache"] > 0 and 0 < report["estimated_mfu"] < 1 and not report["collectives"]


def test_sampling_at_full_size_holds_the_caches_once(tmp_path):
    """1.3 B on a v5e: temporaries are at most 1.2 times the caches, and the decode loop copies no cache within HBM.

    Transfers between HBM and VMEM, S(1) in a layout, are no such copies: kernels compute on data in VMEM.
    """
    sizes = ("--model.dim", "2048", "--model.layers", "24", "--model.heads", "32")
    path = tmp_path / "hlo.txt"
    code, report = tpu("configs/dalle_12b.py", "v5e:1x1", "--sample", "8", *sizes, "--hlo", str(path))
    assert code == 0 and report["fits"] is True
    memory = report["memory_gib"]
    # Key and value of 2048 channels in bfloat16: text of 24 layers, column, row and conv layers.
    tokens = 24 * 256 + 6 * 1024 + 17 * 33 + 166
    assert memory["cache"] * 2**30 == 8 * tokens * 2048 * 2 * 2
    assert memory["temporaries"] <= 1.2 * memory["cache"]
    loop = next(loop for loop in find_loops(path.read_text()) if loop.trip_count == 1023)
    assert any("bf16[8,16,1024,128]" in kernel.line for kernel in loop.kernels), "no loop holds a cache"
    smallest = 8 * 33 * 2048 * 2
    copies = [k for k in loop.kernels if k.kind == "copy" and k.bytes_written >= smallest]
    assert not [kernel.line for kernel in copies if "S(1)" not in kernel.line]


def test_sampling_that_does_not_fit_exits_3(config_file):
    """20 B parameters in bfloat16 on 16 GiB."""
    code, report = tpu(config_file, "v5e:1x1", "--sample", "1", "--model.dim", "8192", "--model.layers", "24")
    assert code == 3 and report["fits"] is False
    assert report["peak_gib_per_device"] is None or report["peak_gib_per_device"] > 16


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["v5e:3x5"], "hosts of 2 x 2 chips, got 'v5e:3x5'"),
        (["v5p:4x4x4", "--mesh.fsdp", "3"], "whose product divides 64 devices"),
        (
            ["v5e:2x2", "--slices", "2", "--mesh.slices", "4"],
            "mesh.slices to match 8 devices in 2 slices, got 4",
        ),
        (["v5e:2x2", "--compiler-options", "xla_tpu_no_such=1"], "No such compile option: 'xla_tpu_no_such'"),
    ],
)
def test_mismatched_arguments_exit_2(config_file, flags, want):
    done = python("train.py", config_file, "--compile-only", *flags)
    assert done.returncode == 2 and want in done.stderr, done.stderr


def test_a_boolean_option_is_accepted(config_file):
    code, report = tpu(
        config_file, "v5e:2x2", "--compiler-options", "xla_tpu_enable_latency_hiding_scheduler=true"
    )
    assert code == 0 and report["compiler_options"]["xla_tpu_enable_latency_hiding_scheduler"] == "True"
