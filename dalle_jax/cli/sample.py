"""`dalle-jax sample`: pictures for captions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from dalle_jax.cli import output, sample_diffusion, sample_file, startup
from dalle_jax.cli.common_args import JsonFlag, RunPath, denoising, refuse_flags
from dalle_jax.cli.sample_file import CaptionRequest
from dalle_jax.config import Quantization, SamplerName, Spacing
from dalle_jax.data import images
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import (
    ProgressPrinter,
    SamplingConfig,
    TextToImage,
    encode_images,
    load_text_to_image,
    sample_images,
)
from dalle_jax.pipelines.diffusion import check_decoder, denoise_images, is_diffusion, load_diffusion
from dalle_jax.pipelines.ranking import ClipRanker, load_clip, sample_and_rerank
from dalle_jax.text.tokenizers import TextTokenizer

NO_CAPTION = "(no caption)"


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Draws pictures for captions: one PNG file each, and all of them with their captions in grid.png. RUN is a
    Transformer or a diffusion model; flags that the other one has are refused.

    File c000_s0007.png is caption 0 with seed 7: it depends on that caption and that seed alone, whatever
    else is drawn with it. codes.npz holds the codes of all pictures, for `decode`.

    With --captions-file the pictures go through a queue that keeps all of --batch-size busy, and manifest.jsonl lists
    those that are done: the same command again, after it was killed, draws the rest."""

    run: Positional[RunPath]
    """directory of a trained Transformer or diffusion model"""
    captions: Positional[Annotated[tuple[str, ...], arg(metavar="CAPTION ...")]] = ()
    """what to draw; "" draws without a caption"""
    out: str = "samples"
    """directory for the pictures"""
    num_images: int = 4
    """pictures per caption, with the seeds SEED, SEED + 1, ..."""
    seed: int = 0
    """of the first picture of each caption"""
    temperature: float = 1.0
    """lower is safer and less varied; 0 takes the most probable code every time"""
    top_k: int | None = None
    """draw among this many most probable codes; None is all"""
    top_p: float | None = None
    """draw among the most probable codes that share this much of the probability; None is all"""
    guidance_scale: float = 1.0
    """scale of classifier-free guidance: above 1 the caption counts for more; 1 is none"""
    prefix: str | None = None
    """picture whose top rows every drawn picture begins with; of the model's size"""
    prefix_rows: int | None = None
    """rows of codes taken from --prefix; None is half of them"""
    captions_file: str | None = None
    """more captions, one a line, UTF-8; empty lines are skipped. A file that ends in .jsonl has an object a line:
    caption, and where it differs from the flags seed, temperature, top_p, guidance"""
    unconditional: bool = False
    """draw without a caption"""
    batch_size: int = 8
    """pictures drawn at once"""
    draft_len: int | None = None
    """draw this many codes per pass of the network, as far as they turn out right: the same pictures in fewer passes,
    each of more work (docs/sampling.md); None is one"""
    quantization: Quantization | None = None
    """matrices in 8 bits: int8 or fp8 stores weights so, w8a8 also rounds what they are multiplied with"""
    preview_rows: int | None = None
    """write grid.png anew after every so many rows of codes, grey where nothing is drawn yet; neither with a captions
    file nor with --clip"""
    clip: str | None = None
    """directory of a trained CLIP: draw --candidates pictures of each caption and keep the --top that fit it best,
    in place of --num-images"""
    candidates: int | None = None
    """with --clip: pictures drawn for each caption; None is 64"""
    top: int | None = None
    """with --clip: pictures kept of each caption, best first; None is 4"""
    num_steps: int | None = None
    """diffusion: evaluations of the network (heun and pc take two a step); None is 50"""
    sampler: SamplerName | None = None
    """diffusion: how the noise is taken away; None is dpm++2m"""
    spacing: Spacing | None = None
    """diffusion: of the times between noise and picture; None is uniform"""
    eta: float | None = None
    """diffusion, ddim: noise put back in each step; 0 is none, 1 as much as the ancestral sampler"""
    threshold: float | None = None
    """diffusion: quantile that clean pictures are held in on the way, e.g. 0.995; None clips them"""
    guidance_interval: tuple[float, float] | None = None
    """diffusion: guidance only where the time, 1 for noise and 0 for the picture, lies between these two"""
    image: str | None = None
    """diffusion: picture to begin from, with --strength or --mask; of the model's size"""
    strength: float | None = None
    """diffusion: share of the way from --image to pure noise that is gone back before drawing, (0, 1]"""
    mask: str | None = None
    """diffusion: picture of --image's size; what is white is drawn anew, what is black is kept"""
    label: tuple[int, ...] = ()
    """diffusion on classes: numbers of the classes to draw"""
    low_res: str | None = None
    """diffusion on small pictures: the one to make large"""
    filmstrip: int | None = None
    """diffusion: also write filmstrip.png, this many looks of each picture on its way"""
    decoder: str | None = None
    """Transformer: run of a diffusion model on its tokenizer's codes, which draws the pixels"""
    json: JsonFlag = False


