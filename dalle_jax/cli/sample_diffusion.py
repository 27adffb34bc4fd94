"""`dalle-jax sample` on the run of a diffusion model: pictures out of noise, or out of a picture."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dalle_jax.cli import output
from dalle_jax.cli.common_args import denoising, refuse_flags
from dalle_jax.data import images
from dalle_jax.pipelines import ProgressPrinter
from dalle_jax.pipelines.diffusion import (
    DiffusionModel,
    denoise_images,
    load_diffusion,
)

if TYPE_CHECKING:
    from dalle_jax.cli.sample import SampleArgs

FILM = "filmstrip.png"
_TRANSFORMER_ONLY = ("temperature", "top_k", "top_p", "prefix", "prefix_rows")


def sample(args: SampleArgs, captions: list[str], exact_picture, warn_truncated) -> dict[str, Any]:
    """Draws, writes and lists the pictures. exact_picture: (path, side, flag) -> uint8 (side, side, 3)."""
    refuse_flags(args, _TRANSFORMER_ONLY, "a Transformer; this is the run of a diffusion model")
    how = denoising(args, args.guidance_scale)
    model = load_diffusion(args.run)
    what, labels = _asked(args, model, captions)
    side = model.config.image_size
    image = None if args.image is None else exact_picture(args.image, side, "--image")
    mask = None
    if args.mask is not None:
        mask = exact_picture(args.mask, side, "--mask").mean(axis=2) < 128  # white is drawn anew
        if mask.all() or not mask.any():
            found = "black: nothing is left to draw" if mask.all() else "white: nothing is kept, leave it out"
            raise ValueError(f"--mask {args.mask} is all {found}")
    cut = (
        warn_truncated(model.text, model.config.text.text_len, captions) if model.text else [0] * len(labels)
    )
    frames = 0 if args.filmstrip is None else args.filmstrip
    if args.filmstrip is not None and not 1 <= frames <= how.num_steps:
        raise ValueError(f"--filmstrip is {frames}; want 1 to {how.num_steps} pictures, the number of steps")
    out = output.directory(args.out)

    rows = [(j, args.seed + i) for j in range(len(labels)) for i in range(args.num_images)]
    each = {name: [values[j] for j, _ in rows] for name, values in what.items() if name != "low"}
    if "low" in what:
        each["low"] = np.repeat(what["low"][None], len(rows), axis=0)
    drawn = denoise_images(
        model, [seed for _, seed in rows], how, **each, image=image, mask=mask, strength=args.strength,
        frames=frames, batch=args.batch_size, progress=ProgressPrinter("denoising steps"),
    )  # fmt: skip
    names = [f"c{j:03d}_s{seed:04d}.png" for j, seed in rows]
    for name, picture in zip(names, drawn.images, strict=True):
        images.save_png(out / name, picture)
    columns = args.num_images if len(labels) > 1 else min(args.num_images, 8)
    scale = max(1, 128 // side)
    texts = [labels[j] for j, _ in rows]
    images.save_png(out / "grid.png", images.image_grid(drawn.images, columns, labels=texts, scale=scale))
    result = {"run": str(model.run.path), "step": model.run.step, "grid": str(out / "grid.png")}
    if frames:
        film = drawn.frames.reshape(-1, *drawn.images.shape[1:])
        images.save_png(out / FILM, images.image_grid(film, frames, scale=max(1, 64 // side)))
        result["filmstrip"] = str(out / FILM)
    print(f"{len(names)} pictures in {out}, all of them in {out / 'grid.png'}")
    return {
        **result,
        "denoising": dataclasses.asdict(how),
        "pictures": [
            {"file": str(out / name), "caption": labels[j], "seed": seed, "tokens_cut": cut[j]}
            for name, (j, seed) in zip(names, rows, strict=True)
        ],
    }


def _asked(args: SampleArgs, model: DiffusionModel, captions: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Conditions by name, one of each for what is drawn, and what stands under the pictures."""
    cfg, what = model.config, {}
    if cfg.codes is not None:
        raise ValueError(
            f"{args.run} draws the pictures of codes: `dalle-jax decode {args.run} CODES.npz`, or "
            f"`dalle-jax sample RUN_OF_A_TRANSFORMER ... --decoder {args.run}`"
        )
    if args.label and not cfg.num_classes:
        raise ValueError("--label is for a model of classes; this one has none")
    if cfg.text is None and any(captions):
        raise ValueError(
            f"{args.run} reads no captions; leave them out" + (", give --label" if cfg.num_classes else "")
        )
    if cfg.text is not None and not captions:
        raise ValueError(
            'no captions; give one or more, e.g. "a red circle", or --unconditional to draw without'
        )
    under = [caption or "(no caption)" for caption in captions] or [""]
    if cfg.text is not None:
        what["captions"] = captions
    if cfg.num_classes:
        numbers = list(args.label) or ([-1] if args.unconditional else [])
        if not numbers:
            raise ValueError(
                f"no label; give --label, 0 to {cfg.num_classes - 1}, or --unconditional to draw without"
            )
        if cfg.text is not None and len(numbers) not in (1, len(captions)):
            raise ValueError(
                f"{len(numbers)} labels and {len(captions)} captions; want one label, or one for each"
            )
        numbers = numbers * len(captions) if cfg.text is not None and len(numbers) == 1 else numbers
        if cfg.text is None:
            under = [f"class {n}" if n >= 0 else "(no class)" for n in numbers]
        what["labels"] = numbers
    if (args.low_res is None) != (cfg.low_res_size == 0):
        raise ValueError(
            "--low-res is for a model that draws from a small picture" if args.low_res else
            f"this model draws from a small picture of {cfg.low_res_size} x {cfg.low_res_size}; give --low-res PICTURE"
        )  # fmt: skip
    if args.low_res is not None:
        what["low"] = images.load_image(args.low_res, cfg.low_res_size)
    return what, under
