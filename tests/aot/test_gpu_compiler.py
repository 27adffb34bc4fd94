"""Compilation with XLA's GPU compiler, and laws of the sampler's programs: `pytest -m cuda`.

The tests need the CUDA plugin of jax and no GPU. The model has every attention type, so that one program covers all.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dalle_jax.aot.gpu_kernels import find_loops
from dalle_jax.aot.gpu_targets import GPUS, gpu_devices
from dalle_jax.config import DalleConfig, MeshConfig
from dalle_jax.models import autoregressive, dalle
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import replicated
from dalle_jax.sampling import decode_state
from dalle_jax.sampling.generate import generate, row_keys

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin"),
        reason="no GPU compiler: pip install -e '.[cuda]' (no GPU is needed)",
    ),
]
ROOT = Path(__file__).parents[2]
KINDS = ("full", "row", "column", "conv", "conv_torus", "conv_clamped")
# Matrices have 2 MiB, much more than any other array of a step; caches have 18 KiB or more per image.
CFG = DalleConfig(
    text_vocab=100, text_len=16, image_vocab=1024, grid=8, dim=1024, layers=len(KINDS), heads=8, attention=KINDS,
    conv_kernel=3, dtype="bfloat16",
)  # fmt: skip
MATRIX = CFG.dim**2 * 2


def compile_for_gpu(program, tree, *static, gpu="h200", **options):
    """Compile a jitted function for a GPU: static arguments, then `tree` as shapes, then keyword arguments."""
    mesh = make_mesh(MeshConfig(data=1), gpu_devices(gpu))

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    with jax.set_mesh(mesh):
        return program.lower(*static, *jax.tree.map(abstract, tree), **options).compile()


def decode_params(cfg):
    return jax.eval_shape(
        lambda key: autoregressive.prepare_for_decode(cfg, dalle.init(cfg, key), platform="gpu"),
        jax.random.key(0),
    )


def sampler(cfg, rows, **options):
    params = decode_params(cfg)
    text = jnp.zeros((rows, cfg.text_len), jnp.int32)
    return compile_for_gpu(generate, (params, text, row_keys(range(rows))), cfg, top_k=8, **options)


def batcher(program, *counts, **options):
    state = jax.eval_shape(lambda: decode_state.init_decode_state(CFG, 4))
    return compile_for_gpu(
        program,
        (decode_params(CFG), state, *map(jnp.int32, counts)),
        CFG,
        top_k=8,
        use_top_p=False,
        **options,
    )


PROGRAMS = {
    "one row": lambda: sampler(CFG, 1),
    "eight rows": lambda: sampler(CFG, 8),
    "guided": lambda: sampler(CFG, 1, guidance_scale=1.5),
    "jacobi": lambda: sampler(CFG, 2, draft_len=4),
    "queue": lambda: batcher(decode_state.decode_slots, 1),
    "queue, jacobi": lambda: batcher(decode_state.decode_slots_speculatively, 1, 1, draft_len=4),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def decode(request):
    """Name of a program, and the kernels of its decode loops."""
    text = PROGRAMS[request.param]().as_text()
    loops = [loop for loop in find_loops(text) if "/decode/" in loop.scope]
    assert loops and all(len(loop.kernels) > 4 * CFG.layers for loop in loops)
    return request.param, [kernel for loop in loops for kernel in loop.kernels]


def test_the_decode_loop_copies_no_cache(decode):
    """No cache, not even the smallest, is copied. Speculative decoding writes several tokens into a ring buffer, which
    jax
    0.12 rolls there and back; there, no cache of all codes is copied."""
    name, kernels = decode
    size = CFG.num_codes if name == "jacobi" else CFG.grid + 1
    copies = [k for k in kernels if k.kind == "copy"]
    assert not [k for k in copies if k.bytes_written >= size * CFG.dim * 2]  # keys of one image


def test_no_kernel_writes_a_matrix(decode):
    """A decode step reads matrices and writes vectors."""
    assert not [k.line for k in decode[1] if k.bytes_written >= MATRIX]


def test_memory_grows_only_by_the_cache():
    """Four times the codes need a larger cache and a few numbers each: no logits and no activations are stored."""
    size = []
    for grid in (4, 8):
        cfg = dataclasses.replace(CFG, grid=grid, dim=256, heads=4, layers=2, attention=("full", "column"))
        cache = jax.tree.leaves(jax.eval_shape(lambda cfg=cfg: autoregressive.init_cache(cfg, 2)))
        temporary = sampler(cfg, 2).memory_analysis().temp_size_in_bytes
        size.append((temporary, sum(x.size * x.dtype.itemsize for x in cache)))
    (small, few), (large, many) = size
    assert many - few > 90_000
    assert large - small <= (many - few) + 48 * 128  # 32 numbers a code


# --- the command -----------------------------------------------------------------------------------------

CONFIG = """
from dalle_jax.config import *
config = TrainConfig(
    model=DalleConfig(text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=64, layers=2, heads=2, conv_kernel=3,
        attention=("full",), last_attention=None),
    data=DataConfig(batch_size=16), mesh=MeshConfig(data=1, fsdp=-1),
)
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def report(config_file, *flags, code=0):
    """Return the JSON report of the command, run in a process without variables of jax and XLA."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "train.py", config_file, "--compile-only", *flags, "--json"],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_training_on_several_gpus(config_file):
    """The step uses cuDNN's attention, as on a GPU."""
    found = report(config_file, "h100:4")
    assert (
        found["fits"] is True
        and found["num_devices"] == 4
        and found["device_kind"] == GPUS["h100"].device_kind
    )
    assert found["hbm_gib_per_device"] == pytest.approx(0.75 * GPUS["h100"].memory_gib)
    assert found["collectives"]["all-reduce"]["gib"] > 0 and found["estimated_mfu"] is None
    assert min(found["roofline_seconds"].values()) > 0


def test_sampling_reports_the_decode_loop(config_file):
    found = report(config_file, "l4", "--sample", "2")
    loop = found["decode_loop"]
    assert loop["kernels"]["fusions"] > 10 and loop["bytes_read"] > 0.8 * loop["minimum_bytes"]
    traffic = loop["bytes_read"] + loop["bytes_written"]
    assert loop["codes_per_second"] == pytest.approx(2 * GPUS["l4"].memory_bandwidth / traffic)


def test_a_program_that_does_not_fit_exits_3(config_file):
    """A batch of 40,000 images."""
    flags = ("l4", "--sample", "40000", "--model.dim", "1024", "--model.grid", "32")
    found = report(config_file, *flags, code=3)
    assert found["fits"] is False and found["peak_gib_per_device"] > found["hbm_gib_per_device"] == 16.5


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_accepts_every_gpu(name):
    (device,) = gpu_devices(name)
    assert device.device_kind == GPUS[name].device_kind and device.platform == "gpu"
    at = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=at)
    assert "fusion" in jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(x, x).compile().as_text()
