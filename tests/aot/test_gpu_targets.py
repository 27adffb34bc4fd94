"""GPUs that are not here, without their compiler: names and errors, and kernels read from hand-made programs.
With it: test_gpu_compiler.py.
"""

import jax
import pytest
from test_compile_only import CONFIG, TINY

from dalle_jax.aot import compile_only, hlo, roofline
from dalle_jax.aot.gpu_kernels import collective_bytes, find_loops, kernels
from dalle_jax.aot.gpu_targets import GPUS, gpu_devices, is_gpu, memory_fraction, parse_gpus
from dalle_jax.aot.report import Target, format_report, parse_target
from dalle_jax.aot.sampler import compile_sample, minimum_bytes
from dalle_jax.aot.tpu_targets import parse_topology
from dalle_jax.cli import main
from dalle_jax.config import BartConfig, DalleConfig
from dalle_jax.models import autoregressive
from dalle_jax.parallel.devices import peak_flops


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


# --- names -----------------------------------------------------------------------------------------------


def test_names_of_gpus():
    assert parse_gpus("h200") == (GPUS["h200"], 1) and parse_gpus("a100-40:8") == (GPUS["a100-40"], 8)
    assert is_gpu("l4:2") and not is_gpu("v5p:2x2x1") and not is_gpu("local")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("h200:0", "target 'h200:0' has '0' GPUs; want 1 to 8 of one host, as in h200:8"),
        ("h200:16", "want 1 to 8"),
        ("l4:2x2", "has '2x2' GPUs"),
        ("h200:", "has '' GPUs"),
    ],
)
def test_counts_that_no_host_has(name, want):
    with pytest.raises(ValueError, match=want):
        parse_target(name)


@pytest.mark.parametrize(
    ("name", "near"), [("H200", "h200"), ("h20:4", "h200"), ("a100:8", "a100-40 or a100-80"), ("l40", "l4")]
)
def test_the_nearest_gpu_is_told(name, near):
    with pytest.raises(
        ValueError, match=rf"did you mean ({near})\? GPUs are h100, h200, a100-40, a100-80, l4"
    ):
        parse_topology(name)


def test_a_gpu_is_known_by_what_jax_calls_it():
    """The peak that training reports mfu by is that of the table."""
    for gpu in GPUS.values():
        assert peak_flops(gpu.kind) == gpu.flops


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="--slices 2 is for a TPU topology; h200:8 is one host of GPUs"):
        gpu_devices("h200:8", 2)


def test_without_the_plugin_the_package_is_named(config_file, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", config_file, "--compile-only", "h200"]) == 1
    assert "pip install 'dalle-jax[cuda]' (no GPU is needed)" in capsys.readouterr().err


def test_jax_that_left_the_compiler_out_is_told(monkeypatch):
    """As after the first array in a process of a machine without a GPU."""

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(
        ValueError, match=r"jax found its devices before h200 was asked for.*JAX_PLATFORMS=cpu"
    ):
        gpu_devices("h200")


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["h200:2", "--sample", "1"], "--sample compiles for one chip and h200:2 has 2; want h200"),
        (["h200", "--slices", "2", "--sample", "1"], "--slices 2 is for a TPU topology"),
        (["h300"], "topology 'h300' is not one"),
    ],
)
def test_what_does_not_go_together_exits_2(config_file, capsys, flags, want):
    assert main(["train", config_file, "--compile-only", *flags]) == 2
    assert want in capsys.readouterr().err


@pytest.mark.parametrize("told", ["0", "1.5", "much"])
def test_the_share_of_memory(monkeypatch, told):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert memory_fraction() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert memory_fraction() == 0.9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", told)
    with pytest.raises(ValueError, match=f"MEM_FRACTION is '{told}'; want a share"):
        memory_fraction()


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
    """Two rows of a table; one place of a cache that is updated where it lies; a quarter of an array, and another
    that two results read; a library call without its room to work in; a copy that three turns make."""
    (loop,) = find_loops(PROGRAM)
    assert loop.trips == 10 and loop.scope == "jit(f)/decode/while"
    found = {kernel.name: (kernel.sort, kernel.read, kernel.written, kernel.runs) for kernel in loop.kernels}
    assert found == {
        "one": ("fusion", 2 * 8 * 4 + 2 * 4, 2 * 8 * 4, 1),
        "cache.1": ("fusion", 4 * 8 * 4 + 4, 4 * 8 * 4, 1),
        "both": ("fusion", 4 * 8 * 4 + 8 * 4, 8 * 4 + 16 * 8 * 4, 1),
        "dot": ("call", 16 * 8 * 4 + 8 * 4, 8 * 4, 1),
        "moved": ("copy", 16 * 8 * 4, 16 * 8 * 4, 1),
        "later": ("copy", 16 * 8 * 4, 16 * 8 * 4, 1),
        "again": ("copy", 8 * 4, 8 * 4, 3),
    }