def run(args: SampleArgs) -> dict[str, Any]:
    """Draws, writes and lists the pictures."""
    asked = _captions(args)
    captions = [caption for caption, _ in asked]
    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}; want at least 1 picture per caption")
    if args.clip is None and (args.candidates is not None or args.top is not None):
        raise ValueError(
            "--candidates and --top need --clip, the run of the CLIP that ranks; --num-images draws without one"
        )
    if args.clip is not None and args.num_images != 4:
        raise ValueError(
            "--num-images is for drawing without --clip; with it, --top says how many pictures stay"
        )
    if args.preview_rows is not None and (args.preview_rows < 1 or args.captions_file or args.clip):
        raise ValueError(
            f"--preview-rows is {args.preview_rows}; want at least 1, and neither --captions-file nor --clip"
        )
    if is_diffusion(args.run):
        refuse_flags(
            args,
            ("decoder", "clip", "preview_rows", "draft_len", "quantization"),
            "a Transformer; this is the run of a diffusion model",
        )
        if any(own for _, own in asked):
            raise ValueError("lines of --captions-file with settings of their own are for a Transformer")
        return sample_diffusion.sample(args, captions, _exact_picture, _tell_cut)
    if not captions:
        raise ValueError(
            'no captions; give one or more, e.g. "a red circle", or --unconditional to draw without'
        )
    if args.decoder is None:
        flags = ("sampler", "num_steps", "spacing", "eta", "threshold")
        refuse_flags(args, flags, "a diffusion model, or for --decoder")
    elif args.clip is not None or args.captions_file is not None:
        raise ValueError(
            "--decoder goes with captions on the command line, without --clip; leave out the other"
        )
    flags = ("guidance_interval", "image", "mask", "strength", "label", "low_res", "filmstrip")
    refuse_flags(args, flags, "a diffusion model; this is the run of a Transformer")
    if args.prefix_rows is not None and args.prefix is None:
        raise ValueError("--prefix-rows says how much of --prefix to keep; give --prefix PICTURE as well")
    sampling = SamplingConfig(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, guidance_scale=args.guidance_scale,
        draft_len=args.draft_len, quantization=args.quantization,
    )  # fmt: skip
    model = load_text_to_image(args.run, on_host=True)
    clip = None if args.clip is None else load_clip(args.clip)
    prefix = None if args.prefix is None else _prefix(model, args.prefix, args.prefix_rows)
    decoder = None if args.decoder is None else load_diffusion(args.decoder)
    if decoder is not None:
        check_decoder(decoder, model.tokenizer)
    cut = _tell_cut(model.text, model.config.text_len, captions)
    if args.captions_file is not None and clip is None:
        return sample_file.sample_file(args, asked, model, sampling, prefix, _tell_first)
    if any(own for _, own in asked):
        raise ValueError(
            "lines of --captions-file with settings of their own go through the queue, which --clip has not; give "
            "plain captions, or leave out --clip"
        )
    out = output.directory(args.out)
    if clip is not None:
        return _best(args, model, clip, captions, sampling, prefix, cut, out)

    rows = [(j, args.seed + i) for j in range(len(captions)) for i in range(args.num_images)]
    names = [f"c{j:03d}_s{seed:04d}.png" for j, seed in rows]
    seeds = [seed for _, seed in rows]
    parts, passes = [], []

    labels = [captions[j] or NO_CAPTION for j, _ in rows]
    columns = args.num_images if len(captions) > 1 else min(args.num_images, 8)

    def shown(unfinished: np.ndarray) -> None:
        so_far = np.concatenate([*(pictures for _, pictures in parts), unfinished])
        _save_grid(out, so_far, labels[: len(so_far)], columns)

    for part in sample_images(
        model, captions, seeds, sampling, prefix_codes=prefix, batch=args.batch_size, progress=ProgressPrinter("pictures"),
        preview_rows=args.preview_rows, on_preview=shown, on_batch=passes.append,
    ):  # fmt: skip
        if not parts:
            _tell_first(len(part[0]))
        done = sum(len(codes) for codes, _ in parts)
        for name, picture in zip(names[done:], part[1], strict=False):
            images.save_png(out / name, picture)
        parts.append(part)
    codes, pictures = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    if decoder is not None:  # the same codes, seen by another
        progress = ProgressPrinter("denoising steps")
        pictures = denoise_images(
            decoder, seeds, denoising(args), codes=codes, batch=args.batch_size, progress=progress
        ).images
        for name, picture in zip(names, pictures, strict=True):
            images.save_png(out / name, picture)
    _save_all(model, out, names, codes, pictures, labels, columns)
    print(f"{len(names)} pictures in {out}, all with their captions in {out / 'grid.png'}")
    faster = {}
    if args.draft_len is not None:
        drawn = model.config.num_codes - 1 - (0 if prefix is None else len(prefix))
        faster = {"codes_per_pass": drawn / float(np.concatenate(passes).mean())}
        print(f"{faster['codes_per_pass']:.2f} codes a pass")
    return {
        **_about(model, out),
        **faster,
        "pictures": [
            {"file": str(out / name), "caption": captions[j], "seed": seed, "tokens_cut": cut[j]}
            for name, (j, seed) in zip(names, rows, strict=True)
        ],
    }


