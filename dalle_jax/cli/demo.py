"""`dalle-jax demo`: dalle_jax/cli/demo_run.py, with its flags and its table."""

from __future__ import annotations

from typing import Any

from dalle_jax.cli import demo_run as job
from dalle_jax.cli import output
from dalle_jax.cli.verbs import Demo
from dalle_jax.evaluate import metrics


def demo(args: Demo) -> dict[str, Any]:
    """Runs what is not done yet, and prints the figures."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; want at least 1 caption of each kind")
    out = output.directory(args.out)
    result = job.run(
        out,
        seed=args.seed,
        count=args.count,
        tokenizer_steps=args.tokenizer_steps,
        transformer_steps=args.transformer_steps,
    )
    if result["finished"]:
        seconds = result["seconds"]
        print(metrics.format_metrics(result["figures"]))
        print(f"seconds: {'  '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
        print(f"pictures: {out / 'grid.png'}  {out / 'reconstructions.png'}")
        scale = job.SAMPLING.guidance_scale
        print(f'draw your own: dalle-jax sample {out / "dalle"} "a red circle" --guidance-scale {scale:g}')
    return result
