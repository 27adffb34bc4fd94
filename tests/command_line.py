"""Calls of the command line in a test, and the tiny configurations of its runs."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from dalle_jax.cli import main
from dalle_jax.config import (
    DalleConfig,
    DataConfig,
    DVAEConfig,
    OptimConfig,
    ScenesSource,
    Schedule,
    TextConfig,
    TrainConfig,
)

GRID, VOCAB, TEXT_LEN, SIZE = 8, 32, 24, 32
GUIDED = ("--guidance-scale", 100)  # so that a model of two steps depends on the caption


def run(*argv) -> SimpleNamespace:
    """Run the command and return its `code`, `out` and `err`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def json_of(*argv) -> dict:
    """Return the object that `--json` prints; standard output holds nothing else."""
    done = run(*argv, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def refused(*argv, code=1) -> str:
    """Return the message of a call that must fail with nothing on standard output."""
    done = run(*argv)
    assert done.code == code and done.out == "" and "Traceback" not in done.err, (done.code, done.err)
    return done.err


def tiny_dvae(out="runs/demo") -> TrainConfig:
    return TrainConfig(
        run=f"{out}/dvae",
        model=DVAEConfig(
            image_size=SIZE, groups=3, blocks=1, width=8, decoder_width=8, vocab=VOCAB,
            tau=Schedule(start=1.0, end=0.5, steps=2), kl_weight=Schedule(start=0.0, end=0.0, steps=0),
        ),
        data=DataConfig(batch_size=8, source=ScenesSource(count=40, max_objects=2)),
        optim=OptimConfig(warmup_steps=1, ema_every=1),
        steps=2, eval_every=2, save_every=2, sample_every=100, eval_rows=8,
    )  # fmt: skip


def tiny_dalle(out="runs/demo") -> TrainConfig:
    return TrainConfig(
        run=f"{out}/dalle",
        image_tokenizer=f"{out}/dvae",
        model=DalleConfig(
            text_vocab=512, text_len=TEXT_LEN, image_vocab=VOCAB, grid=GRID, dim=16, layers=1, heads=2,
            dtype="float32", remat="none",
        ),
        data=DataConfig(batch_size=8, source=ScenesSource(count=40, max_objects=2)),
        text=TextConfig(num_train_captions=40),
        optim=OptimConfig(learning_rate=0.05, warmup_steps=0, ema_every=1),
        steps=2, eval_every=2, save_every=2, sample_every=100, eval_rows=8,
    )  # fmt: skip


def tiny_demo_config(name: str) -> TrainConfig:
    """Return a tiny configuration; replaces `load_shipped_config` in `dalle-jax demo`."""
    return {"demo_dvae": tiny_dvae, "demo_dalle": tiny_dalle}[name]()


def write_config(path: Path, model: str) -> str:
    """Write a configuration file of `model`, an expression; return its path."""
    path.write_text(f"from dalle_jax.config import *\nconfig = TrainConfig(model={model})\n")
    return str(path)
