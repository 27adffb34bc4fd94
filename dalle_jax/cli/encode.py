"""`dalle-jax encode`: codes of images, by the tokenizer of a run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, RunPath, resolve_data
from dalle_jax.config import DataConfig
from dalle_jax.data import images
from dalle_jax.data.codes import EVAL_DIR, is_shard_complete
from dalle_jax.data.sources import open_source
from dalle_jax.files.atomic import write_npz
from dalle_jax.parallel.processes import process_index_and_count
from dalle_jax.pipelines import (
    IMAGE_BATCH_SIZE,
    ProgressPrinter,
    TokenizerPipeline,
    chunked,
    encode_dataset,
    load,
)


@dataclass(frozen=True, kw_only=True)
class EncodeArgs:
    """Encode images to codes: `codes` int32 (images, codes) and `names` in one npz file. Images are cropped to their
    center square and resized.

    With --data, encode a training set with its captions to a directory of array_record shards, for `--data.codes` of
    train.py. Re-running the command resumes. Several processes, each with its own --process, share the work."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, or of a Transformer, which keeps its own"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]] = ()
    """image files"""
    out: str
    """npz file to write; with --data a directory"""
    data: str | None = None
    """configuration file, run, folder, tar files, npz file, TFDS directory or name, whose training set is encoded"""
    rows: int | None = None
    """with --data: only the first rows"""
    eval_rows: int = 1024
    """with --data: also the first rows of the evaluation split, so that a run evaluates without images; 0 is none"""
    shard_rows: int = 16_384
    """with --data: rows of a shard; an interruption loses at most one shard"""
    process: int | None = None
    """with --data: number of this process, from 0; None is its number in a step of Slurm, under Open MPI or on a
    Cloud TPU slice"""
    processes: int | None = None
    """with --data: processes that encode, on one machine or several; process p makes the shards p, p + P, ..."""
    json: JsonFlag = False


_DATA_FLAGS = ("rows", "eval_rows", "shard_rows", "process", "processes")


def run(args: EncodeArgs) -> dict[str, Any]:
    """Encode images to a file, or the training set of `args.data` to a directory of shards."""
    if bool(args.images) == (args.data is not None):
        raise ValueError("Expected images to encode, or --data DATA for a training set.")
    if args.data is not None:
        return _encode_training_set(args, resolve_data(args.data))
    for field in dataclasses.fields(args):
        if field.name in _DATA_FLAGS and getattr(args, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(f"Expected {flag} with --data, got it without. Remove {flag} or set --data.")
    tokenizer, out = load(args.run, TokenizerPipeline), output.output_file(args.out)
    codes = _encode_files(tokenizer, args.images, ProgressPrinter("rows"))
    encoded_by = np.array(tokenizer.fingerprint)
    write_npz(out, codes=codes, names=np.array(args.images), tokenizer=encoded_by)
    rows, num_codes = codes.shape
    print(f"{rows} x {num_codes} codes in {out}; next: dalle-jax decode {args.run} {out} --out DIR")
    return {
        "codes": str(out),
        "rows": rows,
        "codes_per_image": num_codes,
        **output.tokenizer_summary(tokenizer),
    }


def _encode_training_set(args: EncodeArgs, data: DataConfig) -> dict[str, Any]:
    tokenizer, out = load(args.run, TokenizerPipeline), output.output_directory(args.out)
    if args.process is None and args.processes is None:
        process = process_index_and_count()
    elif args.process is not None and args.processes is not None:
        process = (args.process, args.processes)
    else:
        raise ValueError(
            "Expected --process with --processes, got one of them. Use e.g. --process 0 --processes 4."
        )
    info, made = encode_dataset(
        tokenizer,
        data,
        out,
        rows=args.rows,
        shard_rows=args.shard_rows,
        process=process,
        progress=ProgressPrinter("rows"),
    )
    eval_rows = _encode_eval_split(args, tokenizer, data, out / EVAL_DIR, process)
    missing = sum(not is_shard_complete(out, info, k) for k in range(info.shards))
    next_step = (
        f"{missing} of {info.shards} shards are still missing, of other processes"
        if missing
        else f"next: --data.codes {out}"
    )
    print(
        f"{info.rows} x {info.num_codes} codes in {out}: {made} of {info.shards} shards made now; {next_step}"
    )
    return {
        "codes": str(out), "rows": info.rows, "codes_per_image": info.num_codes, "shards": info.shards,
        "made": made, "missing": missing, "eval_rows": eval_rows, **output.tokenizer_summary(tokenizer),
    }  # fmt: skip


def _encode_eval_split(
    args: EncodeArgs, tokenizer: TokenizerPipeline, data: DataConfig, out: Path, process: tuple[int, int]
) -> int:
    """Encode the first rows of the evaluation split; return how many, 0 where there is none or none is asked for."""
    if args.eval_rows < 0:
        raise ValueError(f"Expected --eval-rows of at least 0, got {args.eval_rows}. Use 0 for none.")
    if args.eval_rows == 0:
        return 0
    try:
        rows = min(args.eval_rows, len(open_source(data.source, "eval", languages=data.languages)))
    except ValueError as error:
        print(f"no evaluation split is encoded: {error}", file=sys.stderr)
        return 0
    encode_dataset(
        tokenizer,
        data,
        out,
        rows=rows,
        shard_rows=args.shard_rows,
        process=process,
        split="eval",
        progress=ProgressPrinter("evaluation rows"),
    )
    return rows


def _encode_files(
    tokenizer: TokenizerPipeline, paths: tuple[str, ...], progress: ProgressPrinter
) -> np.ndarray:
    codes: list[np.ndarray] = []
    for batch in chunked(paths, IMAGE_BATCH_SIZE):
        pixels = np.stack([images.load_image(path, tokenizer.image_size) for path in batch])
        codes.append(tokenizer.encode(pixels, batch_size=min(IMAGE_BATCH_SIZE, len(paths))))
        progress(sum(map(len, codes)), len(paths))
    return np.concatenate(codes)
