"""`dalle-jax demo`: dalle_jax/cli/demo_run.py, with its flags and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_jax.cli import demo_run as job
from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.evaluate import metrics


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Trains a tokenizer and a Transformer on procedural scenes, draws pictures for captions, of pairs of
    colour and shape that training showed and that it never did, and measures how many are right. The same
    command again goes on where it stopped."""

    out: str = "runs/demo"
    """directory for the two runs, the pictures and results.json"""
    seed: int = 0
    """of the data's order, the parameters and the samples"""
    count: int = 200
    """captions of each kind that are drawn and verified"""
    tokenizer_steps: int | None = None
    """updates of the tokenizer; None is the demo's own number"""
    transformer_steps: int | None = None
    """updates of the Transformer; None is the demo's own number"""
    json: JsonFlag = False


def run(args: DemoArgs) -> dict[str, Any]:
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
