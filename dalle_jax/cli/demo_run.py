"""The whole job in minutes on two CPU cores: train a tokenizer, train a Transformer, draw, verify.

`dalle-jax demo --out DIR` makes

    DIR/dvae, DIR/dalle       the two runs, for `dalle-jax sample DIR/dalle "a red circle"`
    DIR/reconstructions.png   pictures, and what is left of them after 64 codes
    DIR/grid.png              pictures for captions with their verdicts; the last ones of pairs never shown together
    DIR/results.json          every figure

Each stage goes on where an interrupted one stopped; a stage that is finished is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.config import (
    DalleConfig,
    DataConfig,
    DVAEConfig,
    MeshConfig,
    OptimConfig,
    ScenesSource,
    Schedule,
    TextConfig,
    TrainConfig,
)
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes.captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import metrics
from dalle_jax.files.atomic import write_atomic
from dalle_jax.pipelines import (
    ImageTokenizer,
    ProgressPrinter,
    SamplingConfig,
    TextToImage,
    decode_codes,
    encode_images,
    load_text_to_image,
)
from dalle_jax.train import loop

SAMPLING = SamplingConfig(guidance_scale=1.5, temperature=0.4)  # of the demo's pictures and figures
SHOWN = 8  # pictures of each kind in grid.png

# One large plain shape per picture: what a tokenizer and a Transformer of this size learn in these minutes. The
# whole data set, with up to four objects, fills and relations, is what configs/scenes_*.py train on.
_SOURCE = ScenesSource(
    min_objects=1, max_objects=1, sizes=("large",), fills=("solid",), backgrounds=("plain",)
)
_MESH = MeshConfig(cpu_devices=2)
_TOKENIZER_STEPS = 4000
_TRANSFORMER_STEPS = 3000


def dvae_config(out: str = "runs/demo") -> TrainConfig:
    """The demo's tokenizer: 32 x 32 pixels to 8 x 8 codes."""
    return TrainConfig(
        run=f"{out}/dvae",
        model=DVAEConfig(
            image_size=32,
            groups=3,
            blocks=1,
            width=32,
            decoder_width=64,
            vocab=128,
            tau=Schedule(start=1.0, end=0.3, steps=_TOKENIZER_STEPS),
            kl_weight=Schedule(start=0.1, end=0.1, steps=0),
            code_usage_weight=Schedule(start=0.05, end=0.05, steps=0),
            min_scale=0.3,
        ),
        data=DataConfig(batch_size=16, source=_SOURCE),
        optim=OptimConfig(
            learning_rate=4e-3,
            warmup_steps=100,
            final_lr_ratio=0.02,
            b2=0.99,
            weight_decay=0.0,
            ema_decay=0.99,
            ema_every=1,
        ),
        mesh=_MESH,
        steps=_TOKENIZER_STEPS,
        eval_every=1000,
        save_every=1000,
        sample_every=_TOKENIZER_STEPS,
        eval_rows=256,
        log_every=50,
    )


def dalle_config(out: str = "runs/demo") -> TrainConfig:
    """The demo's Transformer over captions and the codes of `dvae_config`."""
    return TrainConfig(
        run=f"{out}/dalle",
        image_tokenizer=f"{out}/dvae",
        model=DalleConfig(
            text_vocab=768,
            text_len=16,
            image_vocab=128,
            grid=8,
            dim=128,
            layers=5,
            heads=4,
            attention=("full",),
            last_attention=None,
            qk_norm=True,
            dtype="float32",
            remat="none",
            scan_unroll=5,
        ),
        data=DataConfig(batch_size=32, source=_SOURCE),
        text=TextConfig(num_train_captions=20_000, bpe_dropout=0.0),
        optim=OptimConfig(
            learning_rate=3e-3,
            warmup_steps=100,
            b2=0.99,
            weight_decay=0.01,
            clip_norm=1.0,
            ema_decay=0.995,
            ema_every=1,
        ),
        mesh=_MESH,
        steps=_TRANSFORMER_STEPS,
        eval_every=500,
        save_every=500,
        sample_every=_TRANSFORMER_STEPS,
        eval_rows=256,
        log_every=50,
    )


