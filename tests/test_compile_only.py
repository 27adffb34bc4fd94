"""Compile-only: names of topologies, costs read from HLO by hand-made programs, and the report itself.

Tests that need the TPU compiler are skipped, and say so, where the package libtpu is not installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dalle_jax.config import (
    CodesConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    DVAEConfig,
    MeshConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
)
from dalle_jax.nn.sharding import make_mesh
from dalle_jax.train import command, compile_only, hlo
from dalle_jax.train.compile_only import compile_step, needed_gib, step_and_arguments, train_flops
from dalle_jax.train.topology import parse_topology, tpu_devices

ROOT = Path(__file__).parents[1]
MODEL = DalleConfig(
    text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=16, layers=3, heads=2, conv_kernel=3
)
TINY = TrainConfig(model=MODEL, data=DataConfig(batch=16), mesh=MeshConfig(data=2, fsdp=4))


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("v5p:4x4x4", ("v5p", (4, 4, 4))),
        ("v5p-128", ("v5p", (4, 4, 4))),  # TensorCores, two to a chip
        ("v4-128", ("v4", (4, 4, 4))),
        ("v5litepod-256", ("v5e", (16, 16))),
        ("v6e-256", ("v6e", (16, 16))),
        ("v6e:2x2", ("v6e", (2, 2))),
        ("v5e:1x1", ("v5e", (1, 1))),
    ],
)
def test_names_of_topologies(name, want):
    assert parse_topology(name) == want


@pytest.mark.parametrize("name", ["v5p:4x4", "v5e:2x2x2", "v9:2x2", "v5p", "v5p-129", "v6e-3", "v5e:0x4", ""])
def test_what_is_no_topology(name):
    with pytest.raises(ValueError, match=r"topology '.*' is not (one|sold); want"):
        parse_topology(name)


def test_slices_are_at_least_one():
    with pytest.raises(ValueError, match="slices is 0; want at least 1"):
        tpu_devices("v5e:2x2", 0)


# --- costs of a program ----------------------------------------------------------------------------------

PROGRAM = """HloModule by_hand

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%fused (a: bf16[2,4]) -> bf16[8,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  ROOT %inside = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%a), dimensions={0}, backend_config={"estimated_cycles":"7"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %gathered = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %sum = (f32[8]{0:T(1024)}, f32[2,3]{1,0}) all-reduce(%y, %z), to_apply=%add
}

%cheap (q: f32[8]) -> f32[8] {
  ROOT %copy = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"3"}
}

%dear (q: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"11"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[], f32[8]) while(%start), condition=%cond, body=%body
  %start.1 = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %pick = f32[8]{0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}
}
"""


def test_costs_by_hand():
    """Five rounds of a loop; a fusion's cycles once; the dearest arm; the result of an asynchronous gather."""
    found = hlo.costs(PROGRAM)
    assert found.cycles == 5 * 100 + 11
    assert found.collectives == {
        "all-gather": (5 + 1, 5 * 8 * 4 * 2 + 8 * 4),
        "all-reduce": (5, 5 * (8 + 6) * 4),
    }
    assert found.kernels == {"kernel": 1}


def test_bytes_of_types():
    assert hlo.shape_bytes("(bf16[2,3]{1,0}, f32[], pred[4], s64[2], u32[0])") == 12 + 4 + 4 + 16
    assert hlo.shape_bytes("f8e4m3fn[10]") == 10


def test_the_gib_that_the_compiler_lacks():
    """The form of XLA's allocator, and the one that libtpu 0.0.42.1 printed here."""
    first = (
        "Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm. Exceeded hbm capacity by 512.0M."
    )
    second = "the total memory required for HLO temporaries (1.5T) exceeds available HBM (15.75G)."
    assert (needed_gib(first), needed_gib(second), needed_gib("no room")) == (16.25, 1536.0, None)


def test_model_flops_by_hand():
    """Weights of a block 12 D^2; scores and their use 2 S D for each position; heads on their own tokens."""
    positions, width = 4 + 16, 16
    block = 12 * width**2 + 2 * positions * width
    want = 3 * positions * block + 4 * width * (20 + 4) + 16 * width * 16
    assert train_flops(TINY) == 6 * 16 * want


def test_model_flops_of_the_paper_are_those_of_its_parameters():
    """6 N tokens for its 12.2 B weights of matrices, and 5% for attention."""
    flops = train_flops(TrainConfig(model=DalleConfig(), data=DataConfig(batch=1024)))
    assert 1.0 < flops / (6 * 12.2e9 * 1024 * 1280) < 1.08


