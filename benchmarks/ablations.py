"""Effect of each optimization of the sampler on speed and quality.

    taskset -c 0 python -m benchmarks.ablations runs/demo/dalle --batch 1 8

Prints codes per second on the workload of benchmarks/sample.py with and without each optimization, one after another.
On a trained run it prints the fraction of images that match their caption, the error of the logits, codes per pass of
speculative decoding, and the cost of previews. `--parts` selects among these.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import numpy as np

from benchmarks.report import run_job
from benchmarks.sample import QUANTIZATIONS, SIZES, time_calls

PARTS = ("speed", "quality", "speculative", "previews")
CHANGES = {  # of the base: full attention, caches of four growing sizes, float32
    "one-cache-size": {"buckets": 1},
    "sparse": {"name": "sparse"},
    **{name: {"quantization": name} for name in QUANTIZATIONS[1:]},
}


def measure_speed(batch: int, repeats: int, changes: list[str]) -> None:
    """Compare each change with the same base; every sampler runs in a process of its own."""

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
        result = run_job(sys.executable, "benchmarks.sample", job)
        if isinstance(result, str):
            raise SystemExit(f"{change}: {result}")
        return batch * job["grid"] ** 2 / statistics.median(result["seconds"])

    base = rate({})
    print(f"batch {batch}, full attention, four cache sizes: {base:.1f} codes/s", flush=True)
    for name in changes:
        changed = rate(CHANGES[name])
        print(f"batch {batch}, {name:14s} {changed:8.1f} codes/s  {changed / base:5.2f}", flush=True)


def measure_quality(run: str, count: int, temperature: float, guidance_scale: float) -> None:
    """Print caption accuracy by the verifier, and the error of the logits relative to their standard deviation."""
    import jax
    import jax.numpy as jnp

    from dalle_jax.evaluate.metrics import caption_accuracy, unseen_captions
    from dalle_jax.models import autoregressive
    from dalle_jax.pipelines import ImageRequest, SamplingConfig, TextToImagePipeline, load

    model = load(run, TextToImagePipeline)
    cfg = model.config
    sampling = SamplingConfig(temperature=temperature, guidance_scale=guidance_scale)
    captions = [caption.text for caption, _ in unseen_captions(model.run.config.data, "one_object", 64)]
    text_BT = jnp.asarray(model.tokenize(captions))
    requests = [ImageRequest(caption, seed) for seed, caption in enumerate(captions)]
    images = model.sample(requests, sampling, batch_size=64)
    codes_BN = jnp.asarray(np.stack([image.codes for image in images]))
    prepare_for_decode = jax.jit(autoregressive.prepare_for_decode, static_argnums=(0, 2))

    @jax.jit
    def logits_NBV(params):
        """Logits of every code of the sampled images, step by step with the cache."""
        first, cache = autoregressive.prefill(cfg, params, text_BT)

        def step(cache, i):
            logits, cache = autoregressive.decode_step(cfg, params, cache, codes_BN[:, i], i)
            return cache, logits

        return jnp.concatenate([first[None], jax.lax.scan(step, cache, jnp.arange(cfg.num_codes - 1))[1]])

    exact = logits_NBV(prepare_for_decode(cfg, model.run.params, None))
    log_probs = jax.nn.log_softmax(exact)
    for quantization in (None, *QUANTIZATIONS[1:]):
        logits = logits_NBV(prepare_for_decode(cfg, model.run.params, quantization))
        error = float(jnp.sqrt(jnp.mean((logits - exact) ** 2)) / jnp.std(exact))
        divergence = jnp.sum(jnp.exp(log_probs) * (log_probs - jax.nn.log_softmax(logits)), axis=-1)
        accuracy = caption_accuracy(model, count, dataclasses.replace(sampling, quantization=quantization))
        accuracy = "  ".join(f"{k} {v:.3f}" for k, v in accuracy.items() if k.count("_") == 2)
        print(
            f"{quantization or 'float32':14s} error of logits {error:.4f}, divergence "
            f"{float(divergence.mean()):.5f} nats  "
            f"{accuracy}",
            flush=True,
        )


def measure_speculative(
    run: str, count: int, batch: int, draft_lens: list[int], temperature: float, guidance_scale: float
) -> None:
    """Compare speculative decoding with one code per pass: passes, time, and equal images."""
    from dalle_jax.evaluate.metrics import unseen_captions
    from dalle_jax.pipelines import ImageRequest, SamplingConfig, TextToImagePipeline, load

    model = load(run, TextToImagePipeline)
    captions = [caption.text for caption, _ in unseen_captions(model.run.config.data, "one_object", count)]

    def sample(draft_len, temperature, guidance_scale):
        sampling = SamplingConfig(temperature=temperature, guidance_scale=guidance_scale, draft_len=draft_len)
        requests = [ImageRequest(caption, seed) for seed, caption in enumerate(captions)]
        list(model.sample(requests, sampling, batch_size=batch))  # compiles
        begin = time.perf_counter()
        images = list(model.sample(requests, sampling, batch_size=batch))
        seconds = time.perf_counter() - begin
        return np.stack([image.codes for image in images]), images[-1].codes_per_pass, seconds

    for temp, scale in {(1.0, 1.0), (temperature, guidance_scale)}:
        exact_codes, _, all_seconds = sample(None, temp, scale)
        for draft_len in draft_lens:
            codes, codes_per_pass, seconds = sample(draft_len, temp, scale)
            print(
                f"temperature {temp:g}, guidance {scale:g}, batch {batch}, draft length {draft_len:2d}: "
                f"{codes_per_pass:.2f} codes per pass, {all_seconds / seconds:.2f} times as fast, "
                f"{(codes == exact_codes).all(axis=1).mean():.1%} of {count} images equal",
                flush=True,
            )


def measure_previews(batch: int, repeats: int) -> None:
    """Compare one program with parts that return the codes to the host after every 4 rows of tokens."""
    import jax
    import jax.numpy as jnp

    from dalle_jax.config import DalleConfig
    from dalle_jax.models import autoregressive
    from dalle_jax.sampling.generate import generate, generate_stream, row_keys

    cfg = DalleConfig(
        text_vocab=SIZES["text_len"], text_len=SIZES["text_len"], image_vocab=SIZES["codes"], grid=SIZES["grid"],
        dim=SIZES["dim"], layers=SIZES["layers"], heads=SIZES["heads"], dtype="float32", attention=("full",),
        last_attention=None,
    )  # fmt: skip
    params = jax.jit(autoregressive.init, static_argnums=0)(cfg, jax.random.key(0))
    params = jax.jit(autoregressive.prepare_for_decode, static_argnums=0)(cfg, params)
    text_BT = jnp.zeros((batch, cfg.text_len), jnp.int32)

    def whole(seed):
        np.asarray(generate(cfg, params, text_BT, row_keys(range(seed, seed + batch)), top_k=256))

    def parts(seed):
        keys_B = row_keys(range(seed, seed + batch))
        for _ in generate_stream(cfg, params, text_BT, keys_B, preview_rows=4, top_k=256):
            pass

    one, many = min(time_calls(whole, repeats)), min(time_calls(parts, repeats))
    print(
        f"batch {batch}: {one:.3f} s in one program, {many:.3f} s with codes after every 4 of {cfg.grid} rows: "
        f"{many / one - 1:+.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", nargs="?", help="trained Transformer on procedural scenes, for quality and speculative"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--changes", nargs="+", choices=CHANGES, default=list(CHANGES), help="for the part speed"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--draft-lens", type=int, nargs="+", default=[4, 8, 16, 32], help="for the part speculative"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=200, help="captions of each kind")
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    args = parser.parse_args()
    if args.run is None and {"quality", "speculative"} & set(args.parts):
        parser.error("the parts quality and speculative need a run; give one, or use --parts speed previews")
    for batch in args.batch if "speed" in args.parts else []:
        measure_speed(batch, args.repeats, args.changes)
    if "quality" in args.parts:
        measure_quality(args.run, args.count, args.temperature, args.guidance_scale)
    for batch in args.batch if "speculative" in args.parts else []:
        measure_speculative(args.run, 64, batch, args.draft_lens, args.temperature, args.guidance_scale)
    for batch in args.batch if "previews" in args.parts else []:
        measure_previews(batch, args.repeats)


if __name__ == "__main__":
    main()