def _best(
    args: SampleArgs,
    model: TextToImage,
    clip: ClipRanker,
    captions: list[str],
    sampling: SamplingConfig,
    prefix: np.ndarray | None,
    cut: list[int],
    out: Path,
) -> dict[str, Any]:
    """Draws the candidates of each caption, writes and lists the best of them."""
    candidates = 64 if args.candidates is None else args.candidates
    keep = min(4, candidates) if args.top is None else args.top
    if candidates < 1:
        raise ValueError(f"--candidates is {candidates}; want at least 1 picture per caption")
    seeds = [args.seed + i for _ in captions for i in range(candidates)]
    options = {"prefix_codes": prefix, "batch": args.batch_size, "progress": ProgressPrinter("pictures")}
    listed, codes, pictures = [], [], []
    for best in sample_and_rerank(model, clip, captions, seeds, keep, sampling, **options):
        for place, which in enumerate(best.which):
            seed = args.seed + int(which)
            name = f"c{best.number:03d}_s{seed:04d}.png"
            images.save_png(out / name, best.images[place])
            row = {"file": str(out / name), "caption": captions[best.number], "seed": seed}
            listed.append({**row, "score": float(best.score[place]), "tokens_cut": cut[best.number]})
        codes.append(best.codes)
        pictures.append(best.images)
    names = [Path(row["file"]).name for row in listed]
    labels = [f"{row['score']:.3f} {row['caption']}" for row in listed]
    _save_all(model, out, names, np.concatenate(codes), np.concatenate(pictures), labels, min(keep, 8))
    print(
        f"the best {keep} of {candidates} pictures of each caption in {out}, best first in {out / 'grid.png'}"
    )
    return {**_about(model, out), "clip": str(clip.run.path), "candidates": candidates, "pictures": listed}


def _save_all(
    model: TextToImage,
    out: Path,
    names: list[str],
    codes: np.ndarray,
    pictures: np.ndarray,
    labels: list[str],
    columns: int,
) -> None:
    """grid.png and codes.npz."""
    _save_grid(out, pictures, labels, columns)
    made_by = np.array(model.tokenizer.fingerprint)
    write_npz(out / "codes.npz", codes=codes, names=np.array(names), tokenizer=made_by)


def _save_grid(out: Path, pictures: np.ndarray, labels: list[str], columns: int) -> None:
    scale = max(1, 128 // pictures.shape[1])
    images.save_png(out / "grid.png", images.image_grid(pictures, columns, labels=labels, scale=scale))


def _about(model: TextToImage, out: Path) -> dict[str, Any]:
    run = {"run": str(model.run.path), "step": model.run.step}
    return {**run, "grid": str(out / "grid.png"), "codes": str(out / "codes.npz")}


def _tell_first(count: int) -> None:
    told = "the first picture" if count == 1 else f"the first {count} pictures"
    print(
        f"{told} after {startup.seconds_since_start():.1f} s, starting up and compiling included",
        file=sys.stderr,
    )


def _captions(args: SampleArgs) -> list[CaptionRequest]:
    captions = [CaptionRequest(caption, {}) for caption in args.captions]
    if args.captions_file is not None:
        captions += sample_file.read_requests(args.captions_file)
    if args.unconditional and captions:
        raise ValueError("--unconditional draws without a caption; leave the captions out, or the flag")
    if args.unconditional:
        return [CaptionRequest("", {})]
    return captions


def _tell_cut(text: TextTokenizer, most: int, captions: list[str]) -> list[int]:
    """Tokens of each caption beyond `most`, told on standard error."""
    cut = [max(0, text.count_tokens(caption) - most) for caption in captions]
    for j, more in enumerate(cut):
        if more:
            print(
                f"warning: caption {j} has {most + more} tokens, the model reads {most}: the last {more} "
                f"are cut ({captions[j]!r:.60})",
                file=sys.stderr,
            )
    return cut


def _prefix(model: TextToImage, path: str, rows: int | None) -> np.ndarray:
    """Codes of the top rows of a picture, int32 (rows * grid,)."""
    cfg = model.tokenizer.config
    rows = cfg.grid // 2 if rows is None else rows
    if not 1 <= rows < cfg.grid:
        raise ValueError(
            f"--prefix-rows is {rows}; the picture has {cfg.grid} rows of codes: want 1 to {cfg.grid - 1}"
        )
    picture = _exact_picture(path, cfg.image_size, "--prefix")
    return encode_images(model.tokenizer, picture[None])[0, : rows * cfg.grid]


def _exact_picture(path: str, side: int, flag: str) -> np.ndarray:
    """The picture in a file, uint8 (side, side, 3). Raises ValueError for another size."""
    picture = images.load_image(path, side)
    with Image.open(path) as header:
        width, height = header.size
    if (width, height) != (side, side):
        raise ValueError(
            f"{flag} {path} is {width} x {height} pixels; this model's pictures are {side} x {side}: crop and "
            "resize it to that"
        )
    return picture