# --- the devices at hand ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    return compile_step(TINY)


def test_local_report(local):
    assert (
        local["fits"] is None
        and local["devices"] == 8
        and local["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "model": 1}
    )
    assert local["estimated_mfu"] is None and local["compile_seconds"] > 0
    memory = local["memory_gib"]
    assert local["peak_gib_per_device"] == pytest.approx(sum(memory.values()), rel=1e-3)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-2)  # two moments
    whole = local["parameters"] * 4 / 2**30
    assert whole / 4 <= memory["parameters"] < whole / 2  # over fsdp=4 but for what is small
    assert "all-gather" in local["collectives"] and "all-reduce" in local["collectives"]


def test_no_moment_is_gathered(local):
    """What a gather of parameters must bring is known: forward, again for the backward pass, and no more.

    Gathered moments or averages would add one or two times the parameters.
    """
    whole = local["parameters"] * 4 / 2**30
    assert 0.9 * whole < local["collectives"]["all-gather"]["gib"] < 2.5 * whole


LARGE = DalleConfig(
    text_vocab=1280,
    text_len=4,
    image_vocab=1280,
    grid=4,
    dim=256,
    layers=4,
    heads=2,
    conv_kernel=3,
    vocab_chunk=0,
)
MIB = 2**20


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adafactor"])
def test_nothing_large_lies_whole_or_is_gathered_by_the_optimizer(optimizer):
    """In the compiled step no argument of a device exceeds 1 MiB, while 12 arrays and more do as a whole; and no
    all-gather of the update brings as much together."""
    config = TrainConfig(
        model=LARGE,
        data=DataConfig(batch=16),
        optim=OptimConfig(optimizer=optimizer),
        mesh=MeshConfig(data=2, fsdp=2, model=2),
    )
    mesh = make_mesh(config.mesh)
    step, arguments = step_and_arguments(config, mesh)
    leaves = jax.tree.leaves(arguments[0])
    assert sum(leaf.size * leaf.dtype.itemsize > MIB for leaf in leaves) >= 12
    with jax.set_mesh(mesh):
        text = step.lower(*arguments).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    held = [hlo.shape_bytes(kind) for kind in re.findall(r" = (\S+) parameter\(", entry)]
    assert len(held) >= len(leaves) and 0 < max(held) <= MIB
    gathers = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert gathers
    own = [line for line in gathers if "/update/" in line]
    assert not [line for line in own if hlo.shape_bytes(line.split(" all-gather")[0].split(" = ")[1]) > MIB]


@pytest.mark.slow
def test_local_report_of_a_tokenizer():
    model = DVAEConfig(image_size=8, groups=2, blocks=1, width=8, decoder_width=8, vocab=8)
    report = compile_step(TrainConfig(model=model, data=DataConfig(batch=8)))
    assert report["model_flops"] is None and report["peak_gib_per_device"] > 0


