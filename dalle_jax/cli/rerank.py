"""`dalle-jax rerank`: images ranked by how well they fit a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.data import images
from dalle_jax.pipelines import IMAGE_BATCH_SIZE, ClipPipeline, ProgressPrinter, chunked, load


@dataclass(frozen=True, kw_only=True)
class RerankArgs:
    """Rank images by how well they fit a caption, best first: the cosine similarity of the vectors that a CLIP computes
    of the two. Images are cropped to their center square and resized."""

    run: Positional[Annotated[str, arg(metavar="CLIP_RUN")]]
    """directory of a trained CLIP"""
    caption: Positional[Annotated[str, arg(metavar="CAPTION")]]
    """text that the images are compared with"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]]
    """image files"""
    top: int | None = None
    """list only this many of the best; None lists all"""
    json: JsonFlag = False


def run(args: RerankArgs) -> dict[str, Any]:
    """Score the images and list them, best first."""
    if not args.images:
        raise ValueError("Expected at least one image file after the caption, got none.")
    if not args.caption.strip():
        raise ValueError("Expected a caption with text to rank the images by, got none.")
    if args.top is not None and not 1 <= args.top <= len(args.images):
        raise ValueError(f"Expected --top in [1, {len(args.images)}], the number of images, got {args.top}.")
    clip = load(args.run, ClipPipeline)
    progress, vectors = ProgressPrinter("images"), []
    for paths in chunked(args.images, IMAGE_BATCH_SIZE):
        batch = np.stack([images.load_image(path, clip.image_size) for path in paths])
        vectors.append(clip.embed_images(batch))
        progress(sum(map(len, vectors)), len(args.images))
    score_R = np.concatenate(vectors) @ clip.embed_captions([args.caption])[0]
    order = np.argsort(-score_R, kind="stable")[: args.top]
    for i in order:
        print(f"{score_R[i]:.4f}  {args.images[i]}")
    ranked = [{"file": args.images[i], "score": float(score_R[i])} for i in order]
    return {"run": str(clip.run.path), "step": clip.run.step, "caption": args.caption, "images": ranked}
