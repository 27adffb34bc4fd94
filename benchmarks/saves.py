"""What an asynchronous save costs the training that goes on: python -m benchmarks.saves [--dim 256 --layers 6]

A Transformer on random captions and codes takes steps without saves, then as many with a save after every
`--every`-th. Prints seconds per step, the pause (the copy off the device, in the way of the next step), and what the
writing behind adds to the steps that follow; all per save, and as a share of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.config import DalleConfig, DataConfig, MeshConfig, TrainConfig
from dalle_jax.models import dalle
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding
from dalle_jax.train.state import init_state, make_step, task_optimizer


class _Task:
    """The Transformer on random rows."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def init(self, key):
        return dalle.init(self.config.model, key)

    def loss(self, params, frozen, batch, key, step):
        return dalle.loss(self.config.model, params, batch["text"], batch["codes"], key)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("dim", 256), ("layers", 6), ("batch", 8), ("every", 10), ("saves", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = DalleConfig(
        text_vocab=512, text_len=32, image_vocab=512, grid=16, dim=args.dim, layers=args.layers, heads=4,
        dtype="float32",
    )  # fmt: skip
    config = TrainConfig(model=model, data=DataConfig(batch_size=args.batch), mesh=MeshConfig())
    mesh, task = make_mesh(config.mesh), _Task(config)
    rng = np.random.default_rng(0)
    batch = {
        "text": rng.integers(0, model.text_vocab, (args.batch, model.text_len), np.int32),
        "codes": rng.integers(0, model.image_vocab, (args.batch, model.num_codes), np.int32),
    }
    tx = task_optimizer(task)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as directory:
        batch = jax.device_put(batch, batch_sharding(mesh))
        state = init_state(task, tx, mesh)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step = make_step(task, tx, config, mesh)
        checkpoints = CheckpointManager(Path(directory) / "checkpoints", keep=1)

        def steps(state, count):
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                state, metrics = step(state, {}, batch)
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - begin)
            return state, times

        state, _ = steps(state, 3)
        checkpoints.save(0, state)  # the first one prepares things
        checkpoints.wait()
        state, alone = steps(state, args.every * args.saves)
        pauses, beside = [], []
        for i in range(args.saves):
            begin = time.perf_counter()
            checkpoints.save(i + 1, state)
            pauses.append(time.perf_counter() - begin)
            state, times = steps(state, args.every)
            beside += times
        checkpoints.close()
    one = statistics.median(alone)
    pause = statistics.median(pauses)
    added = (sum(beside) - sum(alone)) / args.saves
    report = {
        "state_mib": size / 2**20,
        "step_seconds": one,
        "pause_seconds": pause,
        "pause_share_of_a_step": pause / one,
        "added_seconds_per_save": added,
        "share_of_training_when_saved_every_1000": (pause + max(added, 0)) / (1000 * one),
    }
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"state {report['state_mib']:.0f} MiB, {one:.3f} s/step without saves ({jax.device_count()} devices)"
        )
        print(f"pause per save {pause:.3f} s: {pause / one:.0%} of a step (of {len(pauses)}: {min(pauses):.3f} to "
              f"{max(pauses):.3f})")  # fmt: skip
        print(f"added to the {args.every} steps after a save by the writing: {added:.3f} s")
        print(f"saving every 1000 steps: {report['share_of_training_when_saved_every_1000']:.2%} of the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
