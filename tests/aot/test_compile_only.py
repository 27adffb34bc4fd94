"""Compilation for the attached devices: names of topologies, costs read from hand-written HLO, reports of every stage.

test_tpu_compiler.py compiles with the TPU compiler.
"""

import dataclasses
import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_configs import SMALL_DALLE, SMALL_RUN, STAGES, stage_config, write_config

from dalle_jax.aot import hlo
from dalle_jax.aot.report import CompileReport, format_report, required_gib
from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.aot.tpu_targets import parse_topology, tpu_devices
from dalle_jax.aot.training_step import compile_training_step, training_step_and_arguments
from dalle_jax.cli import main
from dalle_jax.config import (
    CodesConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
)
from dalle_jax.models.diffusion import loss, unet
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train.compiler_options import compiler_option_error, compiler_options
from dalle_jax.train.flops import count_flops
from dalle_jax.train.tasks import make_task

REPORT_FIELDS = CompileReport.__required_keys__

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
def test_topology_names(name, want):
    assert parse_topology(name) == want


@pytest.mark.parametrize("name", ["v5p:4x4", "v5e:2x2x2", "v9:2x2", "v5p", "v5p-129", "v6e-3", "v5e:0x4", ""])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ValueError, match=r"Expected a TPU topology.*, got '.*'\. Use "):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("v5e:3x5", "divides into hosts of 2 x 2 chips, got 'v5e:3x5'. Use even first two sizes"),
        ("v5p:4x3x4", "divides into hosts of 2 x 2 chips, got 'v5p:4x3x4'"),
        ("v6e:32x32", "Expected at most 256 chips in a slice of v6e, got 1024 in 'v6e:32x32'. Use --slices"),
    ],
)
def test_impossible_shapes_are_refused(name, want):
    with pytest.raises(ValueError, match=want):
        parse_topology(name)


def test_messages_list_the_known_topologies():
    with pytest.raises(
        ValueError,
        match=r"Expected a TPU topology, got 'v5p-129'. Use v5p-8, v5p-16.*shape, as in v5p:8x16x16",
    ):
        parse_topology("v5p-129")
    with pytest.raises(ValueError, match=r"\(v4-N, v5p-N, v5litepod-N, v5e-N, v6e-N: v5p-128, v5litepod-256"):
        parse_topology("v7-128")


def test_slices_are_at_least_one():
    with pytest.raises(ValueError, match="Expected at least 1 slice, got 0"):
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
  %both = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, /*index=1*/f32[12]{0})) all-gather-start(%x, %y), dimensions={0}
  %part = ((f32[8]{0:T(8,128)}), f32[2]{0}) reduce-scatter-start(%x), dimensions={0}
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %pick = f32[8]{0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}
}
"""


def test_costs_by_hand():
    """Five iterations of a loop; the cycles of a fusion once; the most expensive branch; the results of asynchronous
    collectives, of one array and of several, larger and smaller than their operands."""
    found = hlo.program_costs(PROGRAM)
    assert found.cycles == 5 * 100 + 11
    assert found.collectives == {
        "all-gather": (5 + 2, 5 * 8 * 4 * 2 + 8 * 4 + 20 * 4),
        "all-reduce": (5, 5 * (8 + 6) * 4),
        "reduce-scatter": (1, 2 * 4),
    }
    assert found.custom_kernels == {"kernel": 1}


OVERLAPPED = """HloModule by_hand

%begin (p: f32[2]) -> (f32[2], f32[8]) {
  %gather.1 = f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%beside (p: f32[2]) -> f32[8] {
  %gather.2 = f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}
  %other = f32[4]{0} all-gather(%p), channel_id=8, dimensions={0}
}

