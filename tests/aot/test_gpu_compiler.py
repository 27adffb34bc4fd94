"""Laws of the programs that XLA's GPU compiler makes of the sampler, and compile-only for GPUs: `pytest -m cuda`.

Needs the CUDA plugin of jax and no GPU. The decode loops have every kind of attention in one model, so that a program
is compiled once for all of them.
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
from dalle_jax.parallel.sharding import make_mesh, replicated
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
# Matrices of 2 MiB, which nothing else of a step comes near; caches of 18 KiB a row and more.
CFG = DalleConfig(
    text_vocab=100, text_len=16, image_vocab=1024, grid=8, dim=1024, layers=len(KINDS), heads=8, attention=KINDS,
    conv_kernel=3, dtype="bfloat16",
)  # fmt: skip
MATRIX = CFG.dim**2 * 2


def on_gpu(program, tree, *static, gpu="h200", **options):
    """`program` compiled for a GPU, with the shapes of `tree`: positional arguments after the static ones."""
    mesh = make_mesh(MeshConfig(data=1), gpu_devices(gpu))
    whole = replicated(mesh)

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    with jax.set_mesh(mesh):
        lowered = program.lower(*static, *jax.tree.map(placed, tree), **options)
        return lowered.compile()


def prepared(cfg):
    return jax.eval_shape(
        lambda key: autoregressive.prepare_for_decode(cfg, dalle.init(cfg, key), platform="gpu"),
        jax.random.key(0),
    )


def sampler(cfg, rows, **options):
    params = prepared(cfg)
    text = jnp.zeros((rows, cfg.text_len), jnp.int32)
    return on_gpu(generate, (params, text, row_keys(range(rows))), cfg, top_k=8, **options)


def queue(program, *counts, **options):
    held = jax.eval_shape(lambda: decode_state.init_decode_state(CFG, 4))
    return on_gpu(
        program, (prepared(CFG), held, *map(jnp.int32, counts)), CFG, top_k=8, use_top_p=False, **options
    )


PROGRAMS = {
    "one row": lambda: sampler(CFG, 1),
    "eight rows": lambda: sampler(CFG, 8),
    "guided": lambda: sampler(CFG, 1, guidance_scale=1.5),
    "jacobi": lambda: sampler(CFG, 2, draft_len=4),
    "queue": lambda: queue(decode_state.decode_steps, 1),
    "queue, jacobi": lambda: queue(decode_state.speculative_passes, 1, 1, draft_len=4),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def decode(request):
    """Name of a program and kernels of its decode loops."""
    text = PROGRAMS[request.param]().as_text()
    held = [loop for loop in find_loops(text) if "/decode/" in loop.scope]
    assert held and all(len(loop.kernels) > 4 * CFG.layers for loop in held)
    return request.param, [kernel for loop in held for kernel in loop.kernels]


def test_the_loop_copies_no_cache(decode):
    """Not the smallest. With jacobi, which puts several tokens into a cache at once, none of a whole picture: jax
    0.12 turns a ring round for that, and back."""
    name, kernels = decode
    kept = CFG.num_codes if name == "jacobi" else CFG.grid + 1
    copies = [k for k in kernels if k.sort == "copy"]
    assert not [k for k in copies if k.written >= kept * CFG.dim * 2]  # keys of one row


def test_no_kernel_writes_a_matrix(decode):
    """A step reads weights; what it writes is vectors."""
    assert not [k.line for k in decode[1] if k.written >= MATRIX]


def test_memory_grows_by_the_cache_alone():
    """Four times the codes take the larger cache and a few numbers each: no scores and no streams are kept."""
    size = []
    for grid in (4, 8):
        cfg = dataclasses.replace(CFG, grid=grid, dim=256, heads=4, layers=2, attention=("full", "column"))
        held = jax.tree.leaves(jax.eval_shape(lambda cfg=cfg: autoregressive.init_cache(cfg, 2)))
        temporary = sampler(cfg, 2).memory_analysis().temp_size_in_bytes
        size.append((temporary, sum(x.size * x.dtype.itemsize for x in held)))
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
    """What the command prints in a process of its own, with nothing set for the compiler."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "train.py", config_file, "--compile-only", *flags, "--json"],
        capture_output=True, text=True, cwd=ROOT, env=bare, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_training_on_several_gpus(config_file):
    """Products of cuDNN's attention among them, as the step that trains has them."""
    found = report(config_file, "h100:4")
    assert found["fits"] is True and found["devices"] == 4 and found["device_kind"] == GPUS["h100"].kind
    assert found["hbm_gib_per_device"] == pytest.approx(0.75 * GPUS["h100"].memory)
    assert found["collectives"]["all-reduce"]["gib"] > 0 and found["estimated_mfu"] is None
    assert min(found["roofline_seconds"].values()) > 0


def test_sampling_tells_kernels_and_bytes(config_file):
    found = report(config_file, "l4", "--sample", "2")
    loop = found["decoding"]
    assert loop["kernels"]["fusions"] > 10 and loop["read_bytes"] > 0.8 * loop["minimum_bytes"]
    moves = loop["read_bytes"] + loop["written_bytes"]
    assert loop["codes_per_second"] == pytest.approx(2 * GPUS["l4"].bandwidth / moves)


def test_what_does_not_fit_exits_3(config_file):
    """40 thousand pictures at once."""
    flags = ("l4", "--sample", "40000", "--model.dim", "1024", "--model.grid", "32")
    found = report(config_file, *flags, code=3)
    assert found["fits"] is False and found["peak_gib_per_device"] > found["hbm_gib_per_device"] == 16.5


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_one_that_the_compiler_knows(name):
    (device,) = gpu_devices(name)
    assert device.device_kind == GPUS[name].kind and device.platform == "gpu"
    at = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=at)
    assert "fusion" in jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(x, x).compile().as_text()
