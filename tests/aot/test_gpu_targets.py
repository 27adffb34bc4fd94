"""GPU targets without the GPU compiler: names, errors, and kernels read from hand-written HLO.

test_gpu_compiler.py compiles with the GPU compiler.
"""

import jax
import pytest
from aot_configs import SMALL_RUN, write_config

from dalle_jax.aot import hlo, roofline, training_step
from dalle_jax.aot.gpu_kernels import find_loops, kernel_collective_bytes, list_kernels
from dalle_jax.aot.gpu_targets import GPUS, gpu_devices, gpu_memory_fraction, is_gpu, parse_gpus
from dalle_jax.aot.report import format_report
from dalle_jax.aot.sampler import compile_sampler, minimum_decode_bytes
from dalle_jax.aot.targets import Target, make_target
from dalle_jax.aot.tpu_targets import parse_topology
from dalle_jax.cli import main
from dalle_jax.config import BartConfig, DalleConfig
from dalle_jax.models import autoregressive
from dalle_jax.parallel.devices import peak_flops


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


# --- names -----------------------------------------------------------------------------------------------


def test_gpu_names():
    assert parse_gpus("h200") == (GPUS["h200"], 1) and parse_gpus("a100-40:8") == (GPUS["a100-40"], 8)
    assert is_gpu("l4:2") and not is_gpu("v5p:2x2x1") and not is_gpu("local")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("h200:0", r"Expected 1 to 8 GPUs of one host, got 'h200:0'\. Use e\.g\. h200:8"),
        ("h200:16", "Expected 1 to 8 GPUs of one host, got 'h200:16'"),
        ("l4:2x2", "Expected 1 to 8 GPUs of one host, got 'l4:2x2'"),
        ("h200:", "Expected 1 to 8 GPUs of one host, got 'h200:'"),
    ],
)
def test_impossible_counts_are_refused(name, want):
    with pytest.raises(ValueError, match=want):
        make_target(name)


@pytest.mark.parametrize(
    ("name", "near"), [("H200", "h200"), ("h20:4", "h200"), ("a100:8", "a100-40 or a100-80"), ("l40", "l4")]
)
def test_messages_suggest_the_nearest_gpu(name, near):
    with pytest.raises(
        ValueError, match=rf"Did you mean ({near})\? GPUs are h100, h200, a100-40, a100-80, l4"
    ):
        parse_topology(name)


def test_the_peak_agrees_with_the_table_of_training():
    """Training looks up the peak by the device kind."""
    for gpu in GPUS.values():
        assert peak_flops(gpu.device_kind) == gpu.peak_flops


def test_gpus_have_no_slices():
    with pytest.raises(
        ValueError, match="Expected a TPU topology with --slices 2, got h200:8, one host of GPUs"
    ):
        gpu_devices("h200:8", 2)


def test_a_missing_plugin_names_the_extra(config_file, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", config_file, "--compile-only", "h200"]) == 1
    assert "pip install 'dalle-jax[cuda]' (no GPU is needed)" in capsys.readouterr().err


def test_initialized_backends_are_refused(monkeypatch):
    """After the first array of a process without a GPU, jax does not know the platform."""

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(
        ValueError, match=r"Expected the target h200 before jax initializes its backends.*JAX_PLATFORMS=cpu"
    ):
        gpu_devices("h200")


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (
            ["h200:2", "--sample", "1"],
            "Expected a target of one device with --sample, got 2 of h200:2. Use h200",
        ),
        (["h200", "--slices", "2", "--sample", "1"], "Expected a TPU topology with --slices 2, got h200"),
        (["h300"], "Expected a TPU topology, a GPU or local, got 'h300'"),
    ],
)
def test_mismatched_arguments_exit_2(config_file, capsys, flags, want):
    assert main(["train", config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "1.5", "much"])
def test_memory_fraction(monkeypatch, value):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert gpu_memory_fraction() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert gpu_memory_fraction() == 0.9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
    with pytest.raises(ValueError, match=rf"MEM_FRACTION in \(0, 1\], got '{value}'\. Use e\.g\. 0\.95"):
        gpu_memory_fraction()


# --- kernels ---------------------------------------------------------------------------------------------