%end (p: f32[2]) -> f32[8] {
  %gather.3 = f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %start = (f32[2]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%begin
  %product = f32[8]{0} fusion(%x), kind=kOutput, calls=%beside, backend_config={"estimated_cycles":"30"}
  ROOT %done = f32[8]{0} fusion(%start), kind=kCustom, calls=%end
}
"""


def test_an_overlapped_collective_counts_once():
    """It is in three fusions with one channel; another channel is another collective."""
    found = hlo.program_costs(OVERLAPPED)
    assert found.cycles == 30 and found.collectives == {"all-gather": (2, 32 + 16)}
    found = hlo.program_costs(OVERLAPPED.replace("channel_id=8", "channel_id=7"))
    assert found.collectives == {"all-gather": (1, 32)}


def test_shape_bytes():
    assert hlo.shape_bytes("(bf16[2,3]{1,0}, f32[], pred[4], s64[2], u32[0])") == 12 + 4 + 4 + 16
    assert hlo.shape_bytes("f8e4m3fn[10]") == 10


def test_required_gib():
    """The message of XLA's allocator, and that of libtpu 0.0.42.1."""
    first = (
        "Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm. Exceeded hbm capacity by 512.0M."
    )
    second = "the total memory required for HLO temporaries (1.5T) exceeds available HBM (15.75G)."
    assert (required_gib(first), required_gib(second), required_gib("no room")) == (16.25, 1536.0, None)


# --- the attached devices ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    return compile_training_step(SMALL_RUN)


def test_local_report(local):
    assert (
        local["fits"] is None
        and local["num_devices"] == 8
        and local["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "model": 1}
    )
    assert local["estimated_mfu"] is None and local["compile_seconds"] > 0
    memory = local["memory_gib"]
    assert local["peak_gib_per_device"] == pytest.approx(sum(memory.values()), rel=1e-3)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-2)  # two moments
    whole = local["parameters"] * 4 / 2**30
    assert whole / 4 <= memory["parameters"] < whole / 2  # sharded over fsdp=4, except small arrays
    assert "all-gather" in local["collectives"] and "all-reduce" in local["collectives"]


def test_no_optimizer_state_is_gathered(local):
    """All-gathers bring the parameters once for the forward and once for the backward pass.

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
    loss_vocab_chunk=0,
)
MIB = 2**20


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adafactor"])
def test_large_arrays_are_sharded_and_the_optimizer_gathers_none(optimizer):
    """No argument of a device exceeds 1 MiB, though 12 or more global arrays do; no all-gather of the update does
    either."""
    config = TrainConfig(
        model=LARGE,
        data=DataConfig(batch_size=16),
        optim=OptimConfig(optimizer=optimizer),
        mesh=MeshConfig(data=2, fsdp=2, model=2),
    )
    mesh = make_mesh(config.mesh)
    step, arguments = training_step_and_arguments(config, mesh)
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


@pytest.mark.parametrize(
    "name", [n if n in ("dvae", "clip") else pytest.param(n, marks=pytest.mark.slow) for n in STAGES]
)
def test_every_stage_compiles(name):
    """No tokenizer, vocabulary or data has to exist. A VQGAN includes the parameters of its discriminator."""
    config = stage_config(name)
    report = compile_training_step(config)
    assert report.keys() == REPORT_FIELDS and report["program"] == f"training step of a {config.model.kind}"
    params = jax.eval_shape(lambda: make_task(config).init(jax.random.key(0)))
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report["model_flops"] > 6 * 16 * 100 and report["peak_gib_per_device"] > 0
    assert report["memory_gib"]["optimizer"] >= 1.9 * report["memory_gib"]["parameters"]
    assert "all-reduce" in report["collectives"] and format_report(report)


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


def test_command_prints_json_and_writes_the_hlo(config_file, tmp_path, capsys):
    file = tmp_path / "step.hlo"
    flags = ["--mesh.data", "2", "--mesh.fsdp", "4", "--compiler-options", "xla_backend_optimization_level=0"]
    assert main(["train", config_file, "--compile-only", "local", "--json", "--hlo", str(file), *flags]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() == REPORT_FIELDS
    assert "all-gather" in err and "optimizer" in err and "xla_backend_optimization_level=0" in err
    found = hlo.program_costs(file.read_text()).collectives
    assert {k: v["runs"] for k, v in report["collectives"].items()} == {k: n for k, (n, _) in found.items()}
    assert not (Path(config_file).parent / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["local", "--mesh.fsdp", "3"], "whose product divides 8 devices"),
        (["local", "--data.batch-size", "12"], "Expected data.batch_size divisible by the 8 devices"),
        (["local", "--slices", "2"], "Expected a TPU topology with --slices 2, got the local devices"),
        (["v5p:4x4"], "Expected a TPU topology, a GPU or local, got 'v5p:4x4'"),
    ],
)
def test_mismatched_arguments_exit_2(config_file, capsys, flags, want):
    assert main(["train", config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


def test_sampling_compiles_for_a_device(config_file, capsys):
    """Matrices have 2 bytes per number, the rest 4; the sizes of parameters and caches by hand."""
    assert main(["train", config_file, "--compile-only", "local", "--sample", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() == REPORT_FIELDS and report["fits"] is None and report["num_devices"] == 1
    assert report["batch_size"] == 3 and "sampling of the codes of 3 images" in err
    blocks = 3 * (12 * 16**2 * 2 + (9 + 4) * 16 * 4)
    tables = (24 + 4 + 16 + 4 + 4 + 2) * 16 * 4  # text and image embeddings, positions, the last norm
    memory = report["memory_gib"]
    assert memory["parameters"] == pytest.approx((blocks + tables + 16 * (24 * 4 + 16 * 2)) / 2**30)
    cache_sizes = [5, 16, 6]  # image tokens of row, column and conv
    assert memory["cache"] == pytest.approx(sum(4 + n for n in cache_sizes) * 3 * 2 * 16 * 2 / 2**30)
    # The float32 parameters of the run stay in memory.
    stored = 3 * (12 * 16**2 + (9 + 4) * 16) * 4 + tables + 16 * (24 + 16) * 4
    assert memory["checkpoint_parameters"] == pytest.approx(stored / 2**30)
    rows = 3 * (4 * 4 + 8 + 16 * 4)  # ids, a key, and the codes
    taken = (
        sum(memory[name] for name in ("checkpoint_parameters", "parameters", "temporaries", "program"))
        + rows / 2**30
    )
    assert report["peak_gib_per_device"] == pytest.approx(taken, rel=1e-6)
    per_token = 3 * (12 * 16**2 + 2 * 20 * 16)
    assert report["model_flops"] == 2 * 3 * (20 * per_token + 16 * 16 * 16)


@pytest.mark.slow
def test_sampling_of_a_diffusion_model_runs_all_steps():
    """The U-Net runs 50 times, the encoder of the conditions once."""
    model = STAGES["diffusion"]
    report = compile_sampler(stage_config("diffusion"), "local", 2)
    assert report.keys() == REPORT_FIELDS and report["program"].startswith("sampling of 2 images in 50 steps")
    params = jax.eval_shape(lambda: unet.init(model, jax.random.key(0)))
    given = unet.Conditions(*(jnp.zeros((2, *n), jnp.int32) for n in ((3,), (), (4,))))
    read = count_flops(jax.make_jaxpr(lambda p: unet.encode_conditions(model, p, given))(params))
    images, key = jnp.zeros((2, 8, 8, 3)), jax.random.key(0)
    once = count_flops(jax.make_jaxpr(lambda p: loss.loss(model, p, images, given, key))(params))
    assert report["model_flops"] == pytest.approx(50 * once - 49 * read, rel=1e-3) and read > 0


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["local", "--sample", "0"], "Expected at least 1 image, got --sample 0"),
        (
            ["local", "--sample", "1", "--slices", "2"],
            "Expected a TPU topology with --slices 2, got the local devices",
        ),
        (
            ["local", "--quantization", "int8"],
            "Expected --sample ROWS with --quantization, got none",
        ),
        (
            ["v5e:2x2", "--sample", "1"],
            "Expected a target of one device with --sample, got 4 of v5e:2x2. Use v5e:1x1",
        ),
    ],
)
def test_mismatched_sampling_arguments_exit_2(config_file, capsys, flags, want):
    assert main(["train", config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


def test_compiler_options():
    """Options of the configuration replace the defaults of the device; an empty value removes one."""
    windowed = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

    def options(kind, *overrides, platform="tpu"):
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        return compiler_options(types.SimpleNamespace(devices=np.array([[device]])), overrides)

    v5p = options("TPU v5")
    assert v5p.items() > windowed.items() and "xla_tpu_scoped_vmem_limit_kib" in v5p
    assert options("TPU v5 lite") == windowed and options("cpu", platform="cpu") == {}
    assert options("TPU v5", "xla_tpu_scoped_vmem_limit_kib=") == windowed
    assert options("TPU v5", "xla_tpu_scoped_vmem_limit_kib=1") == windowed | {
        "xla_tpu_scoped_vmem_limit_kib": "1"
    }
    assert options("cpu", "xla_a=true", "xla_b=2", platform="cpu") == {"xla_a": "True", "xla_b": "2"}


def test_compiler_options_reach_the_training_step():
    """`make_step` passes an unknown option to the compiler, which refuses it."""
    mesh = make_mesh(SMALL_RUN.mesh)
    config = dataclasses.replace(SMALL_RUN, compiler_options=("xla_no_such=1",))
    step, arguments = training_step_and_arguments(config, mesh)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option") as error,
        jax.set_mesh(mesh),
    ):
        step.lower(*arguments).compile()
    assert compiler_option_error(error.value).startswith(
        "compiler_options: No such compile option: 'xla_no_such'"
    )
    assert compiler_option_error(jax.errors.JaxRuntimeError("INTERNAL: something else")) is None


@pytest.mark.parametrize(
    ("option", "want"),
    [
        ("xla_no_such=1", "compiler_options: No such compile option: 'xla_no_such'"),
        ("xla_cpu_enable_fast_math=maybe", "'maybe' is not a valid bool value"),
    ],
)
def test_an_invalid_compiler_option_exits_2(config_file, capsys, option, want):
    flags = ["--compile-only", "local", "--mesh.data", "-1", "--compiler-options", option]
    assert main(["train", config_file, *flags]) == 2
    assert want in capsys.readouterr().err


def test_a_malformed_compiler_option_is_refused():
    with pytest.raises(ValueError, match="NAME=VALUE in compiler_options, got '--xla_a'"):
        TrainConfig(model=SMALL_DALLE, compiler_options=("--xla_a",))


@pytest.mark.parametrize(
    "flags", [("--slices", "2"), ("--sample", "1"), ("--quantization", "int8"), ("--hlo", "program.hlo")]
)
def test_flags_are_refused_without_compile_only(config_file, capsys, flags):
    assert main(["train", config_file, *flags]) == 2
    assert f"Expected --compile-only TARGET with {flags[0]}, got none" in capsys.readouterr().err


def test_a_missing_libtpu_names_the_extra(config_file, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", config_file, "--compile-only", "v5e:2x2"]) == 1
    assert "pip install 'dalle-jax[compile]'" in capsys.readouterr().err


def test_diffusion_compiles_on_codes():
    """The step traces from shapes alone, with every condition, before a tokenizer exists."""
    model = DiffusionConfig(
        image_size=16, patch_size=2, width=8, channel_multipliers=(1, 2), blocks=1, attention_sizes=(4,),
        num_classes=3, low_res_size=8,
        text=TextEncoderConfig(text_vocab=9, text_len=3, dim=8, layers=1, heads=2), codes=CodesConfig(vocab=5, grid=4),
    )  # fmt: skip
    task = make_task(TrainConfig(model=model, image_tokenizer="none", data=DataConfig(batch_size=4)))
    assert {name: shape for name, (shape, _) in task.batch_spec.items()} == {
        "image": (16, 16, 3), "text": (3,), "label": (), "codes": (16,)
    }  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((4, *shape), dtype) for name, (shape, dtype) in task.batch_spec.items()
    }
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    value, metrics = jax.eval_shape(lambda p, b: task.loss(p, {}, b, jax.random.key(0), 0), params, batch)
    assert value.shape == () and "band_4" in metrics