def configs(
    out: str | Path,
    *,
    seed: int = 0,
    tokenizer_steps: int | None = None,
    transformer_steps: int | None = None,
) -> tuple[TrainConfig, TrainConfig]:
    """The two configurations in `out`, with another seed or number of steps (None keeps the demo's own)."""
    pair = []
    for config, steps in (
        (dvae_config(str(out)), tokenizer_steps),
        (dalle_config(str(out)), transformer_steps),
    ):
        changes = {"seed": seed, "data": dataclasses.replace(config.data, seed=seed)}
        changes |= {} if steps is None else {"steps": steps}
        pair.append(dataclasses.replace(config, **changes))
    return pair[0], pair[1]


def run(
    out: str | Path,
    *,
    seed: int = 0,
    count: int = 200,
    tokenizer_steps: int | None = None,
    transformer_steps: int | None = None,
) -> dict[str, Any]:
    """Does what is not done yet and returns results.json, with `finished`: False after an interruption.

    count: captions of each kind that are drawn and verified. Raises what `train.loop.run` raises.
    """
    out = Path(out)
    tokenizer_config, transformer_config = configs(
        out, seed=seed, tokenizer_steps=tokenizer_steps, transformer_steps=transformer_steps
    )
    out.mkdir(parents=True, exist_ok=True)
    book = _Book(out / "results.json")

    _say(f"1/4 tokenizer: {tokenizer_config.run}")
    with book.timed("tokenizer"):
        finished = _train(tokenizer_config, book, "tokenizer")
    if finished:
        _say(f"2/4 Transformer: {transformer_config.run}")
        with book.timed("transformer"):
            finished = _train(transformer_config, book, "transformer")
    if not finished:
        _say("stopped; the same command goes on from here")
        return {**book.results, "finished": False}

    asked = {
        "count": count,
        "seed": seed,
        "steps": [tokenizer_config.steps, transformer_config.steps],
        "sampling": dataclasses.asdict(SAMPLING),
    }
    pictures = [out / "reconstructions.png", out / "grid.png"]
    if book.results.get("asked") == asked and all(p.exists() for p in pictures):
        _say("3/4 and 4/4 are done already")
    else:
        with book.timed("measure", afresh=True):
            figures = _measure(load_text_to_image(transformer_config.run), count, seed, *pictures)
        book.put(asked=asked, figures=figures)
    return {**book.results, "finished": True}


def _measure(model: TextToImage, count: int, seed: int, rebuilt: Path, grid: Path) -> dict[str, float]:
    """Every figure of the demo; writes its two pictures."""
    data = model.run.config.data
    _say("3/4 what the tokenizer keeps of a picture")
    figures = metrics.measure_tokenizer(model.tokenizer, data, count)
    figures |= metrics.reconstruction_accuracy(model.tokenizer, data, count)
    images.save_png(rebuilt, reconstructions(model.tokenizer, data))
    _say("4/4 pictures for captions: colour-shape pairs of the training, then pairs it never showed")
    figures |= metrics.measure_nll(model, count)
    shown = []
    for kind in metrics.scene_kinds(data, model.tokenizer.config.image_size):
        progress = ProgressPrinter(f"{kind} captions")
        drawn = metrics.sample_and_verify(model, kind, count, SAMPLING, seed=seed, progress=progress)
        figures |= metrics.accuracy_by_kind(kind, drawn)
        shown += drawn[:SHOWN]
    images.save_png(grid, verdict_grid(shown))
    return figures


def _train(config: TrainConfig, book: _Book, stage: str) -> bool:
    """Trains to the last step; True if it got there. A stage that is done is only looked at."""
    done = book.results.get("done", {})
    if done.get(stage) == config.steps and (Path(config.run) / "config.json").exists():
        _say("    done already")
        return True
    finished = loop.train(config).finished
    if finished:
        book.put(done=done | {stage: config.steps})
    return finished