PROGRAM = """HloModule by_hand

%row (table: f32[100,8], at: s32[2]) -> f32[2,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %at = s32[2]{0} parameter(1)
  %picked = f32[2,8]{1,0} gather(%table, %at), offset_dims={1}
  ROOT %twice = f32[2,8]{1,0} add(%picked, %picked)
}

%put (cache: f32[4,16,8], new: f32[4,8], at: s32[]) -> f32[4,16,8] {
  %new = f32[4,8]{1,0} parameter(1)
  %part = f32[4,1,8]{2,1,0} bitcast(%new)
  %cache = f32[4,16,8]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(2)
  ROOT %written = f32[4,16,8]{2,1,0} dynamic-update-slice(%cache, %part, %at.1, %at.1, %at.1)
}

%column (x: f32[16,8], y: f32[8]) -> (f32[8], f32[16,8]) {
  %x = f32[16,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %some = f32[4,8]{1,0} slice(%x), slice={[0:4], [0:8]}
  %added = f32[4,8]{1,0} add(%some, %some)
  %sum = f32[8]{0} reduce(%added, %y), dimensions={0}, to_apply=%add
  %wide = f32[16,8]{1,0} broadcast(%y), dimensions={1}
  ROOT %two = (f32[8]{0}, f32[16,8]{1,0}) tuple(%sum, %wide)
}

%turned (z: f32[16,8]) -> f32[8,16] {
  %z = f32[16,8]{1,0} parameter(0)
  ROOT %t = f32[8,16]{1,0} transpose(%z), dimensions={1,0}
}

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %again = f32[8]{0} copy(%p)
}

%inner_cond (p: f32[8]) -> pred[] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

%body (state: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %state = (s32[], f32[100,8]) parameter(0)
  %table.1 = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %which = s32[2]{0} constant({1, 2})
  %one = f32[2,8]{1,0} fusion(%table.1, %which), kind=kLoop, calls=%row
  %old = f32[4,16,8]{2,1,0} get-tuple-element(%state), index=2
  %fresh = f32[4,8]{1,0} get-tuple-element(%state), index=3
  %where = s32[] get-tuple-element(%state), index=0
  %cache.1 = f32[4,16,8]{2,1,0} fusion(%old, %fresh, %where), kind=kLoop, calls=%put
  %flat = f32[16,8]{1,0} get-tuple-element(%state), index=4
  %eight = f32[8]{0} get-tuple-element(%state), index=5
  %both = (f32[8]{0}, f32[16,8]{1,0}) fusion(%flat, %eight), kind=kInput, calls=%column
  %dot = (f32[8]{0}, s8[1000]{0}) custom-call(%flat, %eight), custom_call_target="__cublas$gemm"
  %moved = f32[8,16]{1,0} fusion(%flat), kind=kInput, calls=%turned
  %later = ((f32[16,8]{1,0}), f32[8,16]{1,0}, u32[]) fusion-start(%flat), kind=kInput, calls=%turned
  %then = f32[8,16]{1,0} fusion-done(%later)
  %loop.1 = f32[8]{0} while(%eight), condition=%inner_cond, body=%inner, N3
  ROOT %out = (s32[], f32[100,8]) tuple(%where, %table.1)
}

%cond (state: (s32[], f32[100,8])) -> pred[] {
  %state.1 = (s32[], f32[100,8]) parameter(0)
  ROOT %less = pred[] fusion(%state.1), kind=kLoop, calls=%compare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %loop = (s32[], f32[100,8]) while(%start), condition=%cond, body=%body, metadata={op_name="jit(f)/decode/while"}, N10
  %gather = (f32[8]{0}, f32[32]{0}) all-gather-start(%x.1), dimensions={0}
  %reduce = f32[8]{0} all-reduce-start(%x.1), to_apply=%add
  ROOT %done = f32[8]{0} all-reduce-done(%reduce)
}
"""
for n in (3, 10):
    PROGRAM = PROGRAM.replace(f"N{n}\n", f'backend_config={{"known_trip_count":{{"n":"{n}"}}}}\n')


def test_kernels_by_hand():
    """Two rows of a table; one position of a cache that is updated in place; a quarter of an array, and another that
    two results read; a library call without its workspace; a copy in a loop of three iterations."""
    (loop,) = find_loops(PROGRAM)
    assert loop.trip_count == 10 and loop.scope == "jit(f)/decode/while"
    found = {
        kernel.name: (kernel.kind, kernel.bytes_read, kernel.bytes_written, kernel.runs)
        for kernel in loop.kernels
    }
    assert found == {
        "one": ("fusion", 2 * 8 * 4 + 2 * 4, 2 * 8 * 4, 1),
        "cache.1": ("fusion", 4 * 8 * 4 + 4, 4 * 8 * 4, 1),
        "both": ("fusion", 4 * 8 * 4 + 8 * 4, 8 * 4 + 16 * 8 * 4, 1),
        "dot": ("library_call", 16 * 8 * 4 + 8 * 4, 8 * 4, 1),
        "moved": ("copy", 16 * 8 * 4, 16 * 8 * 4, 1),
        "later": ("copy", 16 * 8 * 4, 16 * 8 * 4, 1),
        "again": ("copy", 8 * 4, 8 * 4, 3),
    }


def test_collective_bytes():
    """On four devices: three quarters of a gathered array, and twice three quarters of a summed one."""
    entry, computations = hlo.parse_computations(PROGRAM)
    assert kernel_collective_bytes(list_kernels(computations, entry), 4) == 32 * 4 * 3 / 4 + 2 * 8 * 4 * 3 / 4


