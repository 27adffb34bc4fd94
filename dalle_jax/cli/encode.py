"""`dalle-jax encode`: codes of images, by the tokenizer of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, RunPath, refuse_flags, resolve_data
from dalle_jax.config import DataConfig
from dalle_jax.data import images
from dalle_jax.data.codes import EVAL_DIR, is_complete
from dalle_jax.data.sources import open_source
from dalle_jax.files.atomic import write_npz
from dalle_jax.parallel.processes import process_index_and_count
from dalle_jax.pipelines import (
    IMAGE_BATCH,
    ImageTokenizer,
    ProgressPrinter,
    encode_images,
    encode_source,
    load_image_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class EncodeArgs:
    """Turns pictures into codes: `codes` int32 (pictures, codes) and `names` in one npz file. Pictures are
    cropped to their middle square and resized.

    With --data it encodes a training set with its captions into a directory of array_record shards, for
    `--data.codes` of train.py. The same command again goes on where it stopped. Several
    processes, each with its own --process, share the work."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, or of a Transformer, which keeps its own"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]] = ()
    """picture files"""
    out: str
    """npz file to write; with --data a directory"""
    data: str | None = None
    """configuration file, run, folder, tar files, npz file, TFDS directory or name: its training set is encoded"""
    rows: int | None = None
    """with --data: only the first rows"""
    eval_rows: int = 1024
    """with --data: also the first rows of the evaluation split, so that a run measures itself without pictures; 0 is
    none"""
    shard_rows: int = 16_384
    """with --data: rows of a shard, of which an interruption costs at most one"""
    process: int | None = None
    """with --data: number of this process, from 0; None is its number in a step of Slurm, under Open MPI or on a
    Cloud TPU slice"""
    processes: int | None = None
    """with --data: processes that encode, on one machine or several; process p makes the shards p, p + P, ..."""
    json: JsonFlag = False


def run(args: EncodeArgs) -> dict[str, Any]:
    """Pictures to a file of codes, or the training pictures of `args.data` to a directory of shards."""
    if bool(args.images) == (args.data is not None):
        raise ValueError("give pictures to encode, or --data DATA for a training set")
    if args.data is not None:
        return _encode_ahead(args)
    refuse_flags(args, _AHEAD, "--data")
    tokenizer, out = load_image_tokenizer(args.run), output.file(args.out)
    codes = _encode_files(tokenizer, args.images, ProgressPrinter("rows"))
    made_by = np.array(tokenizer.fingerprint)
    write_npz(out, codes=codes, names=np.array(args.images), tokenizer=made_by)
    print(
        f"{codes.shape[0]} x {codes.shape[1]} codes in {out}; next: dalle-jax decode {args.run} {out} --out DIR"
    )
    return {
        "codes": str(out),
        "rows": len(codes),
        "codes_per_picture": codes.shape[1],
        **output.tokenizer_summary(tokenizer),
    }


_AHEAD = ("rows", "eval_rows", "shard_rows", "process", "processes")


def _encode_ahead(args: EncodeArgs) -> dict[str, Any]:
    data = resolve_data(args.data)
    tokenizer, out = load_image_tokenizer(args.run), output.directory(args.out)
    if (args.process is None) != (args.processes is None):
        raise ValueError("--process and --processes go together: --process 0 --processes 4")
    process = process_index_and_count() if args.process is None else (args.process, args.processes)
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
        "made": made, "missing": len(missing), "eval_rows": held_out, **output.tokenizer_summary(tokenizer),
    }  # fmt: skip


def _encode_held_out(
    args: EncodeArgs, tokenizer: ImageTokenizer, data: DataConfig, out: Path, process: tuple[int, int]
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
