"""A training loop of your own: the functions of the DALL-E Transformer under a device mesh, with Optax.

The trainer of the library is not used. Parameters are initialized in their shards, each step is one jitted and donated
program, and codes are sampled at the end. The data are random; put your own token ids in their place.

    python examples/custom_training.py --steps 100 --fsdp 2 --cpu-devices 2
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle_jax import dalle
from dalle_jax.config import DalleConfig, MeshConfig
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, param_shardings
from dalle_jax.sampling.generate import generate, row_keys


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters")
    parser.add_argument("--cpu-devices", type=int, default=0, help="split the CPU into this many devices")
    args = parser.parse_args(argv)

    cfg = DalleConfig(
        text_vocab=256, text_len=8, image_vocab=64, grid=4, dim=64, layers=2, heads=4, dtype="float32"
    )
    mesh = make_mesh(MeshConfig(data=-1, fsdp=args.fsdp, cpu_devices=args.cpu_devices))
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, max(args.steps, 11)))

    def init(key):
        params = dalle.init(cfg, key)
        return params, tx.init(params)

    key = jax.random.key(0)
    params_shape, opt_shape = jax.eval_shape(init, key)
    params_sharding = param_shardings(mesh, params_shape)  # from the names of the parameters
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opt_sharding = optax.tree.map_params(  # moments like their parameters, all else on every device
        tx,
        lambda _, sharding: sharding,
        opt_shape,
        params_sharding,
        transform_non_params=lambda _: replicated,
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, text, codes, key):
        loss_fn = partial(dalle.loss, cfg)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, text, codes, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    text = jax.device_put(rng.integers(0, 256, (args.batch_size, 8), np.int32), batch_sharding(mesh))
    codes = jax.device_put(rng.integers(0, 64, (args.batch_size, 16), np.int32), batch_sharding(mesh))
    with jax.set_mesh(mesh):  # the model's sharding constraints apply to this mesh
        params, opt_state = jax.jit(init, out_shardings=(params_sharding, opt_sharding))(key)
        for step in range(args.steps):
            step_key = jax.random.fold_in(key, step)
            params, opt_state, loss = train_step(params, opt_state, text, codes, step_key)
            if step % 10 == 0 or step == args.steps - 1:
                print(f"step {step} loss {loss:.3f}")
    params = jax.device_get(params)
    sampled = generate(cfg, params, jnp.asarray(jax.device_get(text)[:2]), row_keys([0, 1]))  # int32 (2, 16)
    print("codes of the first two captions:", *np.asarray(sampled), sep="\n")
    return float(loss)


if __name__ == "__main__":
    main()
