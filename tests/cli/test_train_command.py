"""`dalle-jax train`: fine-tuning, flags that change the defaults, errors."""

import json
import re

import jax
import numpy as np
import pytest
from command_line import refused, run, write_config

from dalle_jax.checkpoint.load import load_run
from dalle_jax.pipelines import TokenizerPipeline, load


def finetune(made, folder, *more):
    return run(
        "train", "finetune", "--init-from", made.dalle, "--data.path", folder, "--run", folder.parent / "run",
        "--data.batch-size", 8, "--data.source.eval-fraction", 0.2, "--steps", 1, "--eval-rows", 8,
        "--optim.learning-rate", 1e-9, *more,
    )  # fmt: skip


def test_finetuning_starts_with_the_parameters_of_the_other_run(made, folder):
    done = finetune(made, folder)
    assert done.code == 0, done.err
    old, new = load_run(made.dalle), load_run(folder.parent / "run", ema=False)
    assert new.config.model == old.config.model and new.config.data.source.kind == "folder"
    for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("text_tokenizer.model", "image_tokenizer/config.json"):
        assert (new.path / name).read_bytes() == (made.dalle / name).read_bytes()
    assert load(new.path, TokenizerPipeline).fingerprint == load(made.dalle, TokenizerPipeline).fingerprint
    done = finetune(made, folder, "--json")  # the run has all its steps
    assert done.code == 0 and json.loads(done.out).items() >= {"step": 1, "finished": True}.items()


def test_finetuning_rejects_a_run_that_does_not_match(made, folder):
    for more, message in (
        (("--init-from", made.dvae), "Expected a run of stage dalle in --init-from, got .* of stage dvae"),
        (("--init-from", "nowhere"), "Expected a run directory, got nowhere"),
        (("--model.dim", "32"), "Expected parameter .* of shape .*, got .*Keep the fields of `model`"),
        (("--data.path", "no where"), "got nothing at 'no where'"),
    ):
        done = finetune(made, folder, *more)
        assert done.code == 1 and re.search(message, done.err), done.err


def test_invalid_input_is_rejected(made, tmp_path):
    config = write_config(tmp_path / "c.py", "DVAEConfig(image_size=8, groups=1)")
    assert "got none. Use --run DIR" in refused("train", config)
    assert "Perhaps you meant" in refused("train", config, "--stepz", 3, code=2)


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--optim.lr", "--optim.learning-rate"), ("--lr=1", "--optim.learning-rate"),
        ("--optim.wd", "--optim.weight-decay"), ("--bs", "--data.batch-size"), ("--data.bs", "--data.batch-size"),
    ],
)  # fmt: skip
def test_the_initials_of_a_field_are_answered_with_its_flag(flag, field):
    message = refused("train", "demo_dalle", flag, 1, code=2)
    assert f"got {flag.partition('=')[0]}. Use {field}.\n" in message
