"""`FakeTask`, a training stage small enough to test the training loop alone, and its configuration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.config import DataConfig, DVAEConfig, MeshConfig, OptimConfig, ProfileConfig, TrainConfig
from dalle_jax.parallel.global_arrays import gather_to_host
from dalle_jax.train.task import Task


class FakeTask(Task):
    """A linear model on batches generated from the step number, for fast tests of the training loop.

    Args:
      config: of the training.
      noise: scale of a random term of the loss that depends on the step's key.
      nan_at: the step whose batch has a NaN.
      at: functions to call when the batch of a step is read.
    """

    best = ("eval_loss", "min")
    tokens_per_row = 4

    def __init__(self, config, noise=0.1, nan_at=None, at=None):
        self.config, self.noise, self.nan_at, self.at = config, noise, nan_at, at or {}
        self.batch_spec = {"x": ((4,), np.float32), "y": ((8,), np.float32)}
        self.frozen = {"norm_out": {"scale": np.full((8,), 2.0, np.float32)}}
        self.traces = 0

    def prepare(self, run_dir):
        (run_dir / "text_tokenizer.model").write_text("prepared")

    def init(self, key):
        kernel = jax.random.normal(key, (4, 8)) * 0.1
        return {"text_head": {"kernel": kernel, "bias": jnp.zeros((8,))}}

    def _error(self, params, frozen, batch):
        head = params["text_head"]
        out_BV = batch["x"] @ head["kernel"] + head["bias"][None]
        return ((out_BV * frozen["norm_out"]["scale"][None] - batch["y"]) ** 2).mean()

    def loss(self, params, frozen, batch, key, step):
        self.traces += 1
        error = self._error(params, frozen, batch)
        kernel = params["text_head"]["kernel"]
        jitter = self.noise * (kernel * jax.random.normal(key, kernel.shape)).sum()
        return error + jitter, {"error": error, "jitter": jitter}

    def _rows(self, *seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(self.config.data.batch_size, 4)).astype(np.float32)
        return {"x": x, "y": np.concatenate([x, x**2], axis=1)}

    def batches(self, start, rows=None):
        for step in itertools.count(start):
            if step in self.at:
                self.at[step]()
            batch = self._rows(0, self.config.data.seed, step)
            if step == self.nan_at:
                batch["x"][0, 0] = np.nan
            yield batch if rows is None else {name: x[rows] for name, x in batch.items()}

    def eval_batches(self):
        return [self._rows(1, i) for i in range(2)]

    def evaluate(self, params, frozen, batch, key):
        return {"eval_loss": self._error(params, frozen, batch)}

    def sample_grid(self, params, frozen, key):
        gray = (gather_to_host(jax.nn.sigmoid(params["text_head"]["kernel"])) * 255).astype(np.uint8)
        return Image.fromarray(gray)


def tiny_config(run="", **changes) -> TrainConfig:
    """Return a configuration of ten steps of FakeTask; a dict in `changes` changes fields of `optim`, `data` or
    `mesh`."""
    values = {
        "model": DVAEConfig(image_size=8, groups=1, width=4, decoder_width=4, vocab=8),
        "run": str(run),
        "data": {"batch_size": 16},
        "optim": {"learning_rate": 0.02, "warmup_steps": 2, "ema_every": 2, "clip_norm": 1.0},
        "mesh": {"data": 2, "fsdp": 2, "model": 2},
        "profile": {},
        "steps": 10,
        "log_every": 1,
        "eval_every": 4,
        "sample_every": 5,
        "save_every": 4,
        "max_checkpoints": 2,
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    kinds = {"data": DataConfig, "optim": OptimConfig, "mesh": MeshConfig, "profile": ProfileConfig}
    return TrainConfig(**{n: kinds[n](**v) if n in kinds else v for n, v in values.items()})