CONFIG = """
from dalle_jax.config import *
config = TrainConfig(
    model=DalleConfig(text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=16, layers=3, heads=2, conv_kernel=3),
    data=DataConfig(batch=16), mesh=MeshConfig(data=-1),
)
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def test_command_prints_json(config_file, capsys):
    assert (
        command.main(
            [config_file, "--compile-only", "local", "--json", "--mesh.data", "2", "--mesh.fsdp", "4"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert {
        "fits", "peak_gib_per_device", "hbm_gib_per_device", "estimated_mfu", "collectives", "compile_seconds",
    } <= report.keys()  # fmt: skip
    assert "all-gather" in err and "optimizer" in err
    assert not (Path(config_file).parent / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["local", "--mesh.fsdp", "3"], "does not divide 8 devices"),
        (["local", "--data.batch", "12"], "data.batch 12 is not divisible by the 8 devices"),
        (["local", "--slices", "2"], "--slices 2 is for a TPU topology"),
        (["v5p:4x4"], "topology 'v5p:4x4' is not one"),
    ],
)
def test_what_does_not_go_together_exits_2(config_file, capsys, flags, want):
    assert command.main([config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


def test_sampling_compiles_for_a_device(config_file, capsys):
    """Parameters in the compute dtype: 2 bytes for matrices, 4 for the rest; the cache by hand."""
    assert command.main([config_file, "--compile-only", "local", "--sample", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["fits"] is None and report["rows"] == 3 and "3 pictures at once" in err
    blocks = 3 * (12 * 16**2 * 2 + (9 + 4) * 16 * 4)
    tables = (24 + 4 + 16 + 4 + 4 + 2) * 16 * 4  # text and image embeddings, places, the last norm
    assert report["memory_gib"]["parameters"] == pytest.approx(
        (blocks + tables + 16 * (24 * 4 + 16 * 2)) / 2**30
    )
    kept = [5, 16, 6]  # image tokens of row, column and conv
    assert report["memory_gib"]["cache"] == pytest.approx(sum(4 + n for n in kept) * 3 * 2 * 16 * 2 / 2**30)
    assert report["peak_gib_per_device"] > report["memory_gib"]["parameters"]


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["local", "--sample", "0"], "--sample is 0; want at least 1 row"),
        (["local", "--sample", "1", "--slices", "2"], "--slices 2 is for a TPU topology"),
    ],
)
def test_sampling_refuses(config_file, capsys, flags, want):
    assert command.main([config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


def test_its_flags_are_refused_without_it(config_file, capsys):
    assert command.main([config_file, "--json"]) == 2
    assert "--json" in capsys.readouterr().err


def test_without_libtpu_the_package_is_named(config_file, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main([config_file, "--compile-only", "v5e:2x2"]) == 1
    assert "pip install 'dalle-jax[compile]'" in capsys.readouterr().err


# --- the TPU compiler ------------------------------------------------------------------------------------


def tpu(config_file, *flags):
    """Exit code and report; in a process of its own, because libtpu's variables are the process's."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[compile]'")
    command = [sys.executable, "train.py", config_file, "--compile-only", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_tpu_report(config_file):
    code, report = tpu(config_file, "v5e:2x4", "--mesh.data", "1", "--mesh.fsdp", "8")
    assert code == 0 and report["fits"] is True and report["devices"] == 8
    assert report["hbm_gib_per_device"] == 16 and 0 < report["peak_gib_per_device"] < 1
    assert 0 < report["estimated_mfu"] <= report["estimated_mfu_high"] < 1
    assert "all-gather" in report["collectives"]


@pytest.mark.slow
def test_an_axis_may_be_part_of_a_side(config_file):
    """8 of 4 x 4 chips: a mesh that jax.make_mesh refuses."""
    code, report = tpu(config_file, "v6e:4x4", "--mesh.data", "2", "--mesh.fsdp", "8")
    assert code == 0 and report["mesh"] == {"slice": 1, "data": 2, "fsdp": 8, "model": 1}


@pytest.mark.slow
def test_tpu_slices_send_gradients_only(config_file):
    """Between slices go the gradients' sums and no parameters."""
    code, report = tpu(config_file, "v5e:2x2", "--slices", "2", "--mesh.data", "1", "--mesh.fsdp", "4")
    assert code == 0 and report["devices"] == 8 and report["mesh"]["slice"] == 2
    assert 0 < report["collectives"]["send"]["gib"] < 2 * report["parameters"] * 4 / 2**30


@pytest.mark.slow
def test_tpu_out_of_memory_exits_3(config_file):
    code, report = tpu(
        config_file, "v5e:1x1", "--model.dim", "4096", "--model.layers", "40", "--mesh.data", "1"
    )
    assert code == 3 and report["fits"] is False
    assert report["peak_gib_per_device"] > report["hbm_gib_per_device"] == 16


def test_diffusion_is_compiled_on_codes():
    """Its step can be traced from shapes alone, with every condition, before a tokenizer is trained."""
    model = DiffusionConfig(
        image_size=16, patch=2, width=8, multipliers=(1, 2), blocks=1, attention_sizes=(4,), classes=3, low_size=8,
        text=TextEncoderConfig(vocab=9, length=3, width=8, layers=1, heads=2), codes=CodesConfig(vocab=5, grid=4),
    )  # fmt: skip
    task = compile_only._task(TrainConfig(model=model, tokenizer="none", data=DataConfig(batch=4)))
    assert {name: shape for name, (shape, _) in task.row_shapes.items()} == {
        "image": (16, 16, 3), "text": (3,), "label": (), "codes": (16,)
    }  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((4, *shape), dtype) for name, (shape, dtype) in task.row_shapes.items()
    }
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    value, metrics = jax.eval_shape(lambda p, b: task.loss(p, {}, b, jax.random.key(0), 0), params, batch)
    assert value.shape == () and "band_4" in metrics
