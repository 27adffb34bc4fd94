"""`dalle-jax evaluate`: every measure that applies to a run."""

from __future__ import annotations

import sys
from typing import Any

from dalle_jax.cli.verbs import Evaluate
from dalle_jax.evaluate import measures
from dalle_jax.inference import Counter, Sampling, Tokenizer, load_text_to_image
from dalle_jax.train.rundir import fingerprint, load_run, read_config


def evaluate(args: Evaluate) -> dict[str, Any]:
    """Measures and prints a table."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; want at least 1 row")
    if not args.guidance:
        raise ValueError("--guidance has no value; want one scale or several, e.g. --guidance 1 2 4")
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    samplings = [Sampling(guidance=scale, **options) for scale in args.guidance]
    tokenizer_run = read_config(args.run).model.kind == "dvae"
    result = _tokenizer(args) if tokenizer_run else _transformer(args, samplings)
    curve = result.pop("curve", None)
    print(measures.describe(result))
    if curve:
        print("\n" + _table(curve))
        result["curve"] = curve
    return result


def _tokenizer(args: Evaluate) -> dict[str, Any]:
    run = load_run(args.run, "dvae")
    tokenizer = Tokenizer(run.config.model, run.params, fingerprint(run.config.model, run.params))
    return {
        "stage": "dvae",
        "step": run.step,
        "count": args.count,
        **_told(measures.measure_tokenizer(tokenizer, run.config.data, args.count)),
        **_told(measures.measure_ceiling(tokenizer, run.config.data, args.count)),
    }


def _transformer(args: Evaluate, samplings: list[Sampling]) -> dict[str, Any]:
    model = load_text_to_image(args.run)
    data = model.run.config.data
    kinds = measures.scene_kinds(data, model.tokenizer.config.image_size)
    if not kinds:
        print("the source is not of procedural scenes: captions cannot be verified", file=sys.stderr)
    result = {
        "stage": "dalle",
        "step": model.run.step,
        "count": args.count,
        **_told(measures.measure_likelihood(model, args.count)),
        **_told(measures.measure_tokenizer(model.tokenizer, data, args.count)),
        **_told(measures.measure_ceiling(model.tokenizer, data, args.count)),
    }
    if not kinds:
        return result
    curve = []
    for sampling in samplings:
        progress = Counter(f"guidance {sampling.guidance:g}: captions")
        found = measures.measure_faithfulness(model, args.count, sampling, seed=args.seed, progress=progress)
        curve.append({"guidance": sampling.guidance, **found})
        _told(found)
    result |= {
        "temperature": args.temperature,
        **curve[0],
    }  # a single object stays as flat as without a curve
    return result | ({"curve": curve} if len(curve) > 1 else {})


def _told(figures: dict[str, float]) -> dict[str, float]:
    """`figures`, also on standard error: the long part of the work is still to come."""
    if figures:
        print(
            "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), file=sys.stderr, flush=True
        )
    return figures


def _table(rows: list[dict[str, float]]) -> str:
    names = list(rows[0])
    lines = ["  ".join(names)]
    lines += ["  ".join(f"{row[name]:>{len(name)}.4g}" for name in names) for row in rows]
    return "\n".join(lines)
