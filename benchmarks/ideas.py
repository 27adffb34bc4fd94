"""What each idea of the sampler gains by itself, as a ratio, and what it costs in quality.

    taskset -c 0 python -m benchmarks.ideas runs/demo/dalle --batch 1 8

Codes per second of the work of benchmarks/sample.py with and without the idea, one after another; on a trained run the
share of captions whose picture is right, the error of the scores, codes per pass of Jacobi iteration, and what showing
unfinished pictures costs. `--parts` chooses among them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np

from benchmarks.sample import SIZES, WEIGHTS, child, timed

PARTS = ("speed", "quality", "jacobi", "rows")
IDEAS = {  # what differs from full attention over caches of four growing lengths, float32
    "one-length": {"buckets": 1},
    "sparse": {"name": "sparse"},
    **{weights: {"weights": weights} for weights in WEIGHTS[1:]},
}


def speed(batch: int, repeats: int, ideas: list[str]) -> None:
    """Each idea against the same base, its process beside it."""

    def rate(change: dict[str, Any]) -> float:
        job = {
            **SIZES,
            "dtype": "float32",
            "top_k": 256,
            "repeats": repeats,
            "batch": batch,
            "name": "full",
            **change,
        }
        found = child(sys.executable, "benchmarks.sample", job)
        if isinstance(found, str):
            raise SystemExit(f"{change}: {found}")
        return batch * job["grid"] ** 2 / statistics.median(found["seconds"])

    base = rate({})
    print(f"batch {batch}, full attention, four lengths of cache: {base:.1f} codes/s", flush=True)
    for name in ideas:
        found = rate(IDEAS[name])
        print(f"batch {batch}, {name:12s} {found:8.1f} codes/s  {found / base:5.2f}", flush=True)


def quality(run: str, count: int, temperature: float, guidance: float) -> None:
    """Right pictures by the verifier, and the error of scores as a share of their deviation."""
    import jax
    import jax.numpy as jnp

    from dalle_jax.evaluate.metrics import caption_accuracy, unseen_captions
    from dalle_jax.models import autoregressive
    from dalle_jax.pipelines import SamplingConfig, load_text_to_image, sample_code_rows, tokenize_captions

    model = load_text_to_image(run)
    cfg, sampling = model.config, SamplingConfig(temperature=temperature, guidance_scale=guidance)
    captions = [caption.text for caption, _ in unseen_captions(model.run.config.data, "one_object", 64)]
    text = jnp.asarray(tokenize_captions(model, captions))
    codes = jnp.asarray(sample_code_rows(model, captions, range(64), sampling, batch=64))
    prepare_for_decode = jax.jit(autoregressive.prepare_for_decode, static_argnums=(0, 2))

    @jax.jit
    def scores(params):
        """Of every code of the drawn pictures, step by step over the cache."""
        first, cache = autoregressive.prefill(cfg, params, text)

        def step(cache, place):
            found, cache = autoregressive.decode_step(cfg, params, cache, codes[:, place], place)
            return cache, found

        return jnp.concatenate([first[None], jax.lax.scan(step, cache, jnp.arange(cfg.num_codes - 1))[1]])

    true = scores(prepare_for_decode(cfg, model.run.params, None))
    for weights in (None, *WEIGHTS[1:]):
        found = scores(prepare_for_decode(cfg, model.run.params, weights))
        error = float(jnp.sqrt(jnp.mean((found - true) ** 2)) / jnp.std(true))
        nats = jax.nn.log_softmax(true)
        apart = float(jnp.mean(jnp.sum(jnp.exp(nats) * (nats - jax.nn.log_softmax(found)), axis=-1)))
        how = SamplingConfig(temperature=temperature, guidance_scale=guidance, quantization=weights)
        right = caption_accuracy(model, count, how)
        right = "  ".join(f"{k} {v:.3f}" for k, v in right.items() if k.count("_") == 2)
        name = f"{weights} weights" if weights else "float32"
        print(f"{name:14s} error of scores {error:.4f}, divergence {apart:.5f} nats  {right}", flush=True)


def jacobi(run: str, count: int, batch: int, windows: list[int], temperature: float, guidance: float) -> None:
    """Passes, time, and pictures that are the same, against one code a pass."""
    from dalle_jax.evaluate.metrics import unseen_captions
    from dalle_jax.pipelines import SamplingConfig, load_text_to_image, sample_images

    model = load_text_to_image(run)
    captions = [caption.text for caption, _ in unseen_captions(model.run.config.data, "one_object", count)]

    def drawn(window, temperature, guidance):
        passes: list[np.ndarray] = []
        how = SamplingConfig(temperature=temperature, guidance_scale=guidance, draft_len=window)
        rest = {"batch": batch, "passed": passes.append}
        list(sample_images(model, captions[:batch], range(batch), how, batch=batch))  # compiles
        begin = time.perf_counter()
        codes = [codes for codes, _ in sample_images(model, captions, range(count), how, **rest)]
        return np.concatenate(codes), np.concatenate(passes), time.perf_counter() - begin

    for warm, guided in {(1.0, 1.0), (temperature, guidance)}:
        want, most, plain = drawn(None, warm, guided)
        for window in windows:
            codes, passes, seconds = drawn(window, warm, guided)
            print(
                f"temperature {warm:g}, guidance {guided:g}, batch {batch}, {window:2d} at once: "
                f"{most.mean() / passes.mean():.2f} codes a pass, {plain / seconds:.2f} times as fast, "
                f"{(codes == want).all(axis=1).mean():.1%} of {count} pictures the same",
                flush=True,
            )


def rows(batch: int, repeats: int) -> None:
    """The work of benchmarks/sample.py in one program, and in parts after every 4 rows of codes that the host takes."""
    import jax
    import jax.numpy as jnp

    from dalle_jax.config import DalleConfig
    from dalle_jax.models import autoregressive
    from dalle_jax.sampling.generate import generate, generate_stream, row_keys

    size = SIZES
    cfg = DalleConfig(
        text_vocab=size["text_len"], text_len=size["text_len"], image_vocab=size["codes"], grid=size["grid"],
        dim=size["dim"], layers=size["layers"], heads=size["heads"], dtype="float32", attention=("full",),
        last_attention=None,
    )  # fmt: skip
    params = jax.jit(autoregressive.init, static_argnums=0)(cfg, jax.random.key(0))
    params = jax.jit(autoregressive.prepare_for_decode, static_argnums=0)(cfg, params)
    text = jnp.zeros((batch, cfg.text_len), jnp.int32)

    def whole(seed):
        np.asarray(generate(cfg, params, text, row_keys(range(seed, seed + batch)), top_k=256))

    def parts(seed):
        for _ in generate_stream(
            cfg, params, text, row_keys(range(seed, seed + batch)), preview_rows=4, top_k=256
        ):
            pass

    one, many = min(timed(whole, repeats)), min(timed(parts, repeats))
    print(f"batch {batch}: {one:.3f} s in one program, {many:.3f} s with codes after every 4 of 16 rows: "
          f"{many / one - 1:+.1%}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", nargs="?", help="a trained Transformer on procedural scenes, for quality and jacobi"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--ideas", nargs="+", choices=IDEAS, default=list(IDEAS), help="whose speed is measured"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[4, 8, 16, 32], help="codes a pass, of jacobi"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=200, help="captions of each kind")
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--guidance", type=float, default=1.5)
    args = parser.parse_args()
    if args.run is None and {"quality", "jacobi"} & set(args.parts):
        parser.error("quality and jacobi need a run; give one, or --parts speed rows")
    for batch in args.batch if "speed" in args.parts else []:
        speed(batch, args.repeats, args.ideas)
    if "quality" in args.parts:
        quality(args.run, args.count, args.temperature, args.guidance)
    for batch in args.batch if "jacobi" in args.parts else []:
        jacobi(args.run, 64, batch, args.windows, args.temperature, args.guidance)
    for batch in args.batch if "rows" in args.parts else []:
        rows(batch, args.repeats)


if __name__ == "__main__":
    main()
