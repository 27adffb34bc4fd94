"""`dalle-jax rerank`: pictures in order of how well they fit a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.data import images
from dalle_jax.pipelines import IMAGE_BATCH, ProgressPrinter
from dalle_jax.pipelines.ranking import embed_captions, embed_images, load_clip


@dataclass(frozen=True, kw_only=True)
class RerankArgs:
    """Ranks pictures by how well they fit a caption, best first: the cosine of the vectors that a CLIP gives the
    two. Pictures are cropped to their middle square and resized."""

    run: Positional[Annotated[str, arg(metavar="CLIP_RUN")]]
    """directory of a trained CLIP"""
    caption: Positional[Annotated[str, arg(metavar="CAPTION")]]
    """what the pictures should show"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]]
    """picture files"""
    top: int | None = None
    """list only the best; None lists all"""
    json: JsonFlag = False


def run(args: RerankArgs) -> dict[str, Any]:
    """Scores and lists the pictures, best first."""
    if not args.images:
        raise ValueError("no pictures; give the files to rank after the caption")
    if not args.caption.strip():
        raise ValueError("the caption has no text: nothing to rank the pictures by")
    if args.top is not None and not 1 <= args.top <= len(args.images):
        raise ValueError(f"--top is {args.top}; want 1 to {len(args.images)}, the pictures given")
    clip = load_clip(args.run)
    progress, found = ProgressPrinter("pictures"), []
    for start in range(0, len(args.images), IMAGE_BATCH):
        paths = args.images[start : start + IMAGE_BATCH]
        pictures = np.stack([images.load_image(path, clip.config.image_size) for path in paths])
        found.append(embed_images(clip, pictures))
        progress(start + len(paths), len(args.images))
    score_R = np.concatenate(found) @ embed_captions(clip, [args.caption])[0]
    order = np.argsort(-score_R, kind="stable")[: args.top]
    for i in order:
        print(f"{score_R[i]:.4f}  {args.images[i]}")
    ranked = [{"file": args.images[i], "score": float(score_R[i])} for i in order]
    return {"run": str(clip.run.path), "step": clip.run.step, "caption": args.caption, "pictures": ranked}
