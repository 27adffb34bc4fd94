"""`dalle-jax decode`: images of codes, by the tokenizer of a run or a diffusion model on codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, RunPath, SamplerArgs
from dalle_jax.data import images
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.files.archives import read_npz
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import (
    IMAGE_BATCH_SIZE,
    DiffusionPipeline,
    ImageRequest,
    ProgressPrinter,
    TokenizerPipeline,
    load,
)

_DecodeFn = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DecodeArgs:
    """Decode codes to images: `images` float32 (images, height, width, 3) in [0, 1] in an npz file, or a directory of
    PNG files. `dalle-jax decode RUN --help` lists the flags for the model of RUN."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, of a Transformer, which keeps its own, or of a diffusion model on codes"""
    codes: Positional[Annotated[str, arg(metavar="CODES.npz")]]
    """npz file with an array `codes`, as `encode` and `sample` write it"""
    out: str
    """output: a file that ends in .npz, or else a directory"""
    json: JsonFlag = False

    def load_decoder(self) -> tuple[TokenizerPipeline, _DecodeFn]:
        """Load the tokenizer of the codes, and the function from codes to images, float32 (R, H, W, 3) in [0, 1]."""
        tokenizer = load(self.run, TokenizerPipeline)
        return tokenizer, partial(tokenizer.decode, progress=ProgressPrinter("images"))


@dataclass(frozen=True, kw_only=True)
class DiffusionDecodeArgs(DecodeArgs, SamplerArgs):
    """Generate the pixels of codes with a diffusion model: `images` float32 (images, height, width, 3) in [0, 1] in an
    npz file, or a directory of PNG files. Image i has the seed SEED + i."""

    seed: int = 0
    """of the first image"""

    def load_decoder(self) -> tuple[TokenizerPipeline, _DecodeFn]:
        model = load(self.run, DiffusionPipeline)
        if model.tokenizer is None:
            raise ValueError(
                f"Expected a diffusion model on codes, got {self.run} without. Use one trained with model.codes."
            )
        config, tokenizer = self.denoising_config(), model.tokenizer

        def decode(codes: np.ndarray) -> np.ndarray:
            tokenizer.check_codes(codes)
            requests = [ImageRequest(seed=self.seed + i, codes=row) for i, row in enumerate(codes)]
            progress = ProgressPrinter("denoising steps")
            images = model.sample(requests, config, batch_size=IMAGE_BATCH_SIZE, progress=progress)
            return to_float(np.stack([generated.image for generated in images]))

        return tokenizer, decode


DECODE_FLAGS = {"diffusion": DiffusionDecodeArgs}


def run(args: DecodeArgs) -> dict[str, Any]:
    """Decode a file of codes and write the images."""
    codes, encoded_by = _read_codes(args.codes)
    tokenizer, decode = args.load_decoder()
    to_file = args.out.endswith(".npz")
    out = output.output_file(args.out) if to_file else output.output_directory(args.out)
    if encoded_by is not None and encoded_by != tokenizer.fingerprint:
        print(
            f"warning: {args.codes} was made by tokenizer {encoded_by}, {args.run} has {tokenizer.fingerprint}: "
            "the decoded images differ from those encoded",
            file=sys.stderr,
        )
    try:
        decoded = decode(codes)
    except ValueError as error:
        raise ValueError(f"{args.codes}: {error}") from None
    if to_file:
        write_npz(out, images=decoded)
    else:
        for i, image in enumerate(to_uint8(decoded)):
            images.save_png(out / f"{i:05d}.png", image)
    print(f"{len(decoded)} images in {out}")
    return {"out": str(out), "num_images": len(decoded), **output.tokenizer_summary(tokenizer)}


def _read_codes(path: str) -> tuple[np.ndarray, str | None]:
    """The array `codes` of an npz file, and the fingerprint of the tokenizer that made them if the file has it."""
    hint = "Use a file that `dalle-jax encode` or `sample` wrote."
    arrays = read_npz(path, hint)
    if "codes" not in arrays:
        raise ValueError(f"Expected an array `codes` in {path}, got {', '.join(arrays) or 'none'}. {hint}")
    return arrays["codes"], str(arrays["tokenizer"]) if "tokenizer" in arrays else None