def test_what_collectives_bring_to_a_device():
    """Of four devices: three quarters of what is gathered, and of a sum twice three quarters."""
    entry, found = hlo.computations(PROGRAM)
    assert collective_bytes(kernels(found, entry), 4) == 32 * 4 * 3 / 4 + 2 * 8 * 4 * 3 / 4


def test_the_bound_of_the_decode_loop_by_hand():
    gpu, (loop,) = GPUS["h200"], find_loops(PROGRAM)
    read, written = (sum(getattr(k, name) * k.runs for k in loop.kernels) for name in ("read", "written"))
    found = roofline.decode_loop_report(PROGRAM, gpu, rows=2, least=500.0)
    assert found == {
        "kernels": {"fusions": 3, "library_calls": 1, "copies": 5, "others": 0},
        "read_bytes": read,
        "written_bytes": written,
        "minimum_bytes": 500.0,
        "codes_per_second": pytest.approx(2 * gpu.bandwidth / (read + written)),
    }
    assert roofline.decode_loop_report(PROGRAM.replace("/decode/", "/prefill/"), gpu, 2, 500.0) is None
    seconds = roofline.roofline_seconds(PROGRAM, gpu, 4, flops=gpu.flops)
    assert seconds["products"] == 1 / 4 and seconds["links"] == pytest.approx(144 / gpu.link)


def test_the_least_that_a_pass_reads_by_hand():
    """float32: matrices, biases, norms and head; and of each kind the keys and values that a code sees."""
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
    assert minimum_bytes(cfg, params, cache, 3) == pytest.approx(4 * (weights + keys))


def test_the_least_of_an_encoder_and_decoder():
    """What makes the keys of captions is the prefill's, and no pass reads it."""
    cfg = BartConfig(
        text_vocab=9, text_len=5, image_vocab=7, decoder_vocab=9, decoder_start_id=7, grid=4, dim=16, encoder_layers=2, layers=2,
        heads=2, mlp_width=16, dtype="float32",
    )  # fmt: skip
    params = jax.eval_shape(
        lambda k: autoregressive.prepare_for_decode(cfg, autoregressive.init(cfg, k)), jax.random.key(0)
    )
    cache = jax.eval_shape(lambda: autoregressive.init_cache(cfg, 1))
    less = cfg.layers * 2 * 16 * 16
    whole = sum(x.size for n in ("blocks", "image_head", "norm_out") for x in jax.tree.leaves(params[n]))
    keys = cfg.layers * 2 * 16 * (5 + 17 / 2)
    assert minimum_bytes(cfg, params, cache, 1) == pytest.approx(4 * (whole - less + keys))


# --- reports ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_exits_3(config_file, capsys, monkeypatch):
    """On the devices here, said to have a ten-thousandth of a GiB."""

    def small(name, slices=1):
        return Target(name, slices, jax.devices()[:1], None, 1e-4, None, 0.5)

    monkeypatch.setattr(compile_only, "parse_target", small)
    flags = ["--mesh.data", "1", "--compiler-options", "xla_backend_optimization_level=0"]
    assert main(["train", config_file, "--compile-only", "h200", *flags]) == 3
    assert "0.0001 GiB, 50% of the GPU's 0.0002 (XLA_PYTHON_CLIENT_MEM_FRACTION)" in capsys.readouterr().out


def test_a_report_tells_an_estimate_from_a_run(monkeypatch):
    """Lines of what a GPU's program reads, on top of a report of the devices here."""
    report = compile_sample(TINY, "local", 2)
    assert report["decoding"] is None and "decode loop" not in format_report(report)
    report["roofline_seconds"] = {"products": 0.5, "memory": 2.0, "links": 0.0}
    report["decoding"] = roofline.decode_loop_report(PROGRAM, GPUS["l4"], 2, 1000.0)
    text = format_report(report)
    assert "at least 2 s by the data sheet (products 0.5, memory 2, links 0); not a run" in text
    assert "9 kernels a pass of 2 codes: 3 fusions, 1 library calls, 5 copies" in text
    assert "an estimate from the program, not a run" in text
