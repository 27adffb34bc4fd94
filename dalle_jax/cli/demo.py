"""`dalle-jax demo`: train an image tokenizer and a Transformer, sample and verify, in minutes on two CPU cores.

`--out DIR` receives

    dvae, dalle               the runs of configs/demo_dvae.py and demo_dalle.py
    reconstructions.png       images of the evaluation split above their reconstructions from 64 codes
    grid.png                  samples with their verdicts; the last rows are of pairs held out of training
    results.json              every metric, and the seconds of each stage

An interrupted stage resumes, and a finished stage is not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.config import DataConfig, TrainConfig
from dalle_jax.config.files import load_shipped_config
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes.captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import metrics
from dalle_jax.files.atomic import write_atomic
from dalle_jax.pipelines import (
    ProgressPrinter,
    SamplingConfig,
    TextToImagePipeline,
    TokenizerPipeline,
    load,
)
from dalle_jax.train import loop

_SAMPLING = SamplingConfig(guidance_scale=1.5, temperature=0.4)
_GRID_COLUMNS = 8  # also the images of each kind in grid.png
_CORRECT, _WRONG = (24, 140, 60), (200, 40, 40)  # RGB of frames


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Train an image tokenizer and a Transformer on procedural scenes, sample images for captions of color-shape
    pairs inside and outside the training set, and measure how many are correct. Running the command again resumes
    it."""

    out: str = "runs/demo"
    """directory for the two runs, the images and results.json"""
    seed: int = 0
    """seed of the data order, the parameters and the samples"""
    count: int = 200
    """captions of each kind to sample and verify"""
    tokenizer_steps: int | None = None
    """training steps of the tokenizer; None takes those of configs/demo_dvae.py"""
    transformer_steps: int | None = None
    """training steps of the Transformer; None takes those of configs/demo_dalle.py"""
    json: JsonFlag = False