def test_decode_loop_report_by_hand():
    gpu, (loop,) = GPUS["h200"], find_loops(PROGRAM)
    read, written = (
        sum(getattr(k, name) * k.runs for k in loop.kernels) for name in ("bytes_read", "bytes_written")
    )
    found = roofline.decode_loop_report(PROGRAM, gpu, batch_size=2, minimum_bytes=500.0)
    assert found == {
        "kernels": {"fusions": 3, "library_calls": 1, "copies": 5, "others": 0},
        "bytes_read": read,
        "bytes_written": written,
        "minimum_bytes": 500.0,
        "codes_per_second": pytest.approx(2 * gpu.memory_bandwidth / (read + written)),
    }
    assert roofline.decode_loop_report(PROGRAM.replace("/decode/", "/prefill/"), gpu, 2, 500.0) is None
    seconds = roofline.roofline_seconds(PROGRAM, gpu, 4, model_flops=gpu.peak_flops)
    assert seconds["products"] == 1 / 4 and seconds["links"] == pytest.approx(144 / gpu.link_bandwidth)


def test_minimum_bytes_by_hand():
    """float32: matrices, biases, norms and head, and the visible keys and values of each attention type."""
    cfg = DalleConfig(
        text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=16, layers=2, heads=2, attention=("full", "row"),
        last_attention=None, dtype="float32",
    )  # fmt: skip
    params = jax.eval_shape(
        lambda k: autoregressive.prepare_for_decode(cfg, autoregressive.init(cfg, k)), jax.random.key(0)
    )
    cache = jax.eval_shape(lambda: autoregressive.init_cache(cfg, 3))
    weights = 2 * (12 * 16**2 + (9 + 4) * 16) + 2 * 16 + 16 * 16 + 16 * cfg.head_bias
    full, row = 17 / 2, (1 + 2 + 3 + 4 + 12 * 5) / 16
    keys = 3 * 2 * 16 * (2 * 4 + full + row)
    assert minimum_decode_bytes(cfg, params, cache, 3) == pytest.approx(4 * (weights + keys))


def test_minimum_bytes_of_an_encoder_decoder():
    """The matrices for keys and values of captions belong to the prefill; no pass reads them."""
    cfg = BartConfig(
        text_vocab=9, text_len=5, image_vocab=7, decoder_vocab=9, decoder_start_id=7, grid=4, dim=16,
        encoder_layers=2, layers=2,
        heads=2, mlp_width=16, dtype="float32",
    )  # fmt: skip
    params = jax.eval_shape(
        lambda k: autoregressive.prepare_for_decode(cfg, autoregressive.init(cfg, k)), jax.random.key(0)
    )
    cache = jax.eval_shape(lambda: autoregressive.init_cache(cfg, 1))
    less = cfg.layers * 2 * 16 * 16
    whole = sum(x.size for n in ("blocks", "image_head", "norm_out") for x in jax.tree.leaves(params[n]))
    keys = cfg.layers * 2 * 16 * (5 + 17 / 2)
    assert minimum_decode_bytes(cfg, params, cache, 1) == pytest.approx(4 * (whole - less + keys))


# --- reports ---------------------------------------------------------------------------------------------


def test_a_program_that_does_not_fit_exits_3(config_file, capsys, monkeypatch):
    """The attached device, with a memory of 0.0001 GiB."""

    def small_target(name, num_slices=1):
        return Target(name, num_slices, jax.devices()[:1], hbm_gib=1e-4, hbm_fraction=0.5)

    monkeypatch.setattr(training_step, "make_target", small_target)
    flags = ["--mesh.data", "1", "--compiler-options", "xla_backend_optimization_level=0"]
    assert main(["train", config_file, "--compile-only", "h200", *flags]) == 3
    assert "0.0001 GiB, 50% of the GPU's 0.0002 (XLA_PYTHON_CLIENT_MEM_FRACTION)" in capsys.readouterr().out


def test_a_report_marks_bounds():
    """Lines for the decode loop of a GPU, added to a report for the attached device."""
    report = compile_sampler(SMALL_RUN, "local", 2)
    assert report["decode_loop"] is None and "decode loop" not in format_report(report)
    report["roofline_seconds"] = {"products": 0.5, "memory": 2.0, "links": 0.0}
    report["decode_loop"] = roofline.decode_loop_report(PROGRAM, GPUS["l4"], 2, 1000.0)
    text = format_report(report)
    assert "at least 2 s by the data sheet (products 0.5, memory 2, links 0); a bound, not measured" in text
    assert "9 kernels per pass of 2 codes: 3 fusions, 1 library calls, 5 copies" in text
    assert "bounds, not measured" in text