def reconstructions(tokenizer: ImageTokenizer, data: DataConfig, count: int = SHOWN) -> Image.Image:
    """Pictures of the evaluation split, each above what its codes decode to."""
    size = tokenizer.config.image_size
    source = open_source(data.source, "eval", languages=())
    true = eval_batch(data, source, count, image_size=size)["image"]
    again = images.to_uint8(decode_codes(tokenizer, encode_images(tokenizer, true)))
    labels = ["picture"] * len(true) + [f"from {tokenizer.config.num_codes} codes"] * len(true)
    scale = max(1, 128 // size)
    return images.image_grid(np.concatenate([true, again]), len(true), labels=labels, scale=scale)


def verdict_grid(drawn: list[metrics.VerifiedImage], columns: int = SHOWN) -> Image.Image:
    """Captioned pictures; a green frame and a tick where the verifier finds all that the caption says, else a
    red frame and a cross."""
    scale = max(1, 128 // drawn[0].image.shape[0])
    cells = np.stack(
        [_marked(one.image.repeat(scale, axis=0).repeat(scale, axis=1), one.verdict.right) for one in drawn]
    )
    labels = [f"{'right' if one.verdict.right else 'wrong'}: {_caption(one.caption)}" for one in drawn]
    return images.image_grid(cells, columns, labels=labels)


def _caption(caption: Caption) -> str:
    """The caption; where it is not English with its facts in English: fonts may lack Chinese."""
    if caption.language == "en":
        return caption.text
    names = [" ".join(filter(None, (o.size, o.fill, o.color, o.shape))) for o in caption.facts.objects]
    said = [
        f"{names[r.subject]} {r.name} {' and '.join(names[i] for i in r.others)}"
        for r in caption.facts.relations
    ]
    return f"{caption.text} [{caption.language}: {'; '.join(said or names)}]"


def _marked(image: np.ndarray, right: bool, frame: int = 4, box: int = 20) -> np.ndarray:
    """The picture in a frame, a tick or a cross in its lower right corner."""
    colour = (24, 140, 60) if right else (200, 40, 40)
    canvas = Image.new("RGB", (image.shape[1] + 2 * frame, image.shape[0] + 2 * frame), colour)
    canvas.paste(Image.fromarray(image), (frame, frame))
    draw = ImageDraw.Draw(canvas)
    x, y = canvas.width - box, canvas.height - box
    draw.rectangle((x, y, canvas.width, canvas.height), fill=colour)
    strokes = [((4, 10), (8, 14), (15, 5))] if right else [((5, 5), (14, 14)), ((5, 14), (14, 5))]
    for stroke in strokes:
        draw.line([(x + a, y + b) for a, b in stroke], fill="white", width=2)
    return np.asarray(canvas)


class _Book:
    """results.json: what is done, the figures, and the seconds of each stage over all calls."""

    def __init__(self, path: Path):
        self._path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            found = {}
        self.results: dict[str, Any] = found if isinstance(found, dict) else {}

    def put(self, **values: Any) -> None:
        self.results |= values
        write_atomic(self._path, json.dumps(self.results, indent=2, ensure_ascii=False) + "\n")

    def timed(self, stage: str, afresh: bool = False) -> _Timed:
        return _Timed(self, stage, afresh)


class _Timed:
    """Adds the seconds of a block to those of its stage, also when it is interrupted."""

    def __init__(self, book: _Book, stage: str, afresh: bool):
        self._book, self._stage = book, stage
        self._before = 0.0 if afresh else book.results.get("seconds", {}).get(stage, 0.0)

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_) -> None:
        spent = round(self._before + time.monotonic() - self._begin, 1)
        self._book.put(seconds=self._book.results.get("seconds", {}) | {self._stage: spent})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