def run(args: DemoArgs) -> dict[str, Any]:
    """Run the stages that are not finished and print the metrics.

    Returns:
        results.json, and `finished`: False after an interruption.
    """
    if args.count < 1:
        raise ValueError(f"Expected --count of at least 1 caption of each kind, got {args.count}.")
    out = output.output_directory(args.out)
    results = _Results(out / "results.json")
    tokenizer, transformer = demo_configs(args)
    finished = False
    for i, (stage, config) in enumerate((("tokenizer", tokenizer), ("transformer", transformer)), 1):
        _log(f"{i}/4 {stage}: {config.run}")
        with results.timed(stage):
            finished = _train(config, results, stage)
        if not finished:
            _log("stopped; run the same command to resume")
            return {**results.values, "finished": False}

    request = {
        "count": args.count,
        "seed": args.seed,
        "steps": [tokenizer.steps, transformer.steps],
        "sampling": dataclasses.asdict(_SAMPLING),
    }
    files = [out / "reconstructions.png", out / "grid.png"]
    if results.values.get("request") == request and all(file.exists() for file in files):
        _log("3/4 and 4/4 are finished")
    else:
        with results.timed("measure", restart=True):
            figures = _measure(load(transformer.run, TextToImagePipeline), args.count, args.seed, *files)
        results.update(request=request, metrics=figures)
    print(metrics.format_metrics(results.values["metrics"]))
    seconds = results.values["seconds"]
    print(f"seconds: {'  '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    print(f"images: {out / 'grid.png'}  {out / 'reconstructions.png'}")
    flags = f"--guidance-scale {_SAMPLING.guidance_scale:g} --temperature {_SAMPLING.temperature:g}"
    print(f'sample your own: dalle-jax sample {transformer.run} "a red circle" {flags}')
    return {**results.values, "finished": True}


def demo_configs(args: DemoArgs) -> tuple[TrainConfig, TrainConfig]:
    """Return the configurations of the tokenizer and the Transformer with the runs, seed and steps of `args`."""

    def adapt(name: str, run: str, steps: int | None, **changes: Any) -> TrainConfig:
        config = load_shipped_config(name)
        data = dataclasses.replace(config.data, seed=args.seed)
        steps = config.steps if steps is None else steps
        return dataclasses.replace(config, run=run, seed=args.seed, data=data, steps=steps, **changes)

    tokenizer = adapt("demo_dvae", f"{args.out}/dvae", args.tokenizer_steps)
    transformer = adapt(
        "demo_dalle", f"{args.out}/dalle", args.transformer_steps, image_tokenizer=tokenizer.run
    )
    return tokenizer, transformer


def _train(config: TrainConfig, results: _Results, stage: str) -> bool:
    """Train to the last step and return whether it was reached; do nothing for a finished stage."""
    done = results.values.get("done", {})
    if done.get(stage) == config.steps and (Path(config.run) / "config.json").exists():
        _log("    finished")
        return True
    finished = loop.train(config).finished
    if finished:
        results.update(done=done | {stage: config.steps})
    return finished


def _measure(
    model: TextToImagePipeline, count: int, seed: int, reconstructions_file: Path, grid_file: Path
) -> metrics.Metrics:
    """Compute every metric and write the two images."""
    data = model.run.config.data
    _log("3/4 metrics of the tokenizer")
    figures = metrics.measure_tokenizer(model.tokenizer, data, count)
    figures |= metrics.reconstruction_accuracy(model.tokenizer, data, count)
    images.save_png(reconstructions_file, _reconstruction_grid(model.tokenizer, data))
    _log("4/4 samples for captions of color-shape pairs in the training set, then of pairs held out of it")
    figures |= metrics.measure_nll(model, count)
    shown = []
    for kind in metrics.scene_kinds(data, model.image_size):
        progress = ProgressPrinter(f"{kind} captions")
        samples = metrics.sample_and_verify(model, kind, count, _SAMPLING, seed=seed, progress=progress)
        figures |= metrics.accuracy_metrics(kind, samples)
        shown += samples[:_GRID_COLUMNS]
    images.save_png(grid_file, _verdict_grid(shown))
    return figures


def _reconstruction_grid(tokenizer: TokenizerPipeline, data: DataConfig) -> Image.Image:
    """Images of the evaluation split, each above its reconstruction from its codes."""
    size = tokenizer.config.image_size
    source = open_source(data.source, "eval", languages=())
    originals = eval_batch(data, source, _GRID_COLUMNS, image_size=size)["image"]
    decoded = tokenizer.reconstruct(originals)
    labels = ["image"] * len(originals) + [f"from {tokenizer.config.num_codes} codes"] * len(originals)
    cells = np.concatenate([originals, decoded])
    return images.image_grid(cells, len(originals), labels=labels, scale=max(1, 128 // size))


def _verdict_grid(samples: list[metrics.VerifiedImage]) -> Image.Image:
    """Samples with their captions, in a green frame with a tick or a red frame with a cross by the verdict."""
    scale = max(1, 128 // samples[0].image.shape[0])
    cells = [
        _framed(sample.image.repeat(scale, axis=0).repeat(scale, axis=1), sample.verdict.right)
        for sample in samples
    ]
    labels = [
        f"{'right' if sample.verdict.right else 'wrong'}: {_label(sample.caption)}" for sample in samples
    ]
    return images.image_grid(np.stack(cells), _GRID_COLUMNS, labels=labels)


def _label(caption: Caption) -> str:
    """The caption, followed by its facts in English if it is not English: a font may lack Chinese."""
    if caption.language == "en":
        return caption.text
    names = [" ".join(filter(None, (o.size, o.fill, o.color, o.shape))) for o in caption.facts.objects]
    relations = [
        f"{names[r.subject]} {r.name} {' and '.join(names[i] for i in r.others)}"
        for r in caption.facts.relations
    ]
    return f"{caption.text} [{caption.language}: {'; '.join(relations or names)}]"


def _framed(image: np.ndarray, correct: bool, frame: int = 4, box: int = 20) -> np.ndarray:
    """The image in a frame, with a tick or a cross in its lower right corner."""
    color = _CORRECT if correct else _WRONG
    canvas = Image.new("RGB", (image.shape[1] + 2 * frame, image.shape[0] + 2 * frame), color)
    canvas.paste(Image.fromarray(image), (frame, frame))
    draw = ImageDraw.Draw(canvas)
    x, y = canvas.width - box, canvas.height - box
    draw.rectangle((x, y, canvas.width, canvas.height), fill=color)
    strokes = [((4, 10), (8, 14), (15, 5))] if correct else [((5, 5), (14, 14)), ((5, 14), (14, 5))]
    for stroke in strokes:
        draw.line([(x + a, y + b) for a, b in stroke], fill="white", width=2)
    return np.asarray(canvas)


class _Results:
    """results.json: the finished stages, the metrics, and the seconds of each stage over all calls."""

    def __init__(self, path: Path):
        self._path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            values = {}
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}

    def update(self, **values: Any) -> None:
        """Set values and write the file."""
        self.values |= values
        write_atomic(self._path, json.dumps(self.values, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def timed(self, stage: str, *, restart: bool = False) -> Generator[None, None, None]:
        """Add the seconds of a block to those of its stage, also when the block is interrupted."""
        before = 0.0 if restart else self.values.get("seconds", {}).get(stage, 0.0)
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = round(before + time.monotonic() - start, 1)
            self.update(seconds=self.values.get("seconds", {}) | {stage: seconds})


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
