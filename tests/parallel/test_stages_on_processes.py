"""Each stage trains on two processes as on one: losses, metrics, parameters and images; process 0 writes and logs."""

import os
import sys

import jax
import numpy as np
import pytest
from jobs import CONTEXT, Job, assert_close, assert_same_params, only_process_0_logs, series, starved
from PIL import Image

from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.config import (
    AdversarialConfig,
    ClipConfig,
    CodesConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    DVAEConfig,
    MeshConfig,
    OptimConfig,
    ScenesSource,
    TextConfig,
    TextEncoderConfig,
    TowerConfig,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
    to_json,
)
from dalle_jax.models import tokenizer

pytestmark = pytest.mark.slow

DVAE = DVAEConfig(image_size=32, groups=3, blocks=1, width=8, decoder_width=4, vocab=16)
TOWER = {"layers": 2, "heads": 2, "mlp_ratio": 2}
STAGES = {
    "dvae": DVAE,
    "vqgan": VQGANConfig(
        image_size=32, width=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), latent_width=8,
        quantizer=VectorQuantizer(vocab=16, dim=4),
        adversarial=AdversarialConfig(disc_start_step=2, disc_warmup_steps=2, width=4, layers=2, r1_every=2),
    ),
    "dalle": DalleConfig(
        text_vocab=400, text_len=6, image_vocab=16, grid=8, dim=16, **TOWER, conv_kernel=3, dtype="float32",
        cond_drop_prob=0.2,
    ),
    "clip": ClipConfig(
        image_size=32, patch_size=16, vision=TowerConfig(dim=16, **TOWER), text=TowerConfig(dim=16, **TOWER),
        text_vocab=400, text_len=8, embed_dim=8, dtype="float32",
    ),
    "diffusion": DiffusionConfig(
        image_size=32, patch_size=4, width=8, channel_multipliers=(1,), blocks=1, attention_sizes=(), dropout=0.1,
        text=TextEncoderConfig(text_vocab=400, text_len=6, dim=8, layers=1, heads=2), prediction="x0",
        codes=CodesConfig(vocab=16, grid=8, width=4),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def dvae_run(tmp_path_factory):
    """The run directory of a tokenizer with random parameters and a checkpoint."""
    run = tmp_path_factory.mktemp("tokenizer")
    (run / "config.json").write_text(to_json(TrainConfig(model=DVAE)))
    checkpoints = CheckpointManager(run / "checkpoints", keep=1)
    checkpoints.save(1, {"params": tokenizer.init(DVAE, jax.random.key(0))})
    checkpoints.close()
    return run


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_of_two_devices_equal_one_of_four(tmp_path, dvae_run, name):
    """The mesh and the program are the same; only the devices of each process differ."""
    config = TrainConfig(
        model=STAGES[name],
        data=DataConfig(
            batch_size=8, source=ScenesSource(count=40, max_objects=1), num_threads=1, prefetch=1
        ),
        text=TextConfig(bpe_dropout=0.1),
        image_tokenizer=str(dvae_run) if name in ("dalle", "diffusion") else None,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1, ema_every=1),
        mesh=MeshConfig(data=2, fsdp=2),
        **{"steps": 4, "log_every": 1, "eval_every": 2, "sample_every": 4, "save_every": 2, "eval_rows": 6},
    )  # six rows do not divide over four devices
    one, two = tmp_path / "one", tmp_path / "two"
    for run, count in ((one, 1), (two, 2)):
        for _ in range(4):
            job = Job(run, count, 4 // count, config=config)
            codes = job.codes()
            if not starved(job):
                break
        assert codes == [0] * count, job.logs_text()
    only_process_0_logs(job)
    assert f"4 x cpu of {count} processes" in job.log(0)
    assert_close(series(two), series(one), rtol=1e-5, atol=1e-5)
    if name != "vqgan":
        # Biases of keys and before group norms have no gradient but rounding, from which Adam makes steps of full size
        # (differences of 8e-4 occurred, at 1e-3 a step). The series above has the gradient norm and the metrics of both
        # networks.
        assert_same_params(two, one, rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    got, want = (np.asarray(Image.open(run / "samples" / "step_00000004.png"), int) for run in (two, one))
    assert got.shape == want.shape and np.abs(got - want).max() <= 1


def encode(log, env, argv):
    """One process of a cluster."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    from dalle_jax.cli import main

    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def test_processes_of_a_cluster_divide_the_shards(tmp_path, dvae_run):
    """`dalle-jax encode RUN --data` in a Slurm step: the shards of three processes equal those of one."""
    data = tmp_path / "data.py"
    data.write_text(
        "from dalle_jax.config import *\n"
        "config = TrainConfig(model=DVAEConfig(), data=DataConfig(source=ScenesSource(count=40, max_objects=1)))\n"
    )
    for out, count in (("one", 1), ("three", 3)):
        argv = [
            "encode",
            str(dvae_run),
            "--data",
            str(data),
            "--shard-rows",
            "8",
            "--out",
            str(tmp_path / out),
        ]
        started = []
        for p in range(count):
            env = {
                "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n", "SLURM_NTASKS": str(count), "SLURM_PROCID": str(p),
                "SLURM_LOCALID": str(p),
            }  # fmt: skip
            started.append(CONTEXT.Process(target=encode, args=(tmp_path / f"{out}.{p}.log", env, argv)))
            started[-1].start()
        for process in started:
            process.join()
        logs = [(tmp_path / f"{out}.{p}.log").read_text() for p in range(count)]
        assert [process.exitcode for process in started] == [0] * count, logs
    for log, made in zip(logs, (2, 2, 1), strict=True):  # shards 0 and 3, 1 and 4, 2
        assert f"{made} of 5 shards made now" in log
    made = [
        {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file()}
        for out in ("one", "three")
    ]
    assert made[0] == made[1]
