"""FID of every diffusion sampler: python -m benchmarks.samplers RUN --fid-weights FILE [--steps 50 250]

Samples `--count` images (at most the size of the evaluation split) with each sampler and number of steps, one seed
each. Prints the FID against the images of the split, the Inception score if the weights include the classifier, network
evaluations, and for unconditional models images per second of sampling alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import jax

from dalle_jax.config import SamplerName
from dalle_jax.evaluate import inception, metrics
from dalle_jax.pipelines import (
    DiffusionPipeline,
    DiffusionSamplingConfig,
    ImageRequest,
    ProgressPrinter,
    load,
)

SAMPLERS = SamplerName.__args__
TWO_CALLS = ("heun", "pc")  # samplers with two network evaluations per step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--fid-weights", required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 250])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        network, model = inception.load_inception(args.fid_weights), load(args.run, DiffusionPipeline)
    except (ValueError, OSError) as error:
        print(f"benchmarks.samplers: error: {error}", file=sys.stderr)
        return 1
    options = {
        "languages": model.languages,
        "progress": ProgressPrinter("features of reference images"),
    }
    data, size = model.run.config.data, model.image_size
    reference = metrics.reference_stats(network, data, size, args.count, **options)
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{args.run}, {model.run.step} updates; {reference.count} images; {where}", file=sys.stderr)
    rows = []
    for steps in args.steps:
        for sampler in args.samplers:
            sampling = DiffusionSamplingConfig(sampler=sampler, num_steps=steps, guidance_scale=args.guidance)
            result = metrics.measure_fid(network, model, reference, args.count, sampling)
            rows.append(
                {"sampler": sampler, "steps": steps, "calls": steps * (1 + (sampler in TWO_CALLS)), **result}
            )
            if model.text is None and not model.config.num_classes:
                requests = [ImageRequest(seed=seed) for seed in range(metrics.EVAL_ROWS)]
                list(model.sample(requests, sampling, batch_size=metrics.EVAL_ROWS))  # compiles
                begin = time.perf_counter()
                list(model.sample(requests, sampling, batch_size=metrics.EVAL_ROWS))
                rows[-1]["images_per_second"] = metrics.EVAL_ROWS / (time.perf_counter() - begin)
            print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                  file=sys.stderr if args.json else sys.stdout, flush=True)  # fmt: skip
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
