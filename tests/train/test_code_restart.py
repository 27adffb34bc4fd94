"""Restart of unused codes: by hand, and in training, where it depends on state and batch alone."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_task import tiny_config
from PIL import Image

from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.config import VectorQuantizer, VQGANConfig
from dalle_jax.models.vqgan import quantizers
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train import loop
from dalle_jax.train.state import abstract_state, init_state, make_step, task_optimizer
from dalle_jax.train.tasks.vqgan import VQGANTask

ONE = {"data": 1, "fsdp": 1, "model": 1}


def restart(idle, table, z, codes, seed=0, **fields):
    cfg = VectorQuantizer(
        **{"vocab": len(table), "dim": len(table[0]), "dead_code_restart_steps": 3, **fields}
    )
    z, codes = jnp.asarray(z, jnp.float32)[None, None], jnp.asarray(codes)[None, None]
    params = {"embedding": jnp.asarray(table, jnp.float32)}
    return quantizers.restart_dead_codes(cfg, params, jnp.asarray(idle), z, codes, jax.random.key(seed))


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_dead_code_moves_to_the_worst_represented_vector():
    """Only the vector 12 differs from its code, and only the last code was idle for three updates."""
    result = restart([5, 0, 1, 2], [[0], [10], [20], [30]], [[0], [0], [10], [12]], [0, 0, 1, 1])
    np.testing.assert_array_equal(result.restart, [False, False, False, True])
    np.testing.assert_array_equal(result.vectors[3], [12])
    np.testing.assert_array_equal(result.idle, [0, 0, 2, 0])


def test_dead_codes_get_different_vectors_while_there_are_any():
    result = restart([9, 9, 9, 9], [[0], [70], [80], [90]], [[1], [2]], [0, 0])
    np.testing.assert_array_equal(result.restart, [False, True, True, False])
    assert set(np.asarray(result.vectors[1:3, 0])) == {1, 2}
    np.testing.assert_array_equal(result.idle, [0, 0, 0, 10])


def test_normalized_codes_restart_on_the_sphere():
    result = restart([0, 9], [[1, 0], [-1, 0]], [[0, 5]], [0], normalize=True)
    np.testing.assert_allclose(result.vectors[1], [0, 1], atol=1e-6)


def test_vectors_are_sampled_by_squared_distance():
    """Distances 1 and 2 give odds of 1 to 4; the standard deviation of 4,000 samples is 0.0063."""
    sample = jax.vmap(lambda seed: restart([0, 9], [[0], [90]], [[1], [2]], [0, 0], seed).vectors[1, 0])
    assert abs(float((sample(jnp.arange(4000)) == 2).mean()) - 0.8) < 0.025


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(
        ValueError, match=r"dead_code_restart_steps of at least 0, got -1\. Use 0 to turn restarts off"
    ):
        VectorQuantizer(dead_code_restart_steps=-1)


# --- in training ----------------------------------------------------------------------------------------------


class LinearTask(VQGANTask):
    """The stage with one matrix as its network, which compiles in a second."""

    def prepare(self, run_dir):
        pass

    def init(self, key):
        kernel = jax.random.normal(key, (1, 1, 4, 4))
        table = quantizers.init(self.model.quantizer, key)
        return {"tokenizer": {"quant_conv": {"kernel": kernel}, "quantize": table}}

    def gradients(self, params, frozen, batch, key, step):
        def loss(params):
            z = jnp.einsum("bhwc,cd->bhwd", batch["x"], params["tokenizer"]["quant_conv"]["kernel"][0, 0])
            found = quantizers.quantize(self.model.quantizer, params["tokenizer"]["quantize"], z, key)
            return found.loss, (z, found.codes)

        (value, (z, codes)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (
            grads,
            {"loss": value},
            {"latents": z, "codes": codes} if self.model.restarts_dead_codes else {},
        )

    def batches(self, start, rows=None):
        for step in itertools.count(start):
            x = np.random.default_rng(step).normal(size=(8, 2, 2, 4)).astype(np.float32)
            yield {"x": x if rows is None else x[rows]}

    def eval_batches(self):
        return []

    def sample_grid(self, params, frozen, key):
        return Image.new("L", (1, 1))


def vq_config(after, run="", **changes):
    quantizer = VectorQuantizer(vocab=32, dim=4, normalize=True, dead_code_restart_steps=after)
    model = VQGANConfig(quantizer=quantizer, adversarial=None)
    return tiny_config(run, model=model, **{"data": {"batch_size": 8}, "mesh": ONE, **changes})


def train_steps(config, steps=3):
    """Return the state after some updates, on the host, and the number of restarted codes of each update."""
    task = LinearTask(config)
    num_devices = config.mesh.data * config.mesh.fsdp * config.mesh.model
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    tx = task_optimizer(task)
    state, counts = init_state(task, tx, mesh), []
    with jax.set_mesh(mesh):
        step = make_step(task, tx, config, mesh)
        for batch in itertools.islice(task.batches(0), steps):
            state, metrics = step(state, {}, batch)
            counts.append(int(metrics.get("codes_restarted", 0)))
    return jax.device_get(state), counts


@pytest.fixture(scope="module")
def single_device():
    return train_steps(vq_config(1))


def codebook(params):
    return params["tokenizer"]["quantize"]["embedding"]


def test_a_restarted_code_has_the_same_vector_in_the_average(single_device):
    """A code restarted after the last update has not moved since, so parameters and average are equal."""
    state, counts = single_device
    assert all(counts) and (state.opt_state.idle == 0).all()  # used or restarted
    same = (codebook(state.params) == codebook(state.ema)).all(axis=1)
    assert same.sum() == counts[-1]
    np.testing.assert_allclose(np.linalg.norm(codebook(state.params)[same], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": {"data": 2, "fsdp": 2, "model": 2}},
        {"mesh": {"data": 2, "fsdp": 2, "model": 1}, "optim": {"grad_accum_steps": 2}},
    ],
    ids=["eight devices", "four, two microbatches"],
)
def test_restarts_do_not_depend_on_mesh_and_accumulation(single_device, changes):
    (want, counts), (got, got_counts) = single_device, train_steps(vq_config(1, **changes))
    assert got_counts == counts
    np.testing.assert_array_equal(got.opt_state.idle, want.opt_state.idle)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_without_restarts_training_equals_one_where_none_is_due():
    (off, _), (waiting, counts) = train_steps(vq_config(0)), train_steps(vq_config(100))
    assert counts == [0, 0, 0] and waiting.opt_state.idle.max() == 3
    waiting = waiting._replace(opt_state=waiting.opt_state.networks)
    for x, y in zip(jax.tree.leaves(off), jax.tree.leaves(waiting), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)  # two programs


def train(config):
    return loop.train(config, LinearTask(config))


def test_stop_and_resume_equals_a_straight_run(tmp_path):
    optim, mesh = {"decay_steps": 6}, {"data": 2, "fsdp": 2, "model": 2}
    changes = {"optim": optim, "mesh": mesh}
    whole = train(vq_config(2, tmp_path / "whole", steps=6, **changes))
    train(vq_config(2, tmp_path / "parts", steps=3, **changes))
    parts = train(vq_config(2, tmp_path / "parts", steps=6, **changes))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    restarted = [row["codes_restarted"] for row in rows if "codes_restarted" in row]
    assert restarted[0] == 0 and sum(restarted[1:3]) and sum(restarted[3:])
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((whole.state, parts.state)))


def test_restarts_cannot_be_turned_on_in_a_run_without(tmp_path):
    mesh = {"data": 8, "fsdp": 1, "model": 1}
    config = vq_config(0, tmp_path / "run", mesh=mesh, steps=2)
    train(config)
    more = dataclasses.replace(vq_config(2, tmp_path / "run", mesh=mesh), steps=4)
    with pytest.raises(
        ValueError, match=r"model\.quantizer\.dead_code_restart_steps: run has 0, command gives 2"
    ):
        train(more)
    checkpoints, task = CheckpointManager(tmp_path / "run" / "checkpoints"), LinearTask(more)
    with pytest.raises(ValueError, match="opt_state/idle: not in the checkpoint"):
        checkpoints.load(2, abstract_state(task, task_optimizer(task), make_mesh(more.mesh)))
    checkpoints.close()
