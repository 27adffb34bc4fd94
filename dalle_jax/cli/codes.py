"""`dalle-jax encode` and `dalle-jax decode`: pictures to codes and back, by the tokenizer of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.checkpoint.run_dir import load_config, read_config
from dalle_jax.cli import output
from dalle_jax.cli.sample_diffusion import denoising, refuse_flags
from dalle_jax.cli.verbs import Decode, Encode
from dalle_jax.config import DataConfig, TrainConfig
from dalle_jax.data import images
from dalle_jax.data.codes import EVAL_DIR, is_complete
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.sources import infer_source, open_source
from dalle_jax.files.archives import read_npz
from dalle_jax.files.atomic import write_npz
from dalle_jax.parallel.processes import process_share
from dalle_jax.pipelines import (
    IMAGE_BATCH,
    ImageTokenizer,
    ProgressPrinter,
    decode_codes,
    encode_images,
    encode_source,
    load_image_tokenizer,
)
from dalle_jax.pipelines.diffusion import DiffusionModel, denoise_images, is_diffusion, load_diffusion


def encode(args: Encode) -> dict[str, Any]:
    """Pictures to a file of codes, or the training pictures of `args.data` to a directory of shards."""
    if bool(args.images) == (args.data is not None):
        raise ValueError("give pictures to encode, or --data DATA for a training set")
    if args.data is not None:
        return _encode_ahead(args)
    given = [
        f"--{n.replace('_', '-')}"
        for n in _AHEAD
        if getattr(args, n) != Encode.__dataclass_fields__[n].default
    ]
    if given:
        raise ValueError(f"{', '.join(given)} is for --data; leave it out to encode every picture given")
    tokenizer, out = load_image_tokenizer(args.run), output.file(args.out)
    codes = _encode_files(tokenizer, args.images, ProgressPrinter("rows"))
    made_by = np.array(tokenizer.fingerprint)
    write_npz(out, codes=codes, names=np.array(args.images), tokenizer=made_by)
    print(
        f"{codes.shape[0]} x {codes.shape[1]} codes in {out}; next: dalle-jax decode {args.run} {out} --out DIR"
    )
    return {"codes": str(out), "rows": len(codes), "codes_per_picture": codes.shape[1], **_about(tokenizer)}


_AHEAD = ("rows", "eval_rows", "shard_rows", "process", "processes")


def _encode_ahead(args: Encode) -> dict[str, Any]:
    data = resolve_data(args.data)
    tokenizer, out = load_image_tokenizer(args.run), output.directory(args.out)
    if (args.process is None) != (args.processes is None):
        raise ValueError("--process and --processes go together: --process 0 --processes 4")
    process = process_share() if args.process is None else (args.process, args.processes)
    options = {"rows": args.rows, "shard_rows": args.shard_rows, "process": process}
    info, made = encode_source(tokenizer, data, out, progress=ProgressPrinter("rows"), **options)
    held_out = _encode_held_out(args, tokenizer, data, out / EVAL_DIR, process)
    missing = [k for k in range(info.shards) if not is_complete(out, info, k)]
    told = f"{len(missing)} of {info.shards} shards are still missing, of other processes"
    print(
        f"{info.rows} x {info.num_codes} codes in {out}: {made} of {info.shards} shards made now; "
        + (told if missing else f"next: --data.codes {out}")
    )
    return {
        "codes": str(out), "rows": info.rows, "codes_per_picture": info.num_codes, "shards": info.shards,
        "made": made, "missing": len(missing), "eval_rows": held_out, **_about(tokenizer),
    }  # fmt: skip


def _encode_held_out(
    args: Encode, tokenizer: ImageTokenizer, data: DataConfig, out: Path, process: tuple[int, int]
) -> int:
    """The first rows of the evaluation split, beside the others; 0 where nothing is held out or wanted."""
    if args.eval_rows < 0:
        raise ValueError(f"--eval-rows is {args.eval_rows}; want a number of rows, 0 for none")
    if args.eval_rows == 0:
        return 0
    try:
        rows = min(args.eval_rows, len(open_source(data.source, "eval", languages=data.languages)))
    except ValueError as error:
        print(f"no rows are held out for evaluation: {error}", file=sys.stderr)
        return 0
    options = {"rows": rows, "shard_rows": args.shard_rows, "process": process, "split": "eval"}
    encode_source(tokenizer, data, out, progress=ProgressPrinter("rows held out"), **options)
    return rows


def _encode_files(tokenizer: ImageTokenizer, paths: tuple[str, ...], progress: ProgressPrinter) -> np.ndarray:
    size, found = tokenizer.config.image_size, []
    batch = min(IMAGE_BATCH, len(paths))
    for start in range(0, len(paths), batch):
        pictures = np.stack([images.load_image(path, size) for path in paths[start : start + batch]])
        found.append(encode_images(tokenizer, pictures))
        progress(start + len(pictures), len(paths))
    return np.concatenate(found)


def decode(args: Decode) -> dict[str, Any]:
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
    return {"images": str(out), "pictures": len(pictures), **_about(tokenizer)}


def _own_tokenizer(decoder: DiffusionModel, run: str) -> ImageTokenizer:
    if decoder.tokenizer is None:
        raise ValueError(f"{run} is a diffusion model that reads no codes; give one with model.codes")
    return decoder.tokenizer


def _about(tokenizer: ImageTokenizer) -> dict[str, Any]:
    cfg = tokenizer.config
    return {"image_size": cfg.image_size, "vocab": cfg.vocab, "tokenizer": tokenizer.fingerprint}


def _read_codes(path: str) -> tuple[np.ndarray, str | None]:
    """The array `codes` of an npz file, and the fingerprint of the tokenizer that made them if it is told."""
    want = "want an npz file with an array `codes`, as `dalle-jax encode` writes it"
    arrays = read_npz(path, want)
    if "codes" not in arrays:
        raise ValueError(f"{path} has no array `codes`, it has {', '.join(arrays) or 'none'}; {want}")
    return arrays["codes"], str(arrays["tokenizer"]) if "tokenizer" in arrays else None


def resolve_config(path: str) -> TrainConfig:
    """The configuration of a run directory, or of a Python file."""
    return load_config(path) if path.endswith(".py") or Path(path).is_file() else read_config(path)


def resolve_data(path: str) -> DataConfig:
    """The data of a configuration file or of a run, else what is at `path` in the usual way of reading it."""
    if path.endswith(".py") or (Path(path) / "config.json").is_file():
        return resolve_config(path).data
    return DataConfig(source=infer_source(path))
