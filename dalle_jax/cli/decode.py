"""`dalle-jax decode`: images of codes, by the tokenizer of a run or a diffusion model on codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, RunPath, denoising, refuse_flags
from dalle_jax.config import SamplerName
from dalle_jax.data import images
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.files.archives import read_npz
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import (
    IMAGE_BATCH,
    ImageTokenizer,
    ProgressPrinter,
    decode_codes,
    load_image_tokenizer,
)
from dalle_jax.pipelines.diffusion import DiffusionModel, denoise_images, is_diffusion, load_diffusion


@dataclass(frozen=True, kw_only=True)
class DecodeArgs:
    """Turns codes into pictures: `images` float32 (pictures, height, width, 3) in [0, 1] in an npz file, or a
    directory of PNG files."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, of a Transformer, which keeps its own, or of a diffusion model on codes,
    which draws them: picture i with seed SEED + i"""
    codes: Positional[Annotated[str, arg(metavar="CODES.npz")]]
    """npz file with an array `codes`, as `encode` and `sample` write it"""
    out: str
    """where to write: a file that ends in .npz, or else a directory"""
    seed: int = 0
    """diffusion: of the first picture"""
    num_steps: int | None = None
    """diffusion: steps of the sampler; None is 50"""
    sampler: SamplerName | None = None
    """diffusion: how the noise is taken away; None is dpm++2m"""
    json: JsonFlag = False


def run(args: DecodeArgs) -> dict[str, Any]:
    """A file of codes to pictures."""
    codes, made_by = _read_codes(args.codes)
    decoder = load_diffusion(args.run) if is_diffusion(args.run) else None
    if decoder is None:
        refuse_flags(
            args,
            ("seed", "num_steps", "sampler"),
            "a diffusion model",
        )
    tokenizer = load_image_tokenizer(args.run) if decoder is None else _own_tokenizer(decoder, args.run)
    to_file = args.out.endswith(".npz")
    out = output.file(args.out) if to_file else output.directory(args.out)
    if made_by is not None and made_by != tokenizer.fingerprint:
        print(
            f"warning: {args.codes} was made by tokenizer {made_by}, {args.run} has {tokenizer.fingerprint}: "
            "the pictures will differ from those encoded",
            file=sys.stderr,
        )
    try:
        if decoder is None:
            pictures = decode_codes(tokenizer, codes, progress=ProgressPrinter("pictures"))
        else:
            progress = ProgressPrinter("denoising steps")
            seeds = range(args.seed, args.seed + len(codes))
            drawn = denoise_images(
                decoder, seeds, denoising(args), codes=codes, batch=IMAGE_BATCH, progress=progress
            )
            pictures = to_float(drawn.images)
    except ValueError as error:
        raise ValueError(f"{args.codes}: {error}") from None
    if to_file:
        write_npz(out, images=pictures)
    else:
        for i, picture in enumerate(to_uint8(pictures)):
            images.save_png(out / f"{i:05d}.png", picture)
    print(f"{len(pictures)} pictures in {out}")
    return {"images": str(out), "pictures": len(pictures), **output.tokenizer_summary(tokenizer)}


def _own_tokenizer(decoder: DiffusionModel, run: str) -> ImageTokenizer:
    if decoder.tokenizer is None:
        raise ValueError(f"{run} is a diffusion model that reads no codes; give one with model.codes")
    return decoder.tokenizer


def _read_codes(path: str) -> tuple[np.ndarray, str | None]:
    """The array `codes` of an npz file, and the fingerprint of the tokenizer that made them if the file has it."""
    want = "want an npz file with an array `codes`, as `dalle-jax encode` writes it"
    arrays = read_npz(path, want)
    if "codes" not in arrays:
        raise ValueError(f"{path} has no array `codes`, it has {', '.join(arrays) or 'none'}; {want}")
    return arrays["codes"], str(arrays["tokenizer"]) if "tokenizer" in arrays else None
